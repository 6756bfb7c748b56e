"""The result of every loader: a named corpus of three splits, each a `datasets.Dataset` with a column `text`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, Dataset
from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

LABEL = "label"  # the column of the labels


@dataclass(frozen=True)
class Corpus:
    """Sentences by split (`train`, `valid`, `test`), column `text`. The fingerprint changes when the sentences change.

    If the settings name labels, the splits have a column `label` as well, which does not change the fingerprint.

    `facts`: values known about the source besides its text, ready for JSON. See `grammar.load` for an example.
    """

    name: str
    fingerprint: str
    splits: dict[str, Dataset]
    facts: Mapping[str, Any] = field(default_factory=dict)


def labels_of(rows: Dataset, column: str = LABEL) -> list[str | None]:
    """The labels of rows as text, None for a row without one. A number of a ClassLabel becomes its name."""
    kind, values = rows.features[column], rows[column][:]
    if isinstance(kind, ClassLabel):
        # A row without a label has -1 by convention.
        values = [None if value is None or value < 0 else kind.int2str(value) for value in values]
    return [None if value is None else str(value).strip() or None for value in values]


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
