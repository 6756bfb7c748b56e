"""The `text` corpus: UTF-8 files of plain text, labelled text (label, tab, text), CSV, TSV, JSON lines or parquet.

The lines are checked while they are written to an Arrow file in the cache. The name of that file is a hash of the
source. Thus a large corpus is never read into memory, and is checked once.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from datasets import Dataset

from vae_ds.config import SPLITS, DataConfig
from vae_ds.data.cache import (
    LABELLED,
    TEXT,
    cache_dir,
    digest,
    make_folder,
    noted_hash,
    read_rows,
    write_rows,
    write_text,
)
from vae_ds.data.corpora import delimited, holdout, text_files
from vae_ds.data.corpora.corpus import Corpus, limited
from vae_ds.data.corpora.findings import Findings
from vae_ds.data.corpora.opening import unreadable
from vae_ds.data.progress import is_main

_LAYOUT = "1"  # version of the cached files

Files = tuple[Path, ...]

log = logging.getLogger(__name__)


def load(data: DataConfig) -> Corpus:
    """Load the sentences of the files, in file order; without the training files if they are read as a stream.

    With `data.labelled` or `data.label_column`, the column `label` has the labels. With `data.split`, valid and test
    are drawn from the only source. Facts: `blank_lines`, the number of skipped lines without text of each split, or of
    `all` with `data.split`. It is also logged.

    Raises DataError for a missing or empty file and, with file and line, for every error of `delimited.read`.
    """
    sources = _sources(data)
    hashes = {name: _hash(files, data) for name, files in sources.items()}
    rows = {name: _rows(files, hashes[name], data) for name, files in sources.items()}
    blank = {name: _report_blank(files, _cached(files, hashes[name], data)) for name, files in sources.items()}
    columns = [fact for files in sources.values() for path in files for fact in _format(path, data)]
    facts = [_LAYOUT, str(data.labelled), str(data.limit), *hashes.values(), *columns]
    if data.split:
        (files,) = sources.values()
        cached = _cached(files, hashes[text_files.WHOLE], data)
        rows, facts = _drawn(files, rows[text_files.WHOLE], cached, data), [*facts, data.split.model_dump_json()]
    rows = {split: limited(part, data.limit) for split, part in rows.items()}
    return Corpus("text", digest(facts), rows, {"blank_lines": blank})


def check(data: DataConfig) -> None:
    """Check the files to their last line, except training files that are read as a stream.

    Files that were checked before are not read again. Rank 0 keeps the checked lines in the cache for `load`. Memory
    does not grow with the files. Raises DataError like `load`.
    """
    for files in _sources(data).values():
        content = _hash(files, data)
        if is_main() or _cached(files, content, data).is_file():
            _rows(files, content, data)
        else:
            for _ in _sentences(files, data, []):
                pass


def find(data: DataConfig) -> dict[str, Path]:
    """The file of each split, if each split is one file; otherwise an empty dictionary. Raises DataError."""
    located = text_files.locate(data)
    if data.split or any(len(files) > 1 for files in located.values()):
        return {}
    return {split: files[0] for split, files in located.items()}


def _sources(data: DataConfig) -> dict[str, Files]:
    """The files to read now."""
    located = text_files.locate(data)
    return {name: files for name, files in located.items() if not (data.streaming and name == "train")}


def _format(path: Path, data: DataConfig) -> list[str]:
    """The settings that determine the text of a file, besides its bytes and `data.labelled`."""
    kind, codec = text_files.suffix(path), text_files.compression(path)
    return [*([codec] if codec else []), *([kind, data.column] if kind else [])]


def _hash(files: Files, data: DataConfig) -> str:
    """Hash of the bytes of the files."""
    notes = cache_dir(data.cache_dir) / "text" / "hashes"
    hashes = []
    for path in files:
        try:
            hashes.append(noted_hash(path, notes))
        except OSError as error:
            raise unreadable(path, error) from None
    return hashes[0] if len(hashes) == 1 else digest(hashes)


def _cached(files: Files, content: str, data: DataConfig) -> Path:
    """The Arrow file of a source. The file beside it with the suffix .json has the blank lines of each file."""
    formats = [fact for path in files for fact in _format(path, data)]
    if delimited.has_labels(data):
        # Files of older versions have no labels.
        formats += ["labels", str(data.label_column)]
    return cache_dir(data.cache_dir) / "text" / f"{digest([_LAYOUT, content, str(data.labelled), *formats])}.arrow"


def _rows(files: Files, content: str, data: DataConfig) -> Dataset:
    """The sentences of a source, from the cache if it has them. Raises DataError for blank lines if they are errors."""
    cached = _cached(files, content, data)
    if not cached.is_file():
        findings: list[Findings] = []
        make_folder(cached.parent)
        # The reader ends before the Arrow file gets its name, so the file beside it exists first.
        sentences = _noted(_sentences(files, data, findings), findings, cached)
        if delimited.has_labels(data):
            write_rows(cached, sentences, LABELLED)
        else:
            write_rows(cached, ((text,) for text, _ in sentences), TEXT)
    elif data.blank_lines == "error":
        for path, found in zip(files, _notes(cached), strict=False):
            found.raise_blank(str(path))
    return read_rows(cached)


def _sentences(files: Files, data: DataConfig, findings: list[Findings]) -> Iterator[delimited.Sentence]:
    for path in files:
        findings.append(Findings(data.blank_lines))
        yield from delimited.read(path, data, findings[-1])


def _noted(
    sentences: Iterator[delimited.Sentence], findings: list[Findings], cached: Path
) -> Iterator[delimited.Sentence]:
    """Yield the sentences, then write the blank lines of their files beside the Arrow file."""
    yield from sentences
    notes = [[found.blank, found.first_blank] for found in findings]
    write_text(cached.with_suffix(".json"), json.dumps(notes))


def _notes(cached: Path) -> list[Findings]:
    """The blank lines of each file. A cache of an older version has no notes, since it has no blank lines."""
    try:
        notes = json.loads(cached.with_suffix(".json").read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return [replace(Findings(), blank=blank, first_blank=first) for blank, first in notes]


def _report_blank(files: Files, cached: Path) -> int:
    """Log the number of blank lines on rank 0, and return it."""
    found = [(path, notes) for path, notes in zip(files, _notes(cached), strict=False) if notes.blank]
    blank = sum(notes.blank for _, notes in found)
    if blank and is_main():
        path, notes = found[0]
        rest = f" and {len(found) - 1} more files" if len(found) > 1 else ""
        message = "%s%s: lines without text: %d skipped (the first is line %d); data.blank_lines=error refuses them"
        log.warning(message, path, rest, blank, notes.first_blank[0])
    return blank


def _drawn(files: Files, whole: Dataset, cached: Path, data: DataConfig) -> dict[str, Dataset]:
    """The splits of one source, whose sentences are in the file `cached`."""
    assert data.split is not None
    folder = cached.with_suffix("") / digest([_LAYOUT, data.split.model_dump_json()])
    targets = {split: folder / f"{split}.arrow" for split in SPLITS}
    # `draw` writes train last.
    if not targets["train"].is_file():
        name = str(files[0]) + (f" and {len(files) - 1} more files" if len(files) > 1 else "")
        numbers = {"valid": data.split.valid, "test": data.split.test}
        holdout.draw(name, whole, numbers, data.split.seed, targets)
    return {split: read_rows(path) for split, path in targets.items()}
