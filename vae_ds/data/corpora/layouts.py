"""The corpora `ptb`, `snli`, `yahoo` and `yelp`: Optimus' text files, or the hub's data set of that name.

Optimus (Li et al. 2020) lays each out as a directory of train.txt, valid.txt and test.txt, where Yahoo and Yelp have a
label and a tab before the text; the paper's numbers are on those. The hub's sets come from the same sources, but hold
other sentences: of SNLI, Yahoo and Yelp, Optimus has samples of about 100 thousand.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from vae_ds.config import SPLITS, DataConfig
from vae_ds.data.corpora import dataset, text
from vae_ds.data.corpora.corpus import Corpus
from vae_ds.errors import DataError


@dataclass(frozen=True)
class Layout:
    """Whether Optimus' files have labels, and where on the hub the text is: name, revision, column, splits."""

    labelled: bool
    hub: str
    column: str
    splits: dict[str, str]
    revision: str | None = None


_THREE = {"train": "train", "valid": "validation", "test": "test"}
# Two sets of the hub have no validation split: the last rows of the training split take its place, 10,000 of them.
_TWO = {"train": "train[:-10000]", "valid": "train[-10000:]", "test": "test"}
LAYOUTS = {
    # Its main branch has a loading script and no data; the hub's own conversion has.
    "ptb": Layout(False, "ptb-text-only/ptb_text_only", "sentence", _THREE, "refs/convert/parquet"),
    "snli": Layout(False, "stanfordnlp/snli", "hypothesis", _THREE),
    "yahoo": Layout(True, "community-datasets/yahoo_answers_topics", "best_answer", _TWO),
    "yelp": Layout(True, "Yelp/yelp_review_full", "text", _TWO),
}


def load(data: DataConfig) -> Corpus:
    """The sentences, from the directory `data.path` or from the hub. Raises DataError as `text` and `dataset` do."""
    known = settings(data)
    return replace((text if known.corpus == "text" else dataset).load(known), name=data.corpus)


def check(data: DataConfig) -> None:
    """Check what `text` or `dataset` checks. Raises DataError."""
    known = settings(data)
    (text if known.corpus == "text" else dataset).check(known)


def settings(data: DataConfig) -> DataConfig:
    """The same source as a `text` or `dataset` corpus. Raises DataError if `data.path` is neither's directory."""
    layout = LAYOUTS[data.corpus]
    there = {"column": layout.column, "splits": layout.splits, "subset": None}
    if not data.path:
        return data.model_copy(update={**there, "corpus": "dataset", "path": layout.hub, "revision": layout.revision})
    folder = Path(data.path).expanduser()
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such directory"
        raise DataError(
            f"{data.path}: {found}; data.path is a directory with train.txt, valid.txt and test.txt as Optimus lays out"
            f" {data.corpus}, or a copy of the hub's {layout.hub}; leave it out to load that from the hub"
        )
    if any((folder / f"{name}.txt").is_file() for names in text.NAMES.values() for name in names):
        return data.model_copy(update={**dict.fromkeys(SPLITS), "corpus": "text", "labelled": layout.labelled})
    return data.model_copy(update={**there, "corpus": "dataset", "revision": None})
