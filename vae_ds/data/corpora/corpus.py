"""What every loader returns: a named corpus of three splits, each a `datasets.Dataset` with a column `text`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@dataclass(frozen=True)
class Corpus:
    """Sentences by split (`train`, `valid`, `test`), column `text`; the fingerprint changes when the sentences do.

    `facts`: what is known of the source beyond its text, as JSON has it; `grammar` says what its are.
    """

    name: str
    fingerprint: str
    splits: dict[str, Dataset]
    facts: Mapping[str, Any] = field(default_factory=dict)


def limited(rows: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows, or all of them."""
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hold back the bars that the datasets library draws for steps of no interest to the user."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
