"""The `text` corpus: three UTF-8 files, one sentence a line, or Optimus' layout of label, tab and text a line.

Lines are checked while they stream into an Arrow file in the cache, named by a hash of the bytes read, so a large
corpus is read into memory by nobody and checked once.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
from datasets import Dataset

from vae_ds.corpora.corpus import Corpus, cache_error, digest, limited
from vae_ds.errors import DataError
from vae_ds.runtime import cache_dir
from vae_ds.settings import SPLITS, DataConfig

NAMES = {
    "train": ("train.txt",),
    "valid": ("valid.txt", "dev.txt", "validation.txt", "val.txt"),
    "test": ("test.txt",),
}
_ROWS_A_BATCH = 10_000
_SCHEMA = pa.schema([("text", pa.large_string())])
_LAYOUT = "1"  # of the cached files


def load(data: DataConfig) -> Corpus:
    """The sentences of the three files, in file order.

    Raises DataError with file and line: a missing or empty file, a line that is not UTF-8 or has no text, or a
    labelled line without a tab.
    """
    files = find(data)
    hashes = {split: _hash(path) for split, path in files.items()}
    rows = {split: limited(_rows(path, hashes[split], data), data.limit) for split, path in files.items()}
    facts = [_LAYOUT, str(data.labelled), str(data.limit), *(hashes[split] for split in SPLITS)]
    return Corpus("text", digest(facts), rows)


def check(data: DataConfig) -> None:
    """Check all three files to their last line; memory does not grow with them. Raises DataError as `load` does."""
    for path in find(data).values():
        for _ in read_lines(path, data.labelled):
            pass


def find(data: DataConfig) -> dict[str, Path]:
    """The file of each split. Raises DataError that says which file is missing and what to do."""
    folder = Path(data.path).expanduser() if data.path else None
    if folder and not folder.is_dir() and not (data.train and data.valid and data.test):
        found = "a file" if folder.exists() else "no such directory"
        raise DataError(
            f"{folder}: {found}; data.path is a directory with train.txt, valid.txt and test.txt. For a data set of the"
            " hub: --set data.corpus=dataset data.path=NAME data.column=COLUMN"
        )
    return {split: _file(folder, split, getattr(data, split)) for split in SPLITS}


def _file(folder: Path | None, split: str, named: str | None) -> Path:
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise DataError(f"{path}: no such file; data.{split} names it")
        return path
    assert folder is not None  # the settings ask for `path` where a split is not named
    for name in NAMES[split]:
        if (folder / name).is_file():
            return folder / name
    wanted = " or ".join(NAMES[split])
    raise DataError(f"{folder}: no {wanted}; add it, one sentence a line, or set data.{split} to a file")


def read_lines(path: Path, labelled: bool) -> Iterator[str]:
    """The sentences of a file, white space at their ends removed. Raises DataError with file and line."""
    number = blank = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = _decoded(line, path, number)
                if not text.strip():
                    blank = blank or number
                    continue
                if blank:
                    raise DataError(f"{path}:{blank}: a line without text; remove it")
                yield _without_label(text, path, number) if labelled else text.strip()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if number == 0 or blank == 1:
        raise DataError(f"{path}: empty; write one sentence a line")


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        # Windows editors put a byte-order mark in front of the first line.
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line; convert the file") from None


def _without_label(line: str, path: Path, number: int) -> str:
    label, tab, text = line.partition("\t")
    if not tab:
        raise DataError(
            f"{path}:{number}: no tab; data.labelled expects label, tab, text (found {label.strip()[:40]!r})"
        )
    if not text.strip():
        raise DataError(f"{path}:{number}: no text after the label and the tab")
    return text.strip()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _rows(path: Path, content: str, data: DataConfig) -> Dataset:
    root = cache_dir(data.cache_dir) / "text"
    cached = root / f"{digest([_LAYOUT, content, str(data.labelled)])}.arrow"
    if not cached.is_file():
        _write(cached, read_lines(path, data.labelled))
    return Dataset.from_file(str(cached))


def _write(target: Path, lines: Iterator[str]) -> None:
    """Stream lines into an Arrow file that appears under its name only when whole."""
    temporary = target.with_name(f".partial-{uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
            while batch := list(islice(lines, _ROWS_A_BATCH)):
                writer.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema=_SCHEMA))
        temporary.replace(target)
    except OSError as error:
        raise cache_error(target.parent, error) from None
    finally:
        temporary.unlink(missing_ok=True)
