"""`vae-ds evaluate`, `compare` and `report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_ds.cli.options import add_command, add_json, add_prior, add_run, add_split, count, positive, two_or_more
from vae_ds.errors import ConfigError
from vae_ds.runtime import evaluations, outlive_terminal, own_rank, records, run_dirs


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_command(
        subparsers,
        "evaluate",
        evaluate,
        "compute all metrics of a run on one split",
        "Writes RUN/eval-SPLIT.json, RUN/eval-SPLIT.safetensors with the values of each sentence, and prints a table.",
        [
            "vae-ds evaluate runs/demo-yardstick",
            "vae-ds evaluate runs/demo --yardstick runs/demo-yardstick",
        ],
    )
    add_run(parser, "a run directory, or an exported model together with --recipe")
    add_split(parser)
    add_json(parser, "the metrics as one JSON object instead of a table")
    parser.add_argument(
        "--iw-samples",
        type=positive,
        metavar="N",
        help="importance samples per sentence for iw_nll, each of which decodes the sentence once (default: "
        "evaluation.iw_samples of the recipe, 100 if it does not say)",
    )
    parser.add_argument(
        "--iw-sentences",
        type=positive,
        metavar="N",
        help="sentences for iw_nll, the first of the split (default: evaluation.iw_sentences of the recipe, 10,000 if "
        "it does not say; rec, kl and nelbo always take the whole split)",
    )
    parser.add_argument(
        "--mi-sentences",
        type=two_or_more,
        metavar="N",
        help="sentences for mi and mi_train (default: evaluation.mi_sentences of the recipe, 10,000 if it does not "
        "say)",
    )
    parser.add_argument(
        "--mi-train-sentences",
        type=count,
        metavar="N",
        help="training sentences for mi_train, 0 for none (default: evaluation.mi_train_sentences of the recipe, "
        "50,000 if it does not say)",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="most sentences per forward pass and rank (default: evaluation.batch of the recipe)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="most tokens per forward pass and rank, with padding (default: evaluation.tokens of the recipe, which "
        "bounds the logits if it does not say)",
    )
    parser.add_argument(
        "--bleu-sentences",
        type=count,
        metavar="N",
        help="sentences reconstructed for BLEU, 0 for none (default: evaluation.bleu_sentences of the recipe, 256 if "
        "it does not say)",
    )
    parser.add_argument(
        "--samples",
        type=count,
        metavar="N",
        help="prior samples for the text metrics, 0 for none (default: evaluation.samples of the recipe, 256 if it "
        "does not say)",
    )
    parser.add_argument(
        "--mauve",
        metavar="MODEL",
        help="compute MAUVE of the samples with features of `base` (the encoder of the base) or of a GPT-2 or BERT; "
        "needs --samples 2000 or more (default: evaluation.mauve of the recipe, none if it does not say)",
    )
    add_prior(parser)
    parser.add_argument("--recipe", help="the recipe whose data and settings are used (default: the recipe of the run)")
    parser.add_argument(
        "--yardstick",
        metavar="RUN",
        help="a run of a plain language model (injection `none`), evaluated on the same sentences, for "
        "above_yardstick, the cost of the code, and for lm_gain and forward_ppl (default: without these)",
    )

    parser = add_command(
        subparsers,
        "compare",
        compare,
        "print one table of evaluated runs, and their differences to the first run",
        "Reads the stored evaluations. The runs must be evaluated on the same sentences, cut in the same way by the "
        "same tokenizer. Differences are paired by sentence.",
        ["vae-ds compare runs/demo runs/demo-yardstick", "vae-ds compare runs"],
    )
    add_run(parser, "an evaluated run directory or model, or a directory of runs", name="runs", nargs="+")
    add_split(parser)
    add_json(parser, "one JSON object, the metrics and differences by run, instead of tables")

    parser = add_command(
        subparsers,
        "report",
        report,
        "write tables and figures of runs: Markdown, CSV, PNG, SVG",
        examples=["vae-ds report runs/demo runs/demo-yardstick --to report"],
    )
    add_run(parser, "a run directory, or a directory of runs such as a study", name="runs", nargs="+")
    parser.add_argument("--to", required=True, metavar="DIR", help="the directory of the report; its page is report.md")
    add_split(parser)
    parser.add_argument(
        "--paper",
        action="store_true",
        help="with the paper's tables (default: if a run is on ptb, snli, yahoo or yelp, or of the study `paper`)",
    )


def evaluate(arguments: argparse.Namespace) -> None:
    run, split = Path(arguments.run), arguments.split
    _check(run, arguments.recipe, arguments.yardstick, split)
    outlive_terminal(run)
    if own_rank() == "0":
        # The libraries take seconds to load.
        print(f"evaluating {run} on the {split} split", file=sys.stderr, flush=True)
    from vae_ds.evaluation import finished_run

    settings = {
        "iw_samples": arguments.iw_samples,
        "iw_sentences": arguments.iw_sentences,
        "mi_sentences": arguments.mi_sentences,
        "mi_train_sentences": arguments.mi_train_sentences,
        "batch": arguments.batch,
        "tokens": arguments.tokens,
        "bleu_sentences": arguments.bleu_sentences,
        "samples": arguments.samples,
        "mauve": arguments.mauve,
    }
    metrics = finished_run.evaluate_run(
        run, split, settings, recipe=arguments.recipe, yardstick=arguments.yardstick, prior=arguments.prior
    )
    if metrics is not None:
        from vae_ds import studies, training

        training.tensorboard.record_evaluation(run, split, metrics)
        if arguments.json:
            print(records.strict_json(metrics))
        else:
            studies.print_metrics([run], split, units=True)


def _check(run: Path, recipe: str | None, yardstick: str | None, split: str) -> None:
    """Check the directories and recipes that `evaluate` needs, before torch is loaded. Raises UserError."""
    from vae_ds import config as configuration

    run_dirs.model_of(run)
    run_dirs.check_not_shipped(run)
    if recipe is not None:
        configuration.load(configuration.RunConfig, recipe)
    elif not run_dirs.is_run(run):
        raise ConfigError(f"{run} is an exported model, which has no data settings; select the data with --recipe")
    if yardstick is not None:
        run_dirs.model_of(Path(yardstick))
        run_dirs.evaluated_in([yardstick], split)
        evaluations.read_values(Path(yardstick), split)


def compare(arguments: argparse.Namespace) -> None:
    from vae_ds import studies

    paths, missing = run_dirs.evaluated_in(arguments.runs, arguments.split)
    if arguments.json:
        print(records.strict_json(studies.with_differences(paths, arguments.split)))
        return
    studies.print_metrics(paths, arguments.split)
    if missing:
        print(f" not evaluated on the {arguments.split} split: {', '.join(map(str, missing))}")


def report(arguments: argparse.Namespace) -> None:
    run_dirs.runs_in(arguments.runs)
    write_report(arguments.runs, Path(arguments.to), arguments.split, with_paper=arguments.paper)


def write_report(runs: Sequence[str | Path], folder: Path, split: str = "test", with_paper: bool = False) -> None:
    """Write a report and show its figures in TensorBoard as the run `folder`. Prints the path of its page."""
    from vae_ds import studies, training

    print(studies.report.write(runs, folder, split, with_paper=with_paper))
    figures = studies.report.figures_of(folder)
    if not figures:
        return
    training.tensorboard.add_figures(folder, {f"report/{title}": file for title, file in figures.items()})
