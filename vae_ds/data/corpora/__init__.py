"""Sources of text: docstrings, WordNet, a grammar, text files, and data sets of the hub or on disk."""

from vae_ds.config import DataConfig
from vae_ds.data.corpora import dataset, docstrings, grammar, layouts, prose, splits, stream, text, wordnet
from vae_ds.data.corpora.corpus import Corpus
from vae_ds.data.corpora.naming import named
from vae_ds.data.corpora.splits import split_of
from vae_ds.data.corpora.stream import LineStream, open_stream

__all__ = [
    "Corpus",
    "LineStream",
    "check",
    "docstrings",
    "grammar",
    "load",
    "named",
    "open_stream",
    "prose",
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


def check(data: DataConfig) -> None:
    """Raise DataError for every error that can be found without preparing the corpus."""
    if data.streaming:
        stream.check(data)
    _KINDS[data.corpus].check(data)
