"""`vae-ds train`, `pretrain`, `status` and `export`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vae_ds.cli.options import add_command, add_recipe, overrides_of, run_dir_of, will_train
from vae_ds.errors import CheckpointError
from vae_ds.runtime import EXIT_FAULT, EXIT_STOPPED, listening


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_command(
        subparsers,
        "train",
        train,
        "train a recipe; run the same command again to resume",
        "`vae-ds` starts one process. To use all GPUs, start it with a launcher.",
        [
            "vae-ds train demo --run-dir runs/demo --set seed=1",
            "vae-ds train demo --dry-run",
            "deepspeed --module vae_ds train demo          # on all GPUs of this machine",
        ],
    )
    _add_training(parser)
    parser.add_argument("--dry-run", action="store_true", help="resolve and check everything, but train nothing")
    parser.add_argument(
        "--until",
        metavar="PHASE",
        help="stop after this phase, a name or a number from 1; a later start continues (default: the last phase)",
    )

    parser = add_command(
        subparsers,
        "pretrain",
        pretrain,
        "pretrain a small T5 from scratch; run the same command again to resume",
        examples=["vae-ds pretrain pretrain-tiny --run-dir runs/tiny"],
    )
    _add_training(parser)

    parser = add_command(
        subparsers,
        "status",
        status,
        "print the state of a run as JSON",
        "The exit code is 0 if the run is done, 75 if it is stopped, 1 if it is running or failed.",
        ["vae-ds status runs/demo"],
    )
    parser.add_argument("run", metavar="RUN", help="a run directory")

    parser = add_command(
        subparsers,
        "export",
        export,
        "copy the model of a run to a new directory",
        examples=["vae-ds export runs/demo --to demo-model"],
    )
    parser.add_argument("run", metavar="RUN", help="a run directory or an exported model")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new or empty directory")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: resume an existing run; never: refuse a run directory that contains one (default: %(default)s)",
    )
    parser.add_argument(
        "--changed-data", action="store_true", help="resume although the training text has changed since the checkpoint"
    )


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
                per_epoch = f", {plan.steps_per_epoch} an epoch" if plan.steps_per_epoch else ""
                print(f"# phase {plan.name}: {plan.steps} steps{per_epoch}")
            print(
                f"# {ranks.world} ranks, {prepared.precision}, micro batch {prepared.micro}, "
                f"accumulation {prepared.accumulation}"
            )
        return
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("resume", "changed_data", "until")}
    will_train(arguments, run_dir)
    training.train(config, run_dir, stop=stop, **options)


def pretrain(arguments: argparse.Namespace) -> None:
    stop = listening()
    from vae_ds import config as configuration

    config = configuration.load(configuration.PretrainConfig, arguments.recipe, overrides_of(arguments))
    run_dir = run_dir_of(arguments, config.name)
    from vae_ds import pretraining

    will_train(arguments, run_dir)
    pretraining.pretrain(config, run_dir, arguments.resume, arguments.changed_data, stop)


def status(arguments: argparse.Namespace) -> None:
    from vae_ds.runtime import records

    found = records.read_status(Path(arguments.run))
    if found is None:
        raise CheckpointError(f"{arguments.run} has no status.json; name a run directory")
    found = records.of_the_living(found)
    print(json.dumps(found))
    if found["state"] != "done":
        sys.exit({"stopped": EXIT_STOPPED}.get(found["state"], EXIT_FAULT))


def export(arguments: argparse.Namespace) -> None:
    from vae_ds.evaluation import finished_run

    finished_run.export(Path(arguments.run), Path(arguments.to))
    print(arguments.to)
