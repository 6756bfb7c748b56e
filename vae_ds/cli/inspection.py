"""`vae-ds probe`: what the code of a trained model tells about texts."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ds.cli.options import SPLITS, positive
from vae_ds.cli.using import add_seed, add_using, check_run, lined_warnings, load
from vae_ds.errors import ConfigError, DataError
from vae_ds.runtime import run_dirs

if TYPE_CHECKING:
    from vae_ds.inspection import Labelled

ARRAYS = (".csv", ".tsv", ".jsonl", ".parquet")


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_using(
        subparsers,
        "probe",
        probe,
        "classify texts from their codes, beside bag-of-words and T5 baselines",
        [
            "vae-ds probe runs/demo",
            "vae-ds probe runs/demo --labels reviews.csv --label-column stars",
        ],
        "Targets are the label, length and first word; on the grammar corpus also its factors, with MIG, DCI and SAP.",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="texts with labels: lines of label, tab, text, or .csv, .tsv, .jsonl, .parquet (default: the run's split)",
    )
    add_columns(parser)
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="the split of the run, without --labels (default: %(default)s)"
    )
    add_most(parser, 5000)
    add_seed(parser)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add `--column` and `--label-column`."""
    parser.add_argument(
        "--column", default="text", metavar="NAME", help="the column with the text (default: %(default)s)"
    )
    parser.add_argument("--label-column", metavar="NAME", help="the column with the label (default: label)")


def add_most(parser: argparse.ArgumentParser, most: int) -> None:
    """Add `--sentences`."""
    parser.add_argument(
        "--sentences",
        type=positive,
        default=most,
        metavar="N",
        help="most texts to use, drawn at random (default: %(default)s)",
    )


def texts_of(arguments: argparse.Namespace, file: str, with_labels: bool = True) -> Labelled:
    """The texts of a file, of its columns or of lines of label, tab, text; without labels, of plain lines."""
    from vae_ds.inspection import targets

    has_columns = _has_columns(file)
    if not has_columns and (arguments.label_column or arguments.column != "text"):
        raise ConfigError(f"{file}: has no columns; leave --column and --label-column out")
    column = arguments.label_column or ("label" if with_labels and has_columns else None)
    return targets.of_file(
        Path(file),
        column=arguments.column,
        label_column=column,
        labelled=with_labels and not has_columns,
        most=arguments.sentences,
        seed=arguments.seed,
    )


def probe(arguments: argparse.Namespace) -> None:
    check_run(arguments)
    if arguments.labels is None and not run_dirs.is_run(Path(arguments.run)):
        raise ConfigError(f"{arguments.run} is an exported model, which has no texts of its own; give --labels FILE")
    if arguments.labels is not None and not Path(arguments.labels).is_file():
        raise DataError(f"{arguments.labels}: no such file")
    from vae_ds.inspection import disentanglement, probes, targets

    if arguments.labels is None:
        labelled = targets.of_run(Path(arguments.run), arguments.split, arguments.sentences, arguments.seed)
    else:
        labelled = texts_of(arguments, arguments.labels)
    vae = load(arguments)
    with lined_warnings():
        found = probes.probe(vae, targets.with_form(labelled), arguments.seed)
        apart = None
        if len(labelled.factors) > 1:
            apart = disentanglement.scores(vae.encode(labelled.texts).numpy(), labelled, arguments.seed)
    if arguments.json:
        facts = {"probes": [asdict(one) for one in found], "disentanglement": apart and asdict(apart)}
        print(json.dumps(facts | {"model": vae.fingerprint, "seed": arguments.seed}))
        return
    print(probes.table(found))
    if apart is not None:
        print(f"\n{disentanglement.table(apart)}")
    left = [name for name in labelled.targets if name not in {one.target for one in found}]
    if left:
        print(f"left out, with fewer than two classes: {', '.join(left)}", file=sys.stderr)


def _has_columns(file: str) -> bool:
    name = file.lower().removesuffix(".gz").removesuffix(".zst")
    return name.endswith(ARRAYS)
