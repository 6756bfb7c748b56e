"""`vae-ds probe`, `map`, `sample-label`, `shift-label` and `explore`: what the code of a model tells about texts."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ds.cli.options import SPLITS, count, positive
from vae_ds.cli.text_output import Output, add_output, check_output
from vae_ds.cli.using import add_decoding, add_seed, add_using, check_run, decoding_of, lined_warnings, load
from vae_ds.errors import ConfigError, DataError
from vae_ds.runtime import run_dirs

if TYPE_CHECKING:
    from vae_ds.inspection import Labelled

ARRAYS = (".csv", ".tsv", ".jsonl", ".parquet")
PICTURES = (".png", ".svg", ".pdf")


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
    add_labels(parser)
    add_split(parser, "--labels")
    add_most(parser, 5000)
    add_seed(parser)

    parser = add_using(
        subparsers,
        "map",
        draw,
        "draw the codes of texts, a grid of texts between them, and what part of a text they decide",
        [
            "vae-ds map runs/demo --to map.png",
            "vae-ds map runs/demo reviews.csv --label-column stars --to map.png --projector projector",
        ],
        "Writes NAME.png, NAME-grid.png, NAME-positions.png, for a run NAME-units.png, and NAME.json with the numbers.",
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="texts, one per line, or .csv, .tsv, .jsonl, .parquet (default: the run's split)",
    )
    parser.add_argument("--to", required=True, metavar="NAME.png", help="the picture: .png, .svg or .pdf")
    add_columns(parser, "without labels")
    parser.add_argument("--labelled", action="store_true", help="the lines of FILE are label, tab, text")
    parser.add_argument(
        "--colour",
        metavar="TARGET",
        help="what colours the map: label, length, first word, or a factor of the grammar (default: the label, if any)",
    )
    parser.add_argument("--umap", action="store_true", help="UMAP instead of PCA")
    parser.add_argument(
        "--projector", metavar="DIR", help="also write codes, texts and targets for TensorBoard's projector"
    )
    add_split(parser, "FILE")
    add_most(parser, 5000)
    add_seed(parser)

    parser = add_using(
        subparsers,
        "sample-label",
        sample_label,
        "write texts of a label, from a Gaussian on the codes of texts with this label",
        [
            "vae-ds sample-label runs/demo --labels reviews.csv --label-column stars --label 5 -n 4",
            "vae-ds sample-label runs/demo --labels reviews.csv --label-column stars --score 200",
        ],
        "Nothing is trained. --score says how often a classifier finds the label, and how diverse the texts are.",
    )
    add_labels(parser)
    add_split(parser, "--labels", "train")
    add_target(parser)
    parser.add_argument("--label", action="append", metavar="VALUE", help="a value; can be repeated (default: all)")
    parser.add_argument(
        *("-n", "--number"), type=positive, default=4, metavar="N", help="texts of each value (default: %(default)s)"
    )
    parser.add_argument(
        "--score", type=positive, metavar="N", help="print scores of N texts of each value, and no texts"
    )
    add_most(parser, 20000)
    add_decoding(parser)
    add_output(parser)

    parser = add_using(
        subparsers,
        "shift-label",
        shift_label,
        "score shifts of texts from one label to another",
        [
            "vae-ds shift-label runs/demo --labels reviews.csv --label-column stars --from 1 --into 5",
            "vae-ds shift-label runs/grammar --target tense --from present --into past --factor 1 --factor 2",
        ],
        "How often a classifier finds the new label, and BLEU to the source. Needs the extra look.",
    )
    add_labels(parser)
    add_split(parser, "--labels", "train")
    add_target(parser)
    parser.add_argument("--from", dest="start", required=True, metavar="VALUE", help="the label of the texts to shift")
    parser.add_argument("--into", required=True, metavar="VALUE", help="the label that they should get")
    parser.add_argument(
        "--factor",
        type=float,
        action="append",
        metavar="X",
        help="how many times the difference of the mean codes; can be repeated (default: 0.5, 1, 1.5 and 2)",
    )
    parser.add_argument(
        *("-n", "--number"), type=positive, default=200, metavar="N", help="most texts to shift (default: %(default)s)"
    )
    add_most(parser, 20000)
    add_decoding(parser)

    parser = add_using(
        subparsers,
        "explore",
        explore,
        "open a local page to type sentences, move units, interpolate, mix, sample and see neighbours",
        ["vae-ds explore runs/demo", "vae-ds explore runs/demo --corpus reviews.csv --label-column stars"],
        "The page needs no network. It listens on this machine only, unless --host says otherwise. Ctrl-C ends it.",
    )
    parser.add_argument(
        "--corpus",
        metavar="FILE",
        help="texts of the map and the neighbours, one per line, or .csv, .tsv, .jsonl, .parquet (default: the run's"
        " split; an export has none)",
    )
    add_columns(parser, "without labels")
    parser.add_argument("--labelled", action="store_true", help="the lines of the corpus are label, tab, text")
    add_split(parser, "--corpus")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="the address to listen on (default: %(default)s)"
    )
    parser.add_argument("--port", type=count, default=8317, metavar="N", help="0 for a free one (default: %(default)s)")
    add_most(parser, 2000)
    add_seed(parser)


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Add `--labels` and its columns."""
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="texts with labels: lines of label, tab, text, or .csv, .tsv, .jsonl, .parquet (default: the run's split)",
    )
    add_columns(parser)


def add_columns(parser: argparse.ArgumentParser, default: str = "label") -> None:
    """Add `--column` and `--label-column`."""
    parser.add_argument(
        "--column", default="text", metavar="NAME", help="the column with the text (default: %(default)s)"
    )
    parser.add_argument("--label-column", metavar="NAME", help=f"the column with the label (default: {default})")


def add_split(parser: argparse.ArgumentParser, without: str, default: str = "test") -> None:
    """Add `--split`, which is used if the argument `without` is not given."""
    words = f"the split of the run, without {without} (default: %(default)s)"
    parser.add_argument("--split", choices=SPLITS, default=default, help=words)


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add `--target`."""
    parser.add_argument(
        "--target",
        default="label",
        metavar="NAME",
        help="label, length, first word, or a factor of the grammar (default: %(default)s)",
    )


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


def labelled_of(arguments: argparse.Namespace) -> Labelled:
    """The texts of `--labels` or of the run's split, with the targets of their form."""
    from vae_ds.inspection import targets

    if arguments.labels is None:
        found = targets.of_run(Path(arguments.run), arguments.split, arguments.sentences, arguments.seed)
    else:
        found = texts_of(arguments, arguments.labels)
    return targets.with_form(found)


def source_of(arguments: argparse.Namespace, file: str | None, option: str) -> None:
    """Check that there is a source of texts, before torch is loaded. `option` names the file to give."""
    check_run(arguments)
    if file is None and not run_dirs.is_run(Path(arguments.run)):
        raise ConfigError(f"{arguments.run} is an exported model, which has no texts of its own; give {option}")
    if file is not None and not Path(file).is_file():
        raise DataError(f"{file}: no such file")


def probe(arguments: argparse.Namespace) -> None:
    source_of(arguments, arguments.labels, "--labels FILE")
    from vae_ds.inspection import disentanglement, probes

    labelled, vae = labelled_of(arguments), load(arguments)
    with lined_warnings():
        found = probes.probe(vae, labelled, arguments.seed)
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


def draw(arguments: argparse.Namespace) -> None:
    path = Path(arguments.to)
    if path.suffix.lower() not in PICTURES:
        raise ConfigError(f"--to {path}: the ending must be one of {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--to {path}: {path.parent} is no directory")
    run_dirs.check_writable(path.parent, "--to")
    if arguments.projector is not None:
        run_dirs.check_writable(Path(arguments.projector), "--projector")
    source_of(arguments, arguments.file, "a FILE of texts")
    from vae_ds.inspection import mapping, targets

    if arguments.file is None:
        labelled = targets.of_run(Path(arguments.run), arguments.split, arguments.sentences, arguments.seed)
    else:
        labelled = texts_of(arguments, arguments.file, arguments.labelled)
    wanted = mapping.Wanted(path, arguments.colour, arguments.umap, arguments.projector, arguments.seed)
    labelled = targets.with_form(labelled)
    wanted.check(labelled)
    with lined_warnings():
        facts = mapping.draw_all(load(arguments), labelled, wanted, Path(arguments.run))
    print(json.dumps(facts) if arguments.json else "\n".join(facts["files"]))


def sample_label(arguments: argparse.Namespace) -> None:
    source_of(arguments, arguments.labels, "--labels FILE")
    check_output(arguments)
    if arguments.score and arguments.to:
        raise ConfigError("--score prints no texts; leave --to or --score out")
    from vae_ds.inspection import by_label

    labelled = labelled_of(arguments)
    vae, decoding = load(arguments), decoding_of(arguments)
    with lined_warnings():
        gaussians = by_label.chosen(by_label.fit(vae, labelled, arguments.target), arguments.label)
        if arguments.score:
            found = by_label.score(vae, labelled, arguments.target, gaussians, arguments.score, **decoding)
            if arguments.json:
                names = {"classifier_accuracy": found[0], "classifier_accuracy_se": found[1]}
                print(json.dumps(names | {"labels": [asdict(one) for one in found[2]], "model": vae.fingerprint}))
            else:
                print(by_label.table(*found))
            return
        with Output(arguments) as output:
            for one in gaussians:
                for text in vae.decode(one.draw(arguments.number, arguments.seed), **decoding):
                    output.row(f"{one.label}\t{text}", {"label": one.label, "text": text})


def shift_label(arguments: argparse.Namespace) -> None:
    source_of(arguments, arguments.labels, "--labels FILE")
    from vae_ds.inspection import shifts

    labelled, vae = labelled_of(arguments), load(arguments)
    ends, factors = (arguments.start, arguments.into), arguments.factor or [0.5, 1, 1.5, 2]
    with lined_warnings():
        found = shifts.score(
            vae, labelled, arguments.target, *ends, factors, arguments.number, **decoding_of(arguments)
        )
    print(json.dumps(asdict(found) | {"model": vae.fingerprint}) if arguments.json else shifts.table(found))


def explore(arguments: argparse.Namespace) -> None:
    check_run(arguments)
    is_run = run_dirs.is_run(Path(arguments.run))
    if arguments.corpus is not None:
        source_of(arguments, arguments.corpus, "")
    from vae_ds.data import corpora
    from vae_ds.inspection import server, targets

    labelled = targets.Labelled([])
    if arguments.corpus is not None:
        labelled = texts_of(arguments, arguments.corpus, arguments.labelled)
    elif is_run:
        labelled = targets.of_run(Path(arguments.run), arguments.split, arguments.sentences, arguments.seed)
    with lined_warnings():
        explorer = server.Explorer(
            load(arguments), labelled.texts, labelled.targets.get(corpora.LABEL), Path(arguments.run).name
        )
    with server.Server(explorer, arguments.host, arguments.port) as page:
        if not page.is_local:
            print("warning: whoever reaches this address can use the model; there is no password", file=sys.stderr)
        print(json.dumps({"url": page.url}) if arguments.json else f"{page.url}  (Ctrl-C ends)", flush=True)
        # The end that the user wants is no interruption.
        with suppress(KeyboardInterrupt):
            page.serve_forever()


def _has_columns(file: str) -> bool:
    name = file.lower().removesuffix(".gz").removesuffix(".zst")
    return name.endswith(ARRAYS)
