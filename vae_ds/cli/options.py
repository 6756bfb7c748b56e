"""Options that several commands share, and the function that adds a command to the parser."""

import argparse
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SPLITS = ("train", "valid", "test")
HELP_WIDTH = 79

Command = Callable[[argparse.Namespace], None]


def add_command(
    subparsers: Any, name: str, run: Command, summary: str, details: str = "", examples: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Add a command to `subparsers`.

    `run` is called with the parsed arguments. `summary` is the line in the list of commands. The command's own help
    shows `summary` and `details` above the options, and the shell commands in `examples` below them.
    """
    description = f"{summary[0].upper()}{summary[1:]}. {details}".strip()
    title = "Examples" if len(examples) > 1 else "Example"
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, HELP_WIDTH),
        epilog="\n  ".join([f"{title}:", *examples]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps one example per line
    )
    parser.set_defaults(command=run)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe of a training, its overrides and the run directory."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    add_overrides(parser)
    parser.add_argument("--run-dir", metavar="DIR", help="the run directory (default: runs/NAME, NAME from the recipe)")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the options that override settings of a recipe."""
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="override settings of the recipe, such as seed=1 phases.0.steps=100 (default: none)",
    )
    parser.add_argument(
        "--deepspeed",
        metavar="FILE",
        help="the DeepSpeed configuration: zero0 to zero3, the name of a shipped one, or a JSON file "
        "(default: `deepspeed` of the recipe)",
    )


def add_job(parser: argparse._ActionsContainer) -> None:
    """Add the resources of a SLURM job."""
    parser.add_argument("--dry-run", action="store_true", help="print the batch file and submit nothing")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="number of nodes (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=0, metavar="N", help="GPUs on each node (default: %(default)s)"
    )
    parser.add_argument(
        "--tasks-per-node",
        type=positive,
        metavar="N",
        help="ranks on each node (default: one per GPU, or one without GPUs)",
    )
    parser.add_argument(
        "--time",
        metavar="LIMIT",
        help="time limit in SLURM's format, such as 24:00:00; the job saves and requeues before it expires "
        "(default: the limit of the partition)",
    )
    parser.add_argument(
        "--site",
        metavar="FILE",
        help="settings of the cluster (default: $VAE_DS_SITE, otherwise ~/.config/vae_ds/site.yaml)",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="an additional sbatch option, such as --sbatch=--exclusive; can be repeated",
    )


def add_split(parser: argparse.ArgumentParser) -> None:
    """Add the split of an evaluation."""
    parser.add_argument("--split", choices=SPLITS, default="test", help="the evaluated split (default: %(default)s)")


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The KEY=VALUE items of `--set`, followed by `--deepspeed` as one more item."""
    chosen: Sequence[str] = arguments.set or []
    return [*chosen, f"deepspeed={arguments.deepspeed}"] if arguments.deepspeed else list(chosen)


def run_dir_of(arguments: argparse.Namespace, name: str) -> Path:
    """`--run-dir`, otherwise runs/NAME."""
    return Path(arguments.run_dir or Path("runs") / name)


def will_train(arguments: argparse.Namespace, run_dir: Path) -> None:
    """Call it before a command trains a run: how the command ends is recorded in the status of that run."""
    arguments.trained_dir = run_dir


def count(text: str) -> int:
    """Parse an integer of at least 0."""
    return 0 if text == "0" else positive(text)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}; expected an integer of at least 1")
    return value
