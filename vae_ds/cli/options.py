"""Arguments that several commands share, and how a command is added to the parser."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SPLITS = ("train", "valid", "test")

Command = Callable[[argparse.Namespace], None]


def add_command(subparsers: Any, name: str, run: Command, text: str) -> argparse.ArgumentParser:
    """Add a command to `subparsers`; `run` gets its parsed arguments."""
    one: argparse.ArgumentParser = subparsers.add_parser(name, help=text, description=text)
    one.set_defaults(command=run)
    return one


def add_recipe(one: argparse.ArgumentParser) -> None:
    """The recipe of a training, and what the command line changes in it."""
    one.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    add_overrides(one)
    one.add_argument("--run-dir", help="the run directory; default runs/NAME")


def add_overrides(one: argparse.ArgumentParser) -> None:
    """Settings that override those of a recipe."""
    one.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE", help="override a setting")
    one.add_argument("--deepspeed", metavar="FILE", help="zero0..zero3, a shipped ds_config's name, or a JSON file")


def add_job(one: argparse._ActionsContainer) -> None:
    """The resources of a SLURM job."""
    one.add_argument("--dry-run", action="store_true", help="print the batch file, submit nothing")
    one.add_argument("--nodes", type=positive, default=1)
    one.add_argument("--gpus-per-node", type=int, default=0, metavar="N")
    one.add_argument("--tasks-per-node", type=positive, metavar="N", help="ranks per node; default one per GPU")
    one.add_argument(
        "--time", metavar="LIMIT", help="time limit as in SLURM (24:00:00); the run saves and requeues before it ends"
    )
    one.add_argument("--site", metavar="FILE", help="default $VAE_DS_SITE, or ~/.config/vae_ds/site.yaml")
    one.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch: --sbatch=--exclusive"
    )


def add_split(one: argparse.ArgumentParser) -> None:
    """The split of an evaluation."""
    one.add_argument("--split", choices=SPLITS, default="test")


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The KEY=VALUE words of `--set`, and `--deepspeed` as one of them."""
    chosen: Sequence[str] = arguments.set or []
    return [*chosen, f"deepspeed={arguments.deepspeed}"] if arguments.deepspeed else list(chosen)


def run_dir_of(arguments: argparse.Namespace, name: str) -> Path:
    """`--run-dir`, else runs/NAME. Stored in `arguments`, so that a failure is recorded in that directory."""
    arguments.run_dir = arguments.run_dir or str(Path("runs") / name)
    return Path(arguments.run_dir)


def count(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
