"""`vae-ds study`: plan, train, submit and report the runs of a study."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_ds.cli.options import add_command, add_job, positive
from vae_ds.errors import Failed
from vae_ds.runtime import listening, own_rank


def add(subparsers: Any) -> None:
    """Add the commands of this family."""
    one = add_command(subparsers, "study", study, "many runs of one recipe: list them, train them, report")
    one.add_argument("study", metavar="STUDY", help="`paper`, `recommended`, or a YAML file: recipe, set, grid, ...")
    one.add_argument("--corpus", metavar="NAME", help="the data of every run, as in `data.corpus`")
    one.add_argument("--path", metavar="PATH", help="the path of that data, as in `data.path`")
    one.add_argument("--base", metavar="MODEL", help="the pretrained T5 of every run, as in `model.base`")
    one.add_argument("--length", type=float, metavar="FACTOR", help="multiplies every length in epochs")
    one.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="repeat each run with each seed")
    one.add_argument(
        *("--add", "-a"),
        nargs="+",
        action="append",
        default=[],
        metavar="WORD",
        help="one more run: its name, then KEY=VALUE ...; as --add deep model.base=google-t5/t5-base",
    )
    one.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE", help="override a setting of every run")
    one.add_argument("--runs", metavar="DIR", help="the directory of the runs; default runs/NAME, or runs/NAME-CORPUS")
    what = one.add_mutually_exclusive_group()
    what.add_argument("--run", type=int, metavar="N", help="train and evaluate run N, counted from 0")
    what.add_argument("--here", action="store_true", help="train and evaluate what is missing, then report")
    what.add_argument("--slurm", action="store_true", help="submit what is missing as a job array")
    what.add_argument("--report", action="store_true", help="tables and figures of what is there, in DIR/report")
    jobs = one.add_argument_group("with --slurm, of each run")
    add_job(jobs)
    jobs.add_argument("--parallel", type=positive, default=4, metavar="N", help="runs at a time")


def study(arguments: argparse.Namespace) -> None:
    stop = listening()
    from vae_ds.studies import study as studies

    chosen = {"data.corpus": arguments.corpus, "data.path": arguments.path, "model.base": arguments.base}
    settings = {key: value for key, value in chosen.items() if value is not None}
    config = studies.load(arguments.study, settings, arguments.add, arguments.length, arguments.seeds)
    name = f"{config.name}-{arguments.corpus}" if arguments.corpus else config.name
    root, extra = Path(arguments.runs or Path("runs") / name), arguments.set or ()
    if arguments.run is not None:
        row = studies.row_of(config, arguments.run)
        arguments.run_dir = str(root / row.name)
        studies.run(config, row, root, stop, extra)
        return
    studies.check(config, extra)
    if arguments.here:
        failed = studies.run_all(config, root, stop, extra)
        if own_rank() == "0":
            _report(root)
        if failed:
            raise Failed(f"{len(failed)} of the runs failed: {', '.join(failed)}")
    elif arguments.report:
        _report(root)
    elif left := _listed(studies.states(config, root)):
        _submit(arguments, name, root, left)
    else:
        print(f"\nall done; tables and figures: vae-ds {shlex.join(_words(arguments, root))} --report")


def _listed(states: Sequence[tuple[Any, str]]) -> list[list[int]]:
    """Print a study's runs. Returns the numbers of those that are not done: the yardsticks, then the others."""
    left: list[list[int]] = [[], []]
    for number, (row, state) in enumerate(states):
        print(f"{number:4} {state:8} {row.name}")
        if state != "done":
            left[row.yardstick is not None].append(number)
    return [numbers for numbers in left if numbers]


def _report(root: Path) -> None:
    from vae_ds.studies import report

    print(f"\n{report.write([root], root / 'report')}")


def _submit(arguments: argparse.Namespace, name: str, root: Path, left: Sequence[Sequence[int]]) -> None:
    """Submit what is left as job arrays, each after the one before; without `--slurm`, print the commands that do."""
    from vae_ds.cluster import submission

    words = _words(arguments, root)
    if not arguments.slurm:
        print(f"\nto train what is left, here or on a cluster: vae-ds study {shlex.join(words)} --here, or --slurm")
        return
    wanted = submission.Wanted(arguments.nodes, arguments.gpus_per_node, arguments.tasks_per_node, arguments.time)
    options = wanted, submission.site(arguments.site), arguments.parallel, arguments.sbatch
    job = None
    for text in [submission.array_file(name, words, numbers, root, *options) for numbers in left]:
        if arguments.dry_run:
            print(f"\n{text}", end="")
            continue
        after, file = (f", after {job}", "submit-rest.sbatch") if job else ("", "submit.sbatch")
        job = submission.submit(text, root, file, after=job).job
        print(f"\narray {job}{after}: squeue -j {job}\nlogs in {root / 'logs'}\nsave and end it: scancel {job}")


def _words(arguments: argparse.Namespace, root: Path) -> list[str]:
    """The arguments that name the same study again, without the action."""
    words = [arguments.study, "--runs", str(root)]
    for option in ("corpus", "path", "base", "length"):
        value = getattr(arguments, option)
        words += [f"--{option}", str(value)] if value is not None else []
    words += ["--seeds", *map(str, arguments.seeds)] if arguments.seeds else []
    for row in arguments.add:
        words += ["--add", *row]
    return words + (["--set", *arguments.set] if arguments.set else [])
