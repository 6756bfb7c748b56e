"""Sentences out of lines: plain text, labelled text, CSV, TSV and JSON lines; a bad line is named.

The suffix of a file says what it is. CSV is that of RFC 4180 (a quoted field may hold commas, quotation marks and line
breaks), TSV has no quoting, JSON lines are one object a line; all but the last begin with a line of column names. Of
such files one column is the text, and every other is ignored. Memory does not grow with the file.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from vae_ds.config import DataConfig
from vae_ds.errors import DataError

_LONGEST_FIELD = 1 << 20  # characters; a quotation mark that never closes must not read the rest of the file

Numbered = Iterator[tuple[int, str]]
"""Lines or sentences after the number of the line where each begins, from 1."""


def suffix(path: Path) -> str:
    """`.csv`, `.tsv` or `.jsonl`; any other file is plain text, which is the empty suffix."""
    found = path.suffix.lower()
    return found if found in _READERS else ""


def read(path: Path, data: DataConfig) -> Iterator[str]:
    """The sentences of a file, white space at their ends removed and line breaks inside them made blanks.

    Raises DataError with file and line: bytes that are not UTF-8, a row without text, of another number of fields, or
    that cannot be parsed; a missing column, an empty file, `data.labelled` for a file with columns.
    """
    found = False
    try:
        with path.open("rb") as file:
            for text in parse(enumerate(file, 1), path, data):
                found = True
                yield text
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not found:
        raise DataError(f"{path}: empty; write one sentence a {'row' if suffix(path) else 'line'}")


def parse(
    lines: Iterable[tuple[int, bytes]], path: Path, data: DataConfig, first: int = 1, unit: str = ""
) -> Iterator[str]:
    """The sentences of numbered lines of a file; `first` is the number of its first, `unit` what errors say of numbers.

    Raises DataError as `read` does, but of an empty file.
    """
    kind = suffix(path)
    if kind and data.labelled:
        raise DataError(f"{path}: has columns, of which data.column is the text; set data.labelled to false")
    read_rows = _READERS[kind] if kind else _plain(data.labelled)
    path = Path(f"{path}{unit}")
    decoded = ((number, _decoded(line, path, number, first)) for number, line in lines)
    for _, text in read_rows(decoded, path, data.column):
        yield " ".join(text.splitlines()) if kind else text


def _decoded(line: bytes, path: Path, number: int, first: int) -> str:
    try:
        # Windows editors put a byte-order mark in front of the first line.
        return line.decode("utf-8-sig" if number == first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line; convert the file") from None


def _filled(lines: Numbered, path: Path) -> Numbered:
    """The lines with text; blank ones are allowed at the end alone, so that no sentence is lost unnoticed."""
    blank = 0
    for number, line in lines:
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise DataError(f"{path}:{blank}: a line without text; remove it")
        yield number, line


def _plain(labelled: bool) -> "Reader":
    def read_lines(lines: Numbered, path: Path, column: str) -> Numbered:
        for number, line in _filled(lines, path):
            yield number, _without_label(line, path, number) if labelled else line.strip()

    return read_lines


def _without_label(line: str, path: Path, number: int) -> str:
    label, tab, text = line.partition("\t")
    if not tab:
        raise DataError(
            f"{path}:{number}: no tab; data.labelled expects label, tab, text (found {label.strip()[:40]!r})"
        )
    if not text.strip():
        raise DataError(f"{path}:{number}: no text after the label and the tab")
    return text.strip()


def _csv(lines: Numbered, path: Path, column: str) -> Numbered:
    begin = 1  # where a row begins that may go over several lines
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader((line for _, line in lines), strict=True)
        where, width, blank = -1, 0, 0
        for fields in reader:
            number, begin = begin, reader.line_num + 1
            if not fields:
                blank = blank or number
            elif blank:
                raise DataError(f"{path}:{blank}: a line without text; remove it")
            elif where < 0:
                where, width = _position(fields, path, number, column), len(fields)
            else:
                yield number, _field(fields, where, width, path, number, column)
    except csv.Error as error:
        raise DataError(f"{path}:{begin}: not CSV in the row that begins here: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _tsv(lines: Numbered, path: Path, column: str) -> Numbered:
    where, width = -1, 0
    for number, line in _filled(lines, path):
        fields = line.rstrip("\r\n").split("\t")
        if where < 0:
            where, width = _position(fields, path, number, column), len(fields)
        else:
            yield number, _field(fields, where, width, path, number, column)


def _jsonl(lines: Numbered, path: Path, column: str) -> Numbered:
    for number, line in _filled(lines, path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}; write one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: {type(row).__name__}, not an object; write one object a line")
        if column not in row:
            raise DataError(f"{path}:{number}: no column `{column}`; there: {', '.join(row)}; set data.column")
        text = row[column]
        if not isinstance(text, str):
            raise DataError(f"{path}:{number}: `{column}` holds {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{path}:{number}: `{column}` holds half of a surrogate pair, which is no text") from None
        yield number, _text(text, path, number, column)


def _position(names: list[str], path: Path, number: int, column: str) -> int:
    if names.count(column) != 1:
        found = "two columns" if column in names else "no column"
        raise DataError(f"{path}:{number}: {found} `{column}`; there: {', '.join(names)[:200]}; set data.column")
    return names.index(column)


def _field(fields: list[str], where: int, width: int, path: Path, number: int, column: str) -> str:
    if len(fields) != width:
        raise DataError(f"{path}:{number}: {len(fields)} fields, but the first line names {width} columns")
    return _text(fields[where], path, number, column)


def _text(text: str, path: Path, number: int, column: str) -> str:
    if not text.strip():
        raise DataError(f"{path}:{number}: no text in `{column}`; remove the row")
    return text.strip()


Reader = Callable[[Numbered, Path, str], Numbered]
_READERS: dict[str, Reader] = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl}
SUFFIXES = tuple(_READERS)
