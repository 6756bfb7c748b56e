"""`vae-ds submit` and `doctor`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vae_ds.cli.options import add_command, add_job, add_recipe, overrides_of
from vae_ds.runtime import EXIT_FAULT


def add(subparsers: Any) -> None:
    """Add the commands of this family."""
    one = add_command(subparsers, "submit", submit, "train a recipe as a SLURM job")
    add_recipe(one)
    add_job(one)

    one = add_command(subparsers, "doctor", doctor, "check this machine, or a job's nodes, before a run")
    one.add_argument("--run-dir", help="the directory of the run; default runs, else the current one")
    one.add_argument("--json", action="store_true", help="print one JSON object, for a support ticket")
    one.add_argument("--no-ranks", dest="ranks", action="store_false", help="leave out the all-reduce between ranks")
    one.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for the ranks; default 60")
    one.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def submit(arguments: argparse.Namespace) -> None:
    from vae_ds import config as configuration
    from vae_ds.cluster import submission

    overrides = overrides_of(arguments)
    config = configuration.load(configuration.RunConfig, arguments.recipe, overrides)
    run_dir = Path(arguments.run_dir or Path("runs") / config.name)
    wanted = submission.Wanted(arguments.nodes, arguments.gpus_per_node, arguments.tasks_per_node, arguments.time)
    train = [arguments.recipe, "--run-dir", str(run_dir), *(("--set", *overrides) if overrides else ())]
    text = submission.batch_file(config, train, run_dir, wanted, submission.site(arguments.site), arguments.sbatch)
    if arguments.dry_run:
        print(text, end="")
        return
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
