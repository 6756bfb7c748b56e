"""`vae-ds evaluate`, `compare` and `report`."""

import argparse
from pathlib import Path
from typing import Any

from vae_ds.cli.options import add_command, add_split, count, positive


def add(subparsers: Any) -> None:
    """Add the commands of this family."""
    one = add_command(subparsers, "evaluate", evaluate, "every metric of a run, on one split")
    one.add_argument("run", metavar="RUN", help="a run directory, or an exported model with --recipe")
    add_split(one)
    one.add_argument("--iw-samples", type=positive)
    one.add_argument("--iw-sentences", type=positive)
    one.add_argument("--batch", type=positive, help="sentences per forward pass")
    one.add_argument("--bleu-sentences", type=count, metavar="N", help="sentences reconstructed for BLEU; 0: none")
    one.add_argument("--samples", type=count, metavar="N", help="prior samples for the metrics of text; 0: none")
    one.add_argument("--recipe", help="the recipe that names the text, for an exported model")
    one.add_argument("--yardstick", metavar="RUN", help="a run with injection `none`, evaluated on the same split")

    one = add_command(subparsers, "compare", compare, "one table of evaluated runs")
    one.add_argument("runs", nargs="+", metavar="RUN")
    add_split(one)

    one = add_command(subparsers, "report", report, "tables and figures of runs: Markdown, CSV, PNG, SVG")
    one.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, or a directory of runs such as a study's")
    one.add_argument("--to", required=True, metavar="DIR", help="the report's directory; its page is report.md")
    add_split(one)


def evaluate(arguments: argparse.Namespace) -> None:
    from vae_ds.evaluation import finished_run

    settings = {
        "iw_samples": arguments.iw_samples,
        "iw_sentences": arguments.iw_sentences,
        "batch": arguments.batch,
        "bleu_sentences": arguments.bleu_sentences,
        "samples": arguments.samples,
    }
    metrics = finished_run.evaluate_run(
        Path(arguments.run), arguments.split, settings, recipe=arguments.recipe, yardstick=arguments.yardstick
    )
    if metrics is not None:
        from vae_ds import studies

        studies.print_metrics([arguments.run], arguments.split, units=True)


def compare(arguments: argparse.Namespace) -> None:
    from vae_ds import studies

    studies.print_metrics(arguments.runs, arguments.split)


def report(arguments: argparse.Namespace) -> None:
    from vae_ds import studies

    print(studies.report.write(arguments.runs, Path(arguments.to), arguments.split))
