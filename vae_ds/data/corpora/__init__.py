"""Sources of text: docstrings, WordNet, a grammar, text files, and data sets of the hub or on disk."""

from collections.abc import Iterator
from pathlib import Path

from vae_ds.config import DataConfig
from vae_ds.data.corpora import dataset, delimited, docstrings, grammar, layouts, prose, splits, stream, text, wordnet
from vae_ds.data.corpora.corpus import LABEL, Corpus, labels_of
from vae_ds.data.corpora.delimited import Sentence
from vae_ds.data.corpora.findings import Findings
from vae_ds.data.corpora.naming import named
from vae_ds.data.corpora.splits import split_of
from vae_ds.data.corpora.stream import LineStream, open_stream

__all__ = [
    "LABEL",
    "Corpus",
    "LineStream",
    "Sentence",
    "check",
    "docstrings",
    "grammar",
    "labels_of",
    "load",
    "named",
    "open_stream",
    "prose",
    "read_file",
    "split_of",
    "splits",
]

_KINDS = {
    "docstrings": docstrings,
    "wordnet": wordnet,
    "grammar": grammar,
    "text": text,
    "dataset": dataset,
    **dict.fromkeys(layouts.LAYOUTS, layouts),
}


def load(data: DataConfig) -> Corpus:
    """Load the corpus of the settings, with at most the first `data.limit` sentences per split.

    The split `train` is missing if it is read as a stream (`open_stream`). Raises DataError. The message names the file
    and line, or says what to change.
    """
    return _KINDS[data.corpus].load(data)


def read_file(path: Path, column: str, label_column: str | None, labelled: bool) -> Iterator[Sentence]:
    """The sentences of a file of any format of the corpus `text`, with their labels. Blank lines are left out.

    column, label_column, labelled: as in the section `data` of a recipe. Raises DataError like `load`.
    """
    data = DataConfig(column=column, corpus="text", path=str(path), label_column=label_column, labelled=labelled)
    return delimited.read(path, data, Findings())


def check(data: DataConfig) -> None:
    """Raise DataError for every error that can be found without preparing the corpus."""
    if data.streaming:
        stream.check(data)
    _KINDS[data.corpus].check(data)
