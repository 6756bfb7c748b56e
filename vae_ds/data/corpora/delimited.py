"""Read sentences from plain text, labelled text, CSV, TSV and JSON lines. Errors name the file and the line.

The suffix of a file selects its format. CSV follows RFC 4180: a quoted field may contain commas, quotation marks and
line breaks. TSV has no quoting. JSON lines have one object per line. CSV and TSV files begin with a line of column
names. In CSV, TSV and JSON lines, one column is the text and all others are ignored. Memory does not grow with the
file.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from vae_ds.config import DataConfig
from vae_ds.errors import DataError

_LONGEST_FIELD = 1 << 20  # characters; an unclosed quotation mark must not read the rest of the file

Numbered = Iterator[tuple[int, str]]
"""Pairs of a line number, counted from 1, and the line or sentence that begins there."""


def suffix(path: Path) -> str:
    """`.csv`, `.tsv` or `.jsonl`; the empty string for any other file, which is plain text."""
    found = path.suffix.lower()
    return found if found in _READERS else ""


def read(path: Path, data: DataConfig) -> Iterator[str]:
    """The sentences of a file. White space at their ends is removed; line breaks inside them become spaces.

    Raises DataError, with file and line, for bytes that are not UTF-8, a row without text, a wrong number of fields or
    a row that cannot be parsed. Also raises it for a missing column, an empty file, and `data.labelled` with columns.
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
        raise DataError(f"{path}: empty; write one sentence per {'row' if suffix(path) else 'line'}")


def parse(
    lines: Iterable[tuple[int, bytes]], path: Path, data: DataConfig, first: int = 1, unit: str = ""
) -> Iterator[str]:
    """The sentences of numbered lines of a file.

    `first` is the number of the first line of the file. Errors show `unit` between the path and the number. Raises
    DataError like `read`, except for an empty file.
    """
    kind = suffix(path)
    if kind and data.labelled:
        raise DataError(f"{path}: has columns, and data.column selects the text; set data.labelled to false")
    read_rows = _READERS[kind] if kind else _plain(data.labelled)
    path = Path(f"{path}{unit}")
    decoded = ((number, _decoded(line, path, number, first)) for number, line in lines)
    for _, text in read_rows(decoded, path, data.column):
        yield " ".join(text.splitlines()) if kind else text


def _decoded(line: bytes, path: Path, number: int, first: int) -> str:
    try:
        # Windows editors write a byte-order mark before the first line.
        return line.decode("utf-8-sig" if number == first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line; convert the file") from None


def _filled(lines: Numbered, path: Path) -> Numbered:
    """The lines with text. Blank lines are allowed only at the end, so that no sentence is lost silently."""
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
    begin = 1  # number of the first line of a row; a row may have several lines
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
            raise DataError(f"{path}:{number}: not JSON: {error}; write one object per line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: {type(row).__name__}, not an object; write one object per line")
        if column not in row:
            raise DataError(f"{path}:{number}: no column `{column}`; found: {', '.join(row)}; set data.column")
        text = row[column]
        if not isinstance(text, str):
            raise DataError(f"{path}:{number}: `{column}` holds {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{path}:{number}: `{column}` holds half of a surrogate pair, which is not text") from None
        yield number, _text(text, path, number, column)


def _position(names: list[str], path: Path, number: int, column: str) -> int:
    if names.count(column) != 1:
        found = "two columns" if column in names else "no column"
        raise DataError(f"{path}:{number}: {found} `{column}`; found: {', '.join(names)[:200]}; set data.column")
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
