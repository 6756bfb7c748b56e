"""The command line's commands and their arguments. Knows nothing heavy: `--help` answers at once."""

import argparse
from collections.abc import Callable
from typing import Any

from vae_ds import commands


def parser() -> argparse.ArgumentParser:
    """The parser of everything behind `vae-ds`; `command` of what it returns takes the arguments."""
    whole = argparse.ArgumentParser(
        prog="vae-ds", description="Turn a pretrained T5 into a text variational autoencoder by finetuning alone."
    )
    subparsers = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("train", commands.train, "train a recipe; run again, it resumes"),
        ("pretrain", commands.pretrain, "pretrain a small T5 from nothing"),
    ):
        one = _command(subparsers, name, command, text)
        _add_recipe(one)
        one.add_argument("--resume", choices=("auto", "never"), default="auto")
        one.add_argument("--changed-data", action="store_true", help="resume though the training text has changed")
        if name == "train":
            one.add_argument("--dry-run", action="store_true", help="resolve and check everything, train nothing")
            one.add_argument(
                "--until", metavar="PHASE", help="end after this phase, by name or number from 1; a later start goes on"
            )

    one = _command(subparsers, "evaluate", commands.evaluate, "every metric of a run, on one split")
    one.add_argument("run", metavar="RUN", help="a run directory, or an exported model with --recipe")
    _add_split(one)
    one.add_argument("--iw-samples", type=_positive)
    one.add_argument("--iw-sentences", type=_positive)
    one.add_argument("--batch", type=_positive, help="sentences a forward pass")
    one.add_argument("--bleu-sentences", type=_count, metavar="N", help="reconstructed for bleu; 0: none")
    one.add_argument("--samples", type=_count, metavar="N", help="prior samples for the metrics of text; 0: none")
    one.add_argument("--recipe", help="where the text comes from, for an exported model")
    one.add_argument("--yardstick", metavar="RUN", help="a run with injection `none`, evaluated on the same split")

    one = _command(subparsers, "compare", commands.compare, "one table of evaluated runs")
    one.add_argument("runs", nargs="+", metavar="RUN")
    _add_split(one)

    one = _command(subparsers, "report", commands.report, "tables and figures of runs: Markdown, CSV, PNG, SVG")
    one.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, or a directory of runs such as a study's")
    one.add_argument("--to", required=True, metavar="DIR", help="where the report goes; report.md is its page")
    _add_split(one)

    one = _generator(subparsers, "reconstruct", commands.reconstruct, "sentences through z and back")
    one.add_argument("text", nargs="*")
    one.add_argument("--from", dest="source", choices=("train", "valid", "test"), default="test")
    one.add_argument("-n", "--number", type=_positive, default=5)
    one.add_argument("--sampled", action="store_true", help="z drawn from the posterior; default its mean")
    one = _generator(subparsers, "sample", commands.sample, "sentences from the prior")
    one.add_argument("-n", "--number", type=_positive, default=8)
    one = _generator(subparsers, "interpolate", commands.interpolate, "the way from one sentence to another")
    one.add_argument("first")
    one.add_argument("last")
    one.add_argument("--steps", type=_positive, default=7)
    one.add_argument("--path", choices=("linear", "slerp"), default="linear")
    one = _generator(subparsers, "analogy", commands.analogy, "a is to b as c is to what?")
    for name in "abc":
        one.add_argument(name)
    one = _generator(subparsers, "traverse", commands.traverse, "one latent unit varied around a sentence")
    one.add_argument("text")
    one.add_argument("--unit", type=int, default=0)

    one = _command(subparsers, "study", commands.study, "many runs of one recipe: list them, train them, report")
    one.add_argument("study", metavar="STUDY", help="`paper`, `recommended`, or a YAML file: recipe, set, grid, ...")
    one.add_argument("--corpus", metavar="NAME", help="the data of every run, as in `data.corpus`")
    one.add_argument("--path", metavar="PATH", help="where that is, as in `data.path`")
    one.add_argument("--base", metavar="MODEL", help="the pretrained T5 of every run, as in `model.base`")
    one.add_argument("--length", type=float, metavar="FACTOR", help="times every length in epochs")
    one.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="each run once a seed")
    one.add_argument(
        *("--add", "-a"),
        nargs="+",
        action="append",
        default=[],
        metavar="WORD",
        help="one more run: its name, then KEY=VALUE ...; as --add deep model.base=google-t5/t5-base",
    )
    one.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE", help="override a setting of every run")
    one.add_argument("--runs", metavar="DIR", help="where the runs go; default runs/NAME, or runs/NAME-CORPUS")
    what = one.add_mutually_exclusive_group()
    what.add_argument("--run", type=int, metavar="N", help="train and evaluate run N, counted from 0")
    what.add_argument("--here", action="store_true", help="train and evaluate what is missing, then report")
    what.add_argument("--slurm", action="store_true", help="submit what is missing as a job array")
    what.add_argument("--report", action="store_true", help="tables and figures of what is there, in DIR/report")
    jobs = one.add_argument_group("with --slurm, of each run")
    _add_job(jobs)
    jobs.add_argument("--parallel", type=_positive, default=4, metavar="N", help="runs at a time")

    one = _command(subparsers, "submit", commands.submit, "train a recipe as a SLURM job")
    _add_recipe(one)
    _add_job(one)

    benches = subparsers.add_parser("bench", help="measure; see `vae-ds bench --help`").add_subparsers(
        required=True, metavar="BENCH"
    )
    one = _command(
        benches,
        "soak",
        commands.bench_soak,
        "a run whose ranks are killed again and again; checkpoints must come faster",
    )
    one.add_argument("recipe", nargs="?", default="demo")
    one.add_argument("--run-dir", default="runs/soak")
    one.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE", help="override a setting")
    one.add_argument("--deepspeed", metavar="FILE")
    one.add_argument("--processes", type=_positive, default=2)
    one.add_argument("--kill-every-minutes", type=float, default=3.0)
    one.add_argument("--minutes", type=float, help="end with the next kill after this time, done or not")
    one.add_argument("--seed", type=int, default=0, help="of who is killed and when")
    one.add_argument("--no-compare", action="store_true", help="do not train once more undisturbed to compare weights")

    one = _command(subparsers, "export", commands.export, "copy a run's model to a directory of its own")
    one.add_argument("run", metavar="RUN")
    one.add_argument("--to", required=True, metavar="DIR")
    one = _command(subparsers, "status", commands.status, "what became of a run; exits 0 only if it is done")
    one.add_argument("run", metavar="RUN")
    one = _command(subparsers, "doctor", commands.doctor, "check this machine, or a job's nodes, before a run")
    one.add_argument("--run-dir", help="where the run would be kept; default runs, else here")
    one.add_argument("--json", action="store_true", help="one JSON object, for a support ticket")
    one.add_argument("--no-ranks", dest="ranks", action="store_false", help="leave out the all-reduce between ranks")
    one.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for the ranks; default 60")
    one.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    one = _command(subparsers, "recipes", commands.recipes, "list the shipped recipes, show one, or all keys")
    one.add_argument("action", choices=("list", "show", "keys"), nargs="?", default="list")
    one.add_argument("name", nargs="?")
    return whole


def _command(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    one: argparse.ArgumentParser = subparsers.add_parser(name, help=text, description=text)
    one.set_defaults(command=run)
    return one


def _generator(subparsers: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
    one = _command(subparsers, name, run, text)
    one.add_argument("run", metavar="RUN", help="a run directory or an exported model")
    one.add_argument("--max-new-tokens", type=_positive, default=64)
    one.add_argument("--temperature", type=float, help="draw tokens; default greedy")
    one.add_argument("--top-p", type=float, help="with a temperature: nucleus sampling")
    one.add_argument("--beams", type=_positive, default=1)
    one.add_argument("--seed", type=int, default=0)
    return one


def _add_recipe(one: argparse.ArgumentParser) -> None:
    one.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    one.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE", help="override a setting")
    one.add_argument("--run-dir", help="where the run is kept; default runs/NAME")
    one.add_argument("--deepspeed", metavar="FILE", help="zero0..zero3, a shipped ds_config's name, or a JSON file")


def _add_job(one: argparse._ActionsContainer) -> None:
    one.add_argument("--dry-run", action="store_true", help="print the batch file, submit nothing")
    one.add_argument("--nodes", type=_positive, default=1)
    one.add_argument("--gpus-per-node", type=int, default=0, metavar="N")
    one.add_argument("--tasks-per-node", type=_positive, metavar="N", help="ranks a node; default one a GPU")
    one.add_argument(
        "--time", metavar="LIMIT", help="as in SLURM: 24:00:00; before it ends, the run saves and requeues"
    )
    one.add_argument("--site", metavar="FILE", help="default $VAE_DS_SITE, or ~/.config/vae_ds/site.yaml")
    one.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="one more, as --sbatch=--exclusive"
    )


def _add_split(one: argparse.ArgumentParser) -> None:
    one.add_argument("--split", choices=("train", "valid", "test"), default="test")


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
