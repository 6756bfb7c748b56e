"""What every loader returns: a named corpus of three splits, each a `datasets.Dataset` with a column `text`."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
from datasets import Dataset
from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from vae_ds.errors import DataError
from vae_ds.runtime import cache_error

TEXT = pa.schema([("text", pa.large_string())])
_ROWS_A_BATCH = 10_000


@dataclass(frozen=True)
class Corpus:
    """Sentences by split (`train`, `valid`, `test`), column `text`; the fingerprint changes when the sentences do.

    `facts`: what is known of the source beyond its text, as JSON has it; `grammar` says what its are.
    """

    name: str
    fingerprint: str
    splits: dict[str, Dataset]
    facts: Mapping[str, Any] = field(default_factory=dict)


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


def write_rows(target: Path, rows: Iterator[tuple[Any, ...]], schema: pa.Schema = TEXT) -> None:
    """Stream rows into an Arrow file that appears under its name only when whole. Raises DataError: no room for it."""
    make_folder(target.parent)
    temporary = target.with_name(f".partial-{uuid4().hex}")
    try:
        with temporary.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
            while batch := list(islice(rows, _ROWS_A_BATCH)):
                columns = [pa.array(c, f.type) for c, f in zip(zip(*batch, strict=True), schema, strict=True)]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        temporary.replace(target)
    except OSError as error:
        raise cache_error(target.parent, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_rows(path: Path) -> Dataset:
    """The rows of such a file, memory-mapped. Raises DataError if it is broken."""
    try:
        return Dataset.from_file(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: the cached corpus is broken ({error}); delete it") from None


def hash_file(path: Path) -> str:
    """A hash of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder of the cache, if it is not there. Raises DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cache_error(folder, error) from None


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
