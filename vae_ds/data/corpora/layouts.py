"""The corpora `ptb`, `snli`, `yahoo` and `yelp`: the text files of Optimus, or the data set of the hub.

Optimus (Li et al. 2020) stores each corpus as a directory with train.txt, valid.txt and test.txt. In Yahoo and Yelp, a
label and a tab precede the text. The paper's numbers are on these files. The data sets of the hub have the same sources
but contain other sentences: the Optimus files of SNLI, Yahoo and Yelp are samples of about 100 thousand sentences.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from vae_ds.config import SPLITS, DataConfig
from vae_ds.data.corpora import dataset, text, text_files
from vae_ds.data.corpora.corpus import Corpus
from vae_ds.errors import DataError


@dataclass(frozen=True)
class Layout:
    """Whether the Optimus files have labels, and the data set of the hub: name, column, splits, revision."""

    labelled: bool
    hub: str
    column: str
    splits: dict[str, str]
    revision: str | None = None


_THREE = {"train": "train", "valid": "validation", "test": "test"}
# Two data sets of the hub have no validation split: use the last 10,000 rows of the training split.
_TWO = {"train": "train[:-10000]", "valid": "train[-10000:]", "test": "test"}
LAYOUTS = {
    # The main branch has a loading script but no data files; the hub's automatic conversion has data files.
    "ptb": Layout(False, "ptb-text-only/ptb_text_only", "sentence", _THREE, "refs/convert/parquet"),
    "snli": Layout(False, "stanfordnlp/snli", "hypothesis", _THREE),
    "yahoo": Layout(True, "community-datasets/yahoo_answers_topics", "best_answer", _TWO),
    "yelp": Layout(True, "Yelp/yelp_review_full", "text", _TWO),
}


def load(data: DataConfig) -> Corpus:
    """Load the sentences from the directory `data.path` or the hub. Raises DataError like `text` and `dataset`."""
    known = settings(data)
    return replace((text if known.corpus == "text" else dataset).load(known), name=data.corpus)


def check(data: DataConfig) -> None:
    """Run the checks of `text` or `dataset`. Raises DataError."""
    known = settings(data)
    (text if known.corpus == "text" else dataset).check(known)


def settings(data: DataConfig) -> DataConfig:
    """Settings of the same source as a `text` or `dataset` corpus. Raises DataError if `data.path` is no directory."""
    layout = LAYOUTS[data.corpus]
    of_hub = {"column": layout.column, "splits": layout.splits, "subset": None}
    if not data.path:
        return data.model_copy(update={**of_hub, "corpus": "dataset", "path": layout.hub, "revision": layout.revision})
    folder = Path(data.path).expanduser()
    kind = text_files.kind_of(folder)
    if kind != "directory":
        found = "no such directory" if kind == "nothing" else f"is a {kind}"
        raise DataError(
            f"{data.path}: {found}; data.path is a directory with train.txt, valid.txt and test.txt in the layout of"
            f" Optimus for {data.corpus}, or a copy of {layout.hub}; leave data.path out to load it from the hub"
        )
    names = [f"{name}{end}" for names in text_files.NAMES.values() for name in names for end in text_files.PLAIN]
    if any(text_files.kind_of(folder / name) != "nothing" for name in names):
        return data.model_copy(update={**dict.fromkeys(SPLITS), "corpus": "text", "labelled": layout.labelled})
    return data.model_copy(update={**of_hub, "corpus": "dataset", "revision": None})
