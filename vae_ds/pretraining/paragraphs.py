"""Paragraphs of documentation for language-model pretraining, from the same packages as the `docstrings` corpus.

No sentence of the corpus' valid or test split is in a paragraph.
"""

from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from vae_ds.config import DataConfig
from vae_ds.data import corpora

docstrings, prose, splits = corpora.docstrings, corpora.prose, corpora.splits

PARAGRAPH_WORDS = 200  # maximum length of a paragraph, in words

Extract = tuple[str, list[list[tuple[str, str]]]]
"""What one file gives: its package, and the pairs of near-duplicate key and sentence of each paragraph."""


def paragraphs(data: DataConfig) -> Dataset:
    """Paragraphs of at most 200 words: column `text`, at most `data.limit` rows.

    Sentences whose near-duplicate key is in valid or test are removed. So are sentences with a part, as split by
    `prose.loose_sentences`, whose key is in valid or test. Raises DataError if the cache cannot be written.
    """
    folder = docstrings.prepared(data, "paragraphs", _paragraphs_of, _assemble, [__file__])
    rows = docstrings.open_rows(folder / "paragraphs")
    return rows if data.limit is None or data.limit >= len(rows) else rows.select(range(data.limit))


def _paragraphs_of(job: tuple[str, Path]) -> Extract:
    package, path = job
    every = (prose.sentences(block) for _, text in docstrings.texts_of(path) for block in prose.paragraphs(text))
    keyed = (
        [(splits.near_key(sentence), sentence) for sentence in found if prose.is_decent(sentence)] for found in every
    )
    blocks = [[pair for pair in found if not _held_out(*pair)] for found in keyed]
    return package, [block for block in blocks if block]


def _held_out(key: str, sentence: str) -> bool:
    if splits.split_of_key(key) != "train":
        return True
    pieces = [piece for piece in prose.loose_sentences(sentence) if len(piece.split()) >= prose.MIN_WORDS]
    return any(splits.split_of_key(splits.near_key(piece)) != "train" for piece in pieces)


def _assemble(extracts: list[Extract]) -> dict[str, list[str]]:
    """Paragraphs without repeated sentences, cut at sentence ends to at most PARAGRAPH_WORDS words."""
    seen: set[str] = set()
    rows: list[tuple[str, str]] = []
    for _, blocks in extracts:
        for block in blocks:
            fresh = []
            for key, sentence in block:
                if key not in seen:
                    seen.add(key)
                    fresh.append(sentence.replace(prose.CODE, ""))
            rows += [(docstrings.rank(text), text) for text in _pieces(fresh)]
    return {"paragraphs": [text for _, text in sorted(rows)]}


def _pieces(sentences: list[str]) -> Iterator[str]:
    held: list[str] = []
    words = 0
    for sentence in sentences:
        count = len(sentence.split())
        if held and words + count > PARAGRAPH_WORDS:
            yield " ".join(held)
            held, words = [], 0
        held.append(sentence)
        words += count
    if held:
        yield " ".join(held)
