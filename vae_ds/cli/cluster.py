"""`vae-ds submit` and `vae-ds doctor`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vae_ds.cli.options import add_command, add_job, add_recipe, overrides_of, recipe_of, run_dir_of
from vae_ds.runtime import EXIT_FAULT, run_dirs


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_command(
        subparsers,
        "submit",
        submit,
        "train a recipe as a SLURM job",
        "Writes RUN/submit.sbatch and hands it to sbatch. The job saves before its time limit, requeues and resumes.",
        ["vae-ds submit demo --nodes 2 --gpus-per-node 4 --time 24:00:00"],
    )
    add_recipe(parser)
    add_job(parser)

    parser = add_command(
        subparsers,
        "doctor",
        doctor,
        "check this machine, or the nodes of a job, before a run",
        "Checks versions, GPUs, disks, limits, network and SLURM, and runs an all-reduce between ranks. The exit code "
        "is 1 if a check failed.",
        [
            "vae-ds doctor              # this machine",
            "srun vae-ds doctor         # in a SLURM job: all nodes and the network between them",
        ],
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="the run directory whose disk is checked (default: runs if it exists, otherwise the current directory)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--no-ranks", dest="ranks", action="store_false", help="skip the all-reduce between the ranks")
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="time limit of the all-reduce (default: %(default)g)",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def submit(arguments: argparse.Namespace) -> None:
    from vae_ds import config as configuration
    from vae_ds.cluster import submission

    recipe = recipe_of(arguments)
    overrides = overrides_of(arguments)
    config = configuration.load(configuration.RunConfig, recipe, overrides)
    run_dir = run_dir_of(arguments, config.name)
    resources = submission.Wanted(arguments.nodes, arguments.gpus_per_node, arguments.tasks_per_node, arguments.time)
    train = [recipe, "--run-dir", str(run_dir), *(("--set", *overrides) if overrides else ())]
    text = submission.batch_file(config, train, run_dir, resources, submission.site(arguments.site), arguments.sbatch)
    if arguments.dry_run:
        print(text, end="")
        return
    run_dirs.check_writable(run_dir)
    job = submission.submit(text, run_dir)
    print(f"job {job.job}: squeue -j {job.job}")
    print(f"log {job.log}\nfollow it: tail -F {job.rank_log}\nsave and end it: scancel {job.job}")


def doctor(arguments: argparse.Namespace) -> None:
    from vae_ds.cluster import doctor

    if arguments.worker:
        doctor.work(arguments.timeout)
        return
    run_dir = Path(arguments.run_dir or ("runs" if Path("runs").is_dir() else "."))
    how = {"with_ranks": arguments.ranks, "timeout_s": arguments.timeout, "as_json": arguments.json}
    if not doctor.examine(run_dir, **how):
        sys.exit(EXIT_FAULT)
