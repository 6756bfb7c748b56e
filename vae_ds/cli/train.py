"""`vae-ds train`, `pretrain` and `export`."""

import argparse
from pathlib import Path
from typing import Any

from vae_ds.cli import outcome
from vae_ds.cli.options import add_command, add_recipe, add_run, overrides_of, recipe_of, run_dir_of, will_train
from vae_ds.errors import ConfigError
from vae_ds.runtime import listening, outlive_terminal, own_rank, records, run_dirs


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

    parser.add_argument(
        "--profile",
        action="store_true",
        help="profile steps 20 to 22 of each phase on rank 0, into RUN/profile; see the setting `profile`",
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
        "export",
        export,
        "copy the model of a run to a new directory",
        examples=["vae-ds export runs/demo --to demo-model", "vae-ds export runs/demo --to small --dtype bfloat16"],
    )
    add_run(parser, "a run directory or an exported model")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="the dtype of the stored weights; bfloat16 halves the file (default: that of the model)",
    )
    parser.add_argument(
        "--format",
        choices=("vae_ds", "sentence-transformers", "torch", "onnx"),
        default="vae_ds",
        help="vae_ds: the whole model; the others have the encoder alone: a directory for sentence-transformers, a "
        "file of torch.export, a file of ONNX (default: %(default)s)",
    )


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

    recipe = recipe_of(arguments)
    overrides = [*(["profile={}"] if arguments.profile else []), *overrides_of(arguments)]
    config = configuration.load(configuration.RunConfig, recipe, overrides)
    run_dir = run_dir_of(arguments, config.name)
    run_dirs.check_writable(run_dir)
    if not arguments.dry_run:
        # Before the libraries are loaded: some keep the streams of this moment.
        outlive_terminal(run_dir)
    from vae_ds import training

    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("resume", "changed_data", "until")}
    if arguments.dry_run:
        from vae_ds import authoring

        told = training.dry_run(config, run_dir, **options, memory=authoring.memory)
        if own_rank() == "0":
            print(told)
        return
    will_train(arguments, run_dir)
    before = records.read_status(run_dir)
    training.train(config, run_dir, stop=stop, **options)
    after = records.read_status(run_dir)
    # Not after `--until`: that run is stopped.
    if own_rank() == "0" and after is not None and after["state"] == "done":
        print("\n".join(outcome.lines(run_dir, config, was_done=after == before)), flush=True)


def pretrain(arguments: argparse.Namespace) -> None:
    stop = listening()
    from vae_ds import config as configuration

    recipe = recipe_of(arguments)
    config = configuration.load(configuration.PretrainConfig, recipe, overrides_of(arguments))
    run_dir = run_dir_of(arguments, config.name)
    run_dirs.check_writable(run_dir)
    outlive_terminal(run_dir)
    from vae_ds import pretraining

    will_train(arguments, run_dir)
    pretraining.pretrain(config, run_dir, arguments.resume, arguments.changed_data, stop)


def export(arguments: argparse.Namespace) -> None:
    model, to = run_dirs.model_of(Path(arguments.run)), Path(arguments.to)
    is_whole = arguments.format == "vae_ds"
    if not is_whole and arguments.dtype is not None:
        raise ConfigError(f"--dtype is of the format vae_ds; found --format {arguments.format}")
    run_dirs.check_writable(to.parent if arguments.format in ("torch", "onnx") else to, "--to")
    if is_whole:
        from vae_ds.evaluation import finished_run

        finished_run.export(Path(arguments.run), to, arguments.dtype)
    else:
        from vae_ds.sharing import encoder

        write = {"sentence-transformers": encoder.sentence_transformers, "torch": encoder.program, "onnx": encoder.onnx}
        write[arguments.format](model, to)
    print(arguments.to)
