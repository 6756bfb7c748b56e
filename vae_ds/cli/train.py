"""`vae-ds train`, `pretrain`, `status` and `export`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vae_ds.cli.options import add_command, add_recipe, overrides_of, run_dir_of
from vae_ds.errors import CheckpointError
from vae_ds.runtime import EXIT_FAULT, EXIT_STOPPED, listening


def add(subparsers: Any) -> None:
    """Add the commands of this family."""
    one = add_command(subparsers, "train", train, "train a recipe; run the same command again to resume")
    _add_training(one)
    one.add_argument("--dry-run", action="store_true", help="resolve and check everything, train nothing")
    one.add_argument(
        "--until", metavar="PHASE", help="stop after this phase (name, or number from 1); a later start continues"
    )
    _add_training(add_command(subparsers, "pretrain", pretrain, "pretrain a small T5 from nothing"))

    one = add_command(subparsers, "status", status, "print the state of a run; exit code 0 only if it is done")
    one.add_argument("run", metavar="RUN")
    one = add_command(subparsers, "export", export, "copy a run's model to a directory of its own")
    one.add_argument("run", metavar="RUN")
    one.add_argument("--to", required=True, metavar="DIR")


def _add_training(one: argparse.ArgumentParser) -> None:
    add_recipe(one)
    one.add_argument("--resume", choices=("auto", "never"), default="auto")
    one.add_argument("--changed-data", action="store_true", help="resume although the training text has changed")


def train(arguments: argparse.Namespace) -> None:
    stop = listening()
    from vae_ds import config as configuration

    config = configuration.load(configuration.RunConfig, arguments.recipe, overrides_of(arguments))
    run_dir = run_dir_of(arguments, config.name)
    from vae_ds import distributed, training

    if arguments.dry_run:
        ranks = distributed.start()
        prepared = training.prepare(config, run_dir, ranks)
        if ranks.is_main:
            print(configuration.dump(config))
            for plan in prepared.plans:
                of_epoch = f", {plan.steps_per_epoch} an epoch" if plan.steps_per_epoch else ""
                print(f"# phase {plan.name}: {plan.steps} steps{of_epoch}")
            print(
                f"# {ranks.world} ranks, {prepared.precision}, micro batch {prepared.micro}, "
                f"accumulation {prepared.accumulation}"
            )
        return
    how: dict[str, Any] = {name: getattr(arguments, name) for name in ("resume", "changed_data", "until")}
    training.train(config, run_dir, stop=stop, **how)


def pretrain(arguments: argparse.Namespace) -> None:
    stop = listening()
    from vae_ds import config as configuration

    config = configuration.load(configuration.PretrainConfig, arguments.recipe, overrides_of(arguments))
    run_dir = run_dir_of(arguments, config.name)
    from vae_ds import pretraining

    pretraining.pretrain(config, run_dir, arguments.resume, arguments.changed_data, stop)


def status(arguments: argparse.Namespace) -> None:
    from vae_ds.runtime import records

    found = records.read_status(Path(arguments.run))
    if found is None:
        raise CheckpointError(f"{arguments.run}: no status.json; not a run directory")
    found = records.of_the_living(found)
    print(json.dumps(found))
    if found["state"] != "done":
        sys.exit({"stopped": EXIT_STOPPED}.get(found["state"], EXIT_FAULT))


def export(arguments: argparse.Namespace) -> None:
    from vae_ds.evaluation import finished_run

    finished_run.export(Path(arguments.run), Path(arguments.to))
    print(arguments.to)
