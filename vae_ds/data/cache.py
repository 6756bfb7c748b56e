"""The cache of prepared text: its directory, and Arrow files that get their name only when they are complete."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
from datasets import Dataset

from vae_ds.errors import DataError

TEXT = pa.schema([("text", pa.large_string())])
_ROWS_A_BATCH = 10_000


def cache_dir(configured: str | None = None) -> Path:
    """Directory of the prepared corpora: the setting, else $VAE_DS_CACHE, else ~/.cache/vae_ds."""
    chosen = configured or os.environ.get("VAE_DS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vae_ds"


def cache_error(folder: Path, error: OSError) -> DataError:
    """The error for a prepared corpus that cannot be written to the cache."""
    return DataError(f"{folder}: cannot write the cache ({error.strerror}); set data.cache_dir or $VAE_DS_CACHE")


def digest(parts: Iterable[str]) -> str:
    """Hash of a list of strings, 16 hexadecimal digits. The length of each string is hashed too.

    Lists that differ only in where the strings are separated therefore have different hashes.
    """
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state.hexdigest()


def write_rows(target: Path, rows: Iterator[tuple[Any, ...]], schema: pa.Schema = TEXT) -> None:
    """Stream rows into an Arrow file, which gets its name when it is complete. Raises DataError if writing fails."""
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
    """Rows of a file of `write_rows`, memory-mapped. Raises DataError if the file is broken."""
    try:
        return Dataset.from_file(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: the cached corpus is broken ({error}); delete it") from None


def hash_file(path: Path) -> str:
    """Hash of the bytes of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def make_folder(folder: Path) -> None:
    """Create a folder of the cache if it does not exist. Raises DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cache_error(folder, error) from None
