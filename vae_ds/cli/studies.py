"""`vae-ds study`: plan, train, submit and report the runs of a study."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_ds.cli.evaluation import write_report
from vae_ds.cli.options import add_command, add_job, add_set, positive, recipe_of, will_train
from vae_ds.errors import Failed
from vae_ds.runtime import listening, outlive_terminal, own_rank, run_dirs


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_command(
        subparsers,
        "study",
        study,
        "list, train and report many runs of one recipe",
        "Without --run, --here, --slurm or --report: lists the runs and their states.",
        [
            "vae-ds study paper --corpus grammar --length 0.1           # list the runs",
            "vae-ds study paper --corpus grammar --length 0.1 --here    # train, evaluate, report",
            "vae-ds study paper --corpus snli --path data/snli --slurm --gpus-per-node 1",
        ],
    )
    # Not required here: `--set a=1 paper` takes the study for one of its values, and `recipe_of` finds it there.
    parser.usage = "%(prog)s STUDY [OPTION ...]"
    parser.add_argument("study", nargs="?", metavar="STUDY", help="`paper`, `recommended`, or a YAML file")
    parser.add_argument("--corpus", metavar="NAME", help="`data.corpus` of every run (default: from the study)")
    parser.add_argument("--path", metavar="PATH", help="`data.path` of every run (default: from the study)")
    parser.add_argument("--base", metavar="MODEL", help="`model.base` of every run (default: from the study)")
    parser.add_argument(
        "--length", type=float, metavar="FACTOR", help="factor for all lengths in epochs (default: from the study)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="repeat each run with each seed (default: from the study)"
    )
    parser.add_argument(
        *("--add", "-a"),
        nargs="+",
        action="append",
        default=[],
        metavar="WORD",
        help="add a run: its name, then KEY=VALUE ..., such as --add deep model.base=google-t5/t5-base; "
        "can be repeated",
    )
    add_set(parser, "override settings of every run, such as batch.global=32 (default: none)")
    parser.add_argument(
        "--runs",
        metavar="DIR",
        help="the directory of the runs (default: runs/NAME, or runs/NAME-CORPUS with --corpus)",
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--run", type=int, metavar="N", help="train and evaluate run N, counted from 0")
    actions.add_argument("--here", action="store_true", help="train and evaluate the missing runs, then report")
    actions.add_argument("--slurm", action="store_true", help="submit the missing runs as job arrays")
    actions.add_argument(
        "--report", action="store_true", help="write tables and figures of the existing runs to DIR/report"
    )
    jobs = parser.add_argument_group("with --slurm, for each run")
    add_job(jobs)
    jobs.add_argument(
        "--parallel", type=positive, default=4, metavar="N", help="number of runs at a time (default: %(default)s)"
    )


def study(arguments: argparse.Namespace) -> None:
    stop = listening()
    from vae_ds.studies import study as studies

    chosen = {"data.corpus": arguments.corpus, "data.path": arguments.path, "model.base": arguments.base}
    settings = {key: value for key, value in chosen.items() if value is not None}
    config = studies.load(recipe_of(arguments, "study"), settings, arguments.add, arguments.length, arguments.seeds)
    name = f"{config.name}-{arguments.corpus}" if arguments.corpus else config.name
    root, extra = Path(arguments.runs or Path("runs") / name), arguments.set or ()
    if arguments.run is not None or arguments.here or arguments.report:
        run_dirs.check_writable(root, "--runs")
    if arguments.run is not None or arguments.here:
        outlive_terminal(root)
    if arguments.run is not None:
        row = studies.row_of(config, arguments.run)
        will_train(arguments, root / row.name)
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
    elif missing := _list_runs(studies.states(config, root)):
        _submit(arguments, name, root, missing)
    else:
        again = f"vae-ds study {shlex.join(_words(arguments, root))}"
        print(f"\nall runs are done; to write tables and figures:\n  {again} --report")


def _list_runs(states: Sequence[tuple[Any, str]]) -> list[list[int]]:
    """Print the runs of a study. Returns the numbers of the runs that are not done: the yardsticks, then the others."""
    missing: list[list[int]] = [[], []]
    for number, (row, state) in enumerate(states):
        print(f"{number:4} {state:8} {row.name}")
        if state != "done":
            missing[row.yardstick is not None].append(number)
    return [numbers for numbers in missing if numbers]


def _report(root: Path) -> None:
    print()
    write_report([root], root / "report")


def _submit(arguments: argparse.Namespace, name: str, root: Path, missing: Sequence[Sequence[int]]) -> None:
    """Submit the missing runs as job arrays that run one after the other. Without `--slurm`, print the commands."""
    from vae_ds.cluster import submission

    words = _words(arguments, root)
    if not arguments.slurm:
        again = f"vae-ds study {shlex.join(words)}"
        print(f"\nto train the missing runs here:\n  {again} --here\nor on a cluster:\n  {again} --slurm")
        return
    resources = submission.Wanted(arguments.nodes, arguments.gpus_per_node, arguments.tasks_per_node, arguments.time)
    options = resources, submission.site(arguments.site), arguments.parallel, arguments.sbatch
    job = None
    for text in [submission.array_file(name, words, numbers, root, *options) for numbers in missing]:
        if arguments.dry_run:
            print(f"\n{text}", end="")
            continue
        after, file = (f", after {job}", "submit-rest.sbatch") if job else ("", "submit.sbatch")
        job = submission.submit(text, root, file, after=job).job
        print(f"\narray {job}{after}: squeue -j {job}\nlogs in {root / 'logs'}\nsave and end it: scancel {job}")


def _words(arguments: argparse.Namespace, root: Path) -> list[str]:
    """The arguments that select the same study again, without the action."""
    words = [arguments.study, "--runs", str(root)]
    for option in ("corpus", "path", "base", "length"):
        value = getattr(arguments, option)
        words += [f"--{option}", str(value)] if value is not None else []
    words += ["--seeds", *map(str, arguments.seeds)] if arguments.seeds else []
    for row in arguments.add:
        words += ["--add", *row]
    return words + (["--set", *arguments.set] if arguments.set else [])
