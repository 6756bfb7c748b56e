"""The `text` corpus: three UTF-8 files of plain text, Optimus' layout of label, tab and text, CSV, TSV or JSON lines.

Lines are checked while they stream into an Arrow file in the cache, named by a hash of the bytes read, so a large
corpus is read into memory by nobody and checked once.
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
_LAYOUT = "1"  # of the cached files


def load(data: DataConfig) -> Corpus:
    """The sentences of the three files, in file order; without the training file if that is read as a stream.

    Raises DataError with file and line: a missing or empty file, and whatever `delimited.read` finds.
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
    """Check the files to their last line, but not one that is read as a stream; memory does not grow with them.

    Raises DataError as `load` does.
    """
    for split, path in find(data).items():
        if split == "train" and data.streaming:
            continue
        for _ in delimited.read(path, data):
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
    names = (f"{name}{suffix}" for name in NAMES[split] for suffix in _SUFFIXES)
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        both = " and ".join(path.name for path in found)
        raise DataError(f"{folder}: {both}; set data.{split} to the one that is meant")
    if found:
        return found[0]
    wanted = " or ".join(f"{name}.txt" for name in NAMES[split])
    others = ", ".join(delimited.SUFFIXES)
    raise DataError(f"{folder}: no {wanted} (or {others}); add it, one sentence a line, or set data.{split} to a file")


def _columns(path: Path, data: DataConfig) -> list[str]:
    """What decides the text of a file beside its bytes and `data.labelled`."""
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
