"""`vae-ds evaluate`, `compare` and `report`."""

import argparse
from pathlib import Path
from typing import Any

from vae_ds.cli.options import add_command, add_split, count, positive


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_command(
        subparsers,
        "evaluate",
        evaluate,
        "compute all metrics of a run on one split",
        "Writes RUN/eval-SPLIT.json and prints a table.",
        [
            "vae-ds evaluate runs/demo-yardstick",
            "vae-ds evaluate runs/demo --yardstick runs/demo-yardstick",
        ],
    )
    parser.add_argument("run", metavar="RUN", help="a run directory, or an exported model together with --recipe")
    add_split(parser)
    parser.add_argument(
        "--iw-samples",
        type=positive,
        metavar="N",
        help="importance samples per sentence for iw_nll (default: evaluation.iw_samples of the recipe)",
    )
    parser.add_argument(
        "--iw-sentences",
        type=positive,
        metavar="N",
        help="sentences for iw_nll (default: evaluation.iw_sentences of the recipe)",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="sentences per forward pass and rank (default: evaluation.batch of the recipe)",
    )
    parser.add_argument(
        "--bleu-sentences",
        type=count,
        metavar="N",
        help="sentences reconstructed for BLEU, 0 for none (default: evaluation.bleu_sentences of the recipe)",
    )
    parser.add_argument(
        "--samples",
        type=count,
        metavar="N",
        help="prior samples for the text metrics, 0 for none (default: evaluation.samples of the recipe)",
    )
    parser.add_argument("--recipe", help="the recipe whose data and settings are used (default: the recipe of the run)")
    parser.add_argument(
        "--yardstick",
        metavar="RUN",
        help="an evaluated run of a plain language model (injection `none`), for lm_gain and forward_ppl "
        "(default: without these two)",
    )

    parser = add_command(
        subparsers,
        "compare",
        compare,
        "print one table of evaluated runs",
        "Reads the stored evaluations and computes nothing.",
        ["vae-ds compare runs/demo runs/demo-yardstick"],
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="an evaluated run directory")
    add_split(parser)

    parser = add_command(
        subparsers,
        "report",
        report,
        "write tables and figures of runs: Markdown, CSV, PNG, SVG",
        examples=["vae-ds report runs/demo runs/demo-yardstick --to report"],
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run directory, or a directory of runs such as a study"
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="the directory of the report; its page is report.md")
    add_split(parser)


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
        from vae_ds import studies, training

        training.tensorboard.record_evaluation(Path(arguments.run), arguments.split, metrics)
        studies.print_metrics([arguments.run], arguments.split, units=True)


def compare(arguments: argparse.Namespace) -> None:
    from vae_ds import studies

    studies.print_metrics(arguments.runs, arguments.split)


def report(arguments: argparse.Namespace) -> None:
    from vae_ds import studies

    print(studies.report.write(arguments.runs, Path(arguments.to), arguments.split))
