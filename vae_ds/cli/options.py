"""Options that several commands share, and the function that adds a command to the parser."""

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vae_ds.errors import CheckpointError, ConfigError
from vae_ds.runtime import own_rank, run_dirs

SPLITS = ("train", "valid", "test")
PRIORS = ("normal", "gaussian", "mixture", "flow")
RECIPE_HELP = "a YAML file, or the name of a shipped recipe"
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
    """Add the recipe of a training, its overrides and the run directory. `recipe_of` returns the recipe."""
    # Not required here: `--set a=1 demo` takes the recipe for one of its values, and `recipe_of` finds it there.
    parser.usage = "%(prog)s RECIPE [--set KEY=VALUE ...] [OPTION ...]"
    recipe = parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=RECIPE_HELP)
    complete_with(recipe, _recipes)
    add_overrides(parser)
    parser.add_argument("--run-dir", metavar="DIR", help="the run directory (default: runs/NAME, NAME from the recipe)")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the options that override settings of a recipe."""
    add_set(parser, "override settings of the recipe, such as seed=1 phases.0.steps=100 (default: none)")
    parser.add_argument(
        "--deepspeed",
        metavar="FILE",
        help="the DeepSpeed configuration: zero0 to zero3, the name of a shipped one, or a JSON file "
        "(default: `deepspeed` of the recipe)",
    )


def add_set(parser: argparse._ActionsContainer, text: str) -> None:
    """Add `--set`, with its help text."""
    option = parser.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE", help=text)
    complete_with(option, _settings)


def add_json(parser: argparse.ArgumentParser, what: str = "one JSON object instead of a table") -> None:
    """Add `--json` for other programs."""
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def add_run(parser: argparse.ArgumentParser, text: str, name: str = "run", nargs: str | None = None) -> None:
    """Add the argument RUN, or several. The name of the shipped model becomes its directory."""
    parser.add_argument(name, metavar="RUN", help=text, nargs=nargs, type=_run)


def _run(name: str) -> str:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = run_dirs.shipped(name)
        except CheckpointError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    for warning in said:
        if own_rank() == "0":
            print(f"warning: {warning.message}", file=sys.stderr)
    if found is None:
        # As a path, so that no other place says the same again.
        return os.path.join(os.curdir, name) if said else name
    return str(found)


def add_job(parser: argparse._ActionsContainer) -> None:
    """Add the resources of a SLURM job."""
    parser.add_argument("--dry-run", action="store_true", help="print the batch file and submit nothing")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="number of nodes (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=count, default=0, metavar="N", help="GPUs on each node (default: %(default)s)"
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


def add_prior(parser: argparse.ArgumentParser) -> None:
    """Add the choice among the priors of an export."""
    parser.add_argument(
        "--prior",
        choices=PRIORS,
        help="one of the model's priors (default: the one in use, see `vae-ds prior`)",
    )


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The KEY=VALUE items of `--set`, followed by `--deepspeed` as one more item. Call it after `recipe_of`."""
    chosen: Sequence[str] = arguments.set or []
    return [*chosen, f"deepspeed={arguments.deepspeed}"] if arguments.deepspeed else list(chosen)


def recipe_of(arguments: argparse.Namespace, name: str = "recipe") -> str:
    """The argument RECIPE, or STUDY if `name` is `study`. Raises ConfigError if there is none.

    Without it, the one value of `--set` that has no `=` is taken, and removed there: `--set seed=1 demo`.
    """
    if getattr(arguments, name) is None:
        strays = [word for word in arguments.set or () if "=" not in word]
        if len(strays) != 1:
            extra = f"; --set {strays[0]} is not KEY=VALUE" if strays else ""
            raise ConfigError(f"the {name} is missing; give a YAML file or the name of a shipped {name}{extra}")
        setattr(arguments, name, strays[0])
        arguments.set.remove(strays[0])
    return str(getattr(arguments, name))


def run_dir_of(arguments: argparse.Namespace, name: str) -> Path:
    """`--run-dir`, otherwise runs/NAME."""
    return Path(arguments.run_dir or Path("runs") / name)


def will_train(arguments: argparse.Namespace, run_dir: Path) -> None:
    """Call it before a command trains a run: how the command ends is recorded in the status of that run."""
    arguments.trained_dir = run_dir


def count(text: str) -> int:
    """Parse an integer of at least 0."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    return _at_least(1, text)


def two_or_more(text: str) -> int:
    """Parse an integer of at least 2."""
    return _at_least(2, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"found {text}; expected an integer of at least {least}")
    return value


def above_zero(text: str) -> float:
    """Parse a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}; expected a number above 0")
    return value


def complete_with(action: argparse.Action, words: Callable[..., Sequence[str]]) -> None:
    """Let the shell complete an argument with `words` and with files (argcomplete reads this attribute)."""
    setattr(action, "completer", words)  # noqa: B010 - argparse does not declare the attribute


def _recipes(prefix: str, **_: Any) -> list[str]:
    from vae_ds import config as configuration

    files = [str(path) for path in Path().glob(f"{prefix}*") if path.is_dir() or path.suffix in (".yaml", ".yml")]
    return [*configuration.shipped_recipes(), *files]


def _settings(**_: Any) -> list[str]:
    from vae_ds import config as configuration

    return [f"{key.replace('.N.', '.0.')}=" for key, _, _ in configuration.reference()]
