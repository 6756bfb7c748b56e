"""Find the text files of a corpus: in a directory by their names, by name, or by a pattern such as parts/*.txt."""

import glob
import stat
from itertools import product
from pathlib import Path
from typing import Literal

from vae_ds.config import SPLITS, DataConfig
from vae_ds.errors import DataError

NAMES = {"train": ("train",), "valid": ("valid", "dev", "validation", "val"), "test": ("test",)}
COLUMNS = (".csv", ".tsv", ".jsonl", ".parquet")  # formats with columns; all other files are plain text
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
PLAIN = tuple(f".txt{end}" for end in ("", *COMPRESSED))
WHOLE = "all"  # the name of the only source of `data.split`
_SUFFIXES = (*(f"{kind}{end}" for kind, end in product((".txt", *COLUMNS[:-1]), ("", *COMPRESSED))), COLUMNS[-1])


def suffix(path: Path) -> str:
    """`.csv`, `.tsv`, `.jsonl` or `.parquet`, without `.gz` or `.zst`; the empty string for plain text."""
    found = (path.with_suffix("") if compression(path) else path).suffix.lower()
    return found if found in COLUMNS else ""


def compression(path: Path) -> str:
    """`gzip` or `zstd`, or the empty string."""
    return COMPRESSED.get(path.suffix.lower(), "")


def locate(data: DataConfig) -> dict[str, tuple[Path, ...]]:
    """The files of each split, sorted if a pattern selects them. With `data.split`, the files of the source WHOLE.

    Raises DataError, which says which file is missing and what to do.
    """
    folder = Path(data.path).expanduser() if data.path else None
    if data.split:
        return {WHOLE: _named(data.train, "train") if data.train else _single(folder)}
    if folder and kind_of(folder) != "directory" and not (data.train and data.valid and data.test):
        kind = kind_of(folder)
        found = "no such directory" if kind == "nothing" else f"is a {kind}"
        raise DataError(
            f"{folder}: {found}; data.path is a directory with train.txt, valid.txt and test.txt; for one file, set"
            " data.split; for a pattern, set data.train; for a data set of the hub, use --set data.corpus=dataset"
            " data.path=NAME data.column=COLUMN"
        )
    return {split: _named(named, split) if (named := getattr(data, split)) else _in(folder, split) for split in SPLITS}


def kind_of(path: Path) -> Literal["file", "directory", "device", "nothing"]:
    """What exists at a path. Raises DataError if that cannot be determined, for example without permission."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if stat.S_ISDIR(mode):
        return "directory"
    return "file" if stat.S_ISREG(mode) else "device"


def _named(named: str, split: str) -> tuple[Path, ...]:
    path = Path(named).expanduser()
    kind = kind_of(path)
    if kind == "file":
        return (path,)
    if kind == "directory":
        raise DataError(f"{path}: is a directory; set data.{split} to a file, or to a pattern such as {path}/*.txt")
    if kind == "nothing" and any(sign in named for sign in "*?["):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = tuple(file for file in found if kind_of(file) == "file")
        if not files:
            raise DataError(f"{path}: no file matches this pattern; correct data.{split}")
        return files
    raise DataError(f"{path}: {'no such file' if kind == 'nothing' else f'is a {kind}'}; correct data.{split}")


def _single(folder: Path | None) -> tuple[Path, ...]:
    """The file `data.path`, or the only text file of the directory `data.path`."""
    assert folder is not None  # the settings require `path` or `train`
    kind = kind_of(folder)
    if kind == "file":
        return (folder,)
    if kind != "directory":
        raise DataError(f"{folder}: no such file or directory; with data.split, data.path is a text file")
    found = sorted(
        path for path in _entries(folder) if path.name.lower().endswith(_SUFFIXES) and kind_of(path) == "file"
    )
    if len(found) == 1:
        return (found[0],)
    listed = ", ".join(path.name for path in found[:10]) + (", ..." if len(found) > 10 else "")
    raise DataError(
        f"{folder}: {len(found)} text files{f' ({listed})' if found else ''}; data.split needs one file;"
        f" set data.train to it, or to a pattern such as {folder}/*.txt"
    )


def _in(folder: Path | None, split: str) -> tuple[Path, ...]:
    assert folder is not None  # the settings require `path` if the file of a split is not given
    names = [folder / f"{name}{suffix}" for name in NAMES[split] for suffix in _SUFFIXES]
    kinds = {path: kind_of(path) for path in names}
    found = [path for path, kind in kinds.items() if kind == "file"]
    if len(found) > 1:
        listed = " and ".join(path.name for path in found)
        raise DataError(f"{folder}: {listed}; set data.{split} to one of them")
    if found:
        return (found[0],)
    for path, kind in kinds.items():
        if kind != "nothing":
            raise DataError(f"{path}: is a {kind}, not a file; set data.{split} to a file")
    wanted = " or ".join(f"{name}.txt" for name in NAMES[split])
    raise DataError(
        f"{folder}: no {wanted} (or {', '.join(COLUMNS)}; also with {' or '.join(COMPRESSED)}); add it, one sentence"
        f" per line, or set data.{split} to a file, or set data.split to draw valid and test from one file"
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
