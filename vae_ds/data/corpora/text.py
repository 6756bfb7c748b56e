"""The `text` corpus: three UTF-8 files of plain text, labelled text (label, tab, text), CSV, TSV or JSON lines.

The lines are checked while they are written to an Arrow file in the cache. The name of that file is a hash of the
source. Thus a large corpus is never read into memory, and is checked once.
"""

from pathlib import Path

from datasets import Dataset

from vae_ds.config import SPLITS, DataConfig
from vae_ds.data.cache import cache_dir, digest, hash_file, read_rows, write_rows
from vae_ds.data.corpora import delimited
from vae_ds.data.corpora.corpus import Corpus, limited
from vae_ds.errors import DataError

NAMES = {"train": ("train",), "valid": ("valid", "dev", "validation", "val"), "test": ("test",)}
_SUFFIXES = (".txt", *delimited.SUFFIXES)
_LAYOUT = "1"  # version of the cached files


def load(data: DataConfig) -> Corpus:
    """Load the sentences of the three files, in file order; without the training file if it is read as a stream.

    Raises DataError for a missing or empty file and, with file and line, for every error of `delimited.read`.
    """
    files = find(data)
    if data.streaming:
        del files["train"]
    hashes = {split: _hash(path) for split, path in files.items()}
    rows = {split: limited(_rows(path, hashes[split], data), data.limit) for split, path in files.items()}
    columns = [fact for path in files.values() for fact in _columns(path, data)]
    facts = [_LAYOUT, str(data.labelled), str(data.limit), *hashes.values(), *columns]
    return Corpus("text", digest(facts), rows)


def check(data: DataConfig) -> None:
    """Check the files to their last line, except a training file that is read as a stream.

    Memory does not grow with the files. Raises DataError like `load`.
    """
    for split, path in find(data).items():
        if split == "train" and data.streaming:
            continue
        for _ in delimited.read(path, data):
            pass


def find(data: DataConfig) -> dict[str, Path]:
    """Find the file of each split. Raises DataError, which says which file is missing and what to do."""
    folder = Path(data.path).expanduser() if data.path else None
    if folder and not folder.is_dir() and not (data.train and data.valid and data.test):
        found = "is a file" if folder.exists() else "no such directory"
        raise DataError(
            f"{folder}: {found}; data.path is a directory with train.txt, valid.txt and test.txt; for a data set of the"
            " hub, use --set data.corpus=dataset data.path=NAME data.column=COLUMN"
        )
    return {split: _file(folder, split, getattr(data, split)) for split in SPLITS}


def _file(folder: Path | None, split: str, named: str | None) -> Path:
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise DataError(f"{path}: no such file; correct data.{split}")
        return path
    assert folder is not None  # the settings require `path` if the file of a split is not given
    names = (f"{name}{suffix}" for name in NAMES[split] for suffix in _SUFFIXES)
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        both = " and ".join(path.name for path in found)
        raise DataError(f"{folder}: {both}; set data.{split} to one of them")
    if found:
        return found[0]
    wanted = " or ".join(f"{name}.txt" for name in NAMES[split])
    others = ", ".join(delimited.SUFFIXES)
    raise DataError(
        f"{folder}: no {wanted} (or {others}); add it, one sentence per line, or set data.{split} to a file"
    )


def _columns(path: Path, data: DataConfig) -> list[str]:
    """The settings that determine the text of a file, besides its bytes and `data.labelled`."""
    kind = delimited.suffix(path)
    return [kind, data.column] if kind else []


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _rows(path: Path, content: str, data: DataConfig) -> Dataset:
    root = cache_dir(data.cache_dir) / "text"
    cached = root / f"{digest([_LAYOUT, content, str(data.labelled), *_columns(path, data)])}.arrow"
    if not cached.is_file():
        write_rows(cached, ((text,) for text in delimited.read(path, data)))
    return read_rows(cached)
