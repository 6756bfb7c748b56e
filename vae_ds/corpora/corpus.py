"""What every loader returns: a named corpus of three splits, each a `datasets.Dataset` with a column `text`."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from vae_ds.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """Sentences by split (`train`, `valid`, `test`), column `text`; the fingerprint changes when the sentences do."""

    name: str
    fingerprint: str
    splits: dict[str, Dataset]


def digest(parts: Iterable[str]) -> str:
    """A hash of strings in order, 16 hexadecimal digits; no two lists share one by joining differently."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state.hexdigest()


def limited(rows: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows, or all of them."""
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


def cache_error(folder: Path, error: OSError) -> DataError:
    """What to say when a prepared corpus cannot be kept."""
    return DataError(f"{folder}: cannot write the cache ({error.strerror}); set data.cache_dir or $VAE_DS_CACHE")


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
