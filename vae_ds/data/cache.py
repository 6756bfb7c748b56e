"""The cache of prepared text: its directory, and Arrow files that get their name only when they are complete."""

import ast
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
from datasets import Dataset

from vae_ds.data.progress import Progress
from vae_ds.errors import DataError

TEXT = pa.schema([("text", pa.large_string())])
LABELLED = pa.schema([*TEXT, pa.field("label", pa.string())])
_ROWS_A_BATCH = 10_000
_CHUNK_BYTES = 1 << 22
_NOTED_BYTES = 1 << 24  # smaller files are hashed again each time
_SETTLED_S = 2.0  # a file that is younger can still change without a change of its times


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


def code_digest(paths: Iterable[Path | str | None]) -> str:
    """Hash of Python files without their docstrings and comments, for the keys of texts that the code makes."""
    return digest(ast.dump(_WithoutDocstrings().visit(ast.parse(Path(str(path)).read_text("utf-8")))) for path in paths)


class _WithoutDocstrings(ast.NodeTransformer):
    """Remove each statement that is only a string."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_string = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_string else node


def write_rows(target: Path, rows: Iterator[tuple[Any, ...]], schema: pa.Schema = TEXT) -> None:
    """Stream rows into an Arrow file, which gets its name when it is complete. Raises DataError if writing fails."""

    def batches() -> Iterator[pa.RecordBatch]:
        while batch := list(islice(rows, _ROWS_A_BATCH)):
            columns = [pa.array(c, f.type) for c, f in zip(zip(*batch, strict=True), schema, strict=True)]
            yield pa.record_batch(columns, schema=schema)

    write_batches(target, batches(), schema)


def write_batches(target: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema = TEXT) -> None:
    """Stream batches of rows into an Arrow file like `write_rows`. Raises DataError if writing fails."""
    make_folder(target.parent)
    temporary = target.with_name(f".partial-{uuid4().hex}")
    try:
        with temporary.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        temporary.replace(target)
    except OSError as error:
        raise cache_error(target.parent, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a small file, which gets its name when it is complete. Raises DataError if writing fails."""
    make_folder(target.parent)
    temporary = target.with_name(f".partial-{uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
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
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file, Progress(f"Hashing {path.name}", path.stat().st_size, "B") as progress:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
            progress.add(len(chunk))
    return state.hexdigest()


def noted_hash(path: Path, notes: Path, read: Callable[[Path], str] | None = None) -> str:
    """The hash of a file by `read` (None: `hash_file`). That of a large file is kept in the folder `notes`.

    The name of a note is a hash of the path, the inode, the size and the times of the file. Each function `read` needs
    a folder of its own; it returns 32 hexadecimal digits. Raises OSError.
    """
    read = read or hash_file
    found = path.stat()
    if found.st_size < _NOTED_BYTES:
        return read(path)
    facts = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    note = notes / digest([str(path.absolute()), *map(str, facts)])
    with suppress(OSError, UnicodeDecodeError):
        kept = note.read_text("utf-8")
        if len(kept) == 32:
            return kept
    is_settled = time.time() - max(found.st_mtime, found.st_ctime) > _SETTLED_S
    made = read(path)
    if is_settled:
        with suppress(DataError):  # without a note, the next call reads the file again
            write_text(note, made)
    return made


def make_folder(folder: Path) -> None:
    """Create a folder of the cache if it does not exist. Raises DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cache_error(folder, error) from None
