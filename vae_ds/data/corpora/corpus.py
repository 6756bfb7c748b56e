"""The result of every loader: a named corpus of three splits, each a `datasets.Dataset` with a column `text`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@dataclass(frozen=True)
class Corpus:
    """Sentences by split (`train`, `valid`, `test`), column `text`. The fingerprint changes when the sentences change.

    `facts`: values known about the source besides its text, ready for JSON. See `grammar.load` for an example.
    """

    name: str
    fingerprint: str
    splits: dict[str, Dataset]
    facts: Mapping[str, Any] = field(default_factory=dict)


def limited(rows: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows, or all rows if `limit` is None."""
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Disable the progress bars of the datasets library, which show steps that do not matter to the user."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
