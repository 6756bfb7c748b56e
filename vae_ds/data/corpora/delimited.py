"""Read sentences from plain text, labelled text, CSV, TSV, JSON lines and parquet. Errors name the file and the lines.

The suffix of a file selects its format. CSV follows RFC 4180: a quoted field may contain commas, quotation marks and
line breaks. TSV has no quoting. JSON lines have one object per line. CSV and TSV files begin with a line of column
names. In CSV, TSV, JSON lines and parquet, one column is the text, `data.label_column` may name another one with a
label, and all others are ignored. Files may be compressed (`opening`). Memory does not grow with the file.

Lines without text are skipped and counted, or are errors (`data.blank_lines`). A file with bad lines is read to its
end, so that one message names all of them.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vae_ds.config import DataConfig
from vae_ds.data.corpora import parquet
from vae_ds.data.corpora.findings import Findings
from vae_ds.data.corpora.opening import read_lines
from vae_ds.data.corpora.text_files import compression, suffix
from vae_ds.errors import DataError

_NO_TEXT_AFTER_LABEL = "no text after the label and the tab; remove the line, or set data.blank_lines to skip"
_LONGEST_FIELD = 1 << 20  # characters; an unclosed quotation mark must not read the rest of the file

Numbered = Iterator[tuple[int, str]]
"""Pairs of a line number, counted from 1, and the line that begins there."""


class Sentence(NamedTuple):
    """A sentence and its label; None if it has no label, or if the settings name none."""

    text: str
    label: str | None = None


Rows = Iterator[tuple[int, Sentence]]
"""Pairs of a line number, counted from 1, and the sentence that begins there."""


def has_labels(data: DataConfig) -> bool:
    """Whether the sentences have labels."""
    return data.labelled or data.label_column is not None


def read(path: Path, data: DataConfig, found: Findings) -> Iterator[Sentence]:
    """The sentences of a file. White space at their ends is removed; line breaks inside them become spaces.

    The blank lines are counted in `found`. Raises DataError, with file and lines, for bytes that are not UTF-8, a row
    without the column, a wrong number of fields or a row that cannot be parsed. Also raises it for a missing column, an
    empty file, `data.labelled` with columns, `data.label_column` without them, and for blank lines if they are errors
    (`data.blank_lines`).
    """
    filled = False
    for sentence in _sentences(path, data, found):
        filled = True
        yield sentence
    found.raise_bad(str(path))
    if not filled:
        raise DataError(f"{path}: empty; write one sentence per {'row' if suffix(path) else 'line'}")


def _sentences(path: Path, data: DataConfig, found: Findings) -> Iterator[Sentence]:
    if suffix(path) != ".parquet":
        yield from parse(enumerate(read_lines(path), 1), path, data, found)
        return
    _check_labels(path, data)
    if compression(path):
        raise DataError(f"{path}: parquet files have their own compression; decompress the file")
    for number, text, label in parquet.read_rows(path, data.column, data.label_column, found):
        if text and (plain := text.strip()):
            yield Sentence(" ".join(plain.splitlines()), label)
        else:
            found.add_blank(number, _no_text(data.column))


def parse(
    lines: Iterable[tuple[int, bytes]],
    path: Path,
    data: DataConfig,
    found: Findings,
    first: int = 1,
    unit: str = "",
) -> Iterator[Sentence]:
    """The sentences of numbered lines of a file. Blank lines and lines with errors are left out and added to `found`.

    `first` is the number of the first line of the file. Errors show `unit` between the path and the number. Raises
    DataError for errors after which the next lines cannot be read: a missing column, an unclosed quotation mark.
    """
    kind = suffix(path)
    _check_labels(path, data)
    read_rows = _READERS[kind] if kind else _plain
    for number, (text, label) in read_rows(_decoded(lines, first, found), Path(f"{path}{unit}"), data, found):
        if number != found.last_bad:
            yield Sentence(" ".join(text.splitlines()) if kind else text, label)


def _check_labels(path: Path, data: DataConfig) -> None:
    if suffix(path) and data.labelled:
        raise DataError(
            f"{path}: has columns, and data.column selects the text; set data.labelled to false, and data.label_column"
            " to the column of the label"
        )
    if not suffix(path) and data.label_column is not None:
        raise DataError(
            f"{path}: has no columns; remove data.label_column, or set data.labelled for lines of label, tab, text"
        )


def _decoded(lines: Iterable[tuple[int, bytes]], first: int, found: Findings) -> Numbered:
    for number, line in lines:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            found.add_bad(number, f"not UTF-8 at byte {error.start + 1} of the line; convert the file")
            text = line.decode(errors="replace")
        if "\0" in text:
            found.add_bad(number, f"a zero byte at byte {line.index(0) + 1} of the line, which is not text")
        # Windows editors write a byte-order mark before the first line.
        yield number, text.removeprefix("\ufeff") if number == first else text


def _filled(lines: Numbered, found: Findings) -> Numbered:
    """The lines with text."""
    for number, line in lines:
        if line.strip():
            yield number, line
        else:
            found.add_blank(number)


def _plain(lines: Numbered, path: Path, data: DataConfig, found: Findings) -> Rows:
    for number, line in lines:
        text = line.strip()
        if not text:
            found.add_blank(number)
        elif not data.labelled:
            yield number, Sentence(text)
        elif (labelled := _divided(line, number, found)).text:
            yield number, labelled


def _divided(line: str, number: int, found: Findings) -> Sentence:
    """The label, and the text after it or the empty string."""
    label, tab, text = line.partition("\t")
    if not tab:
        found.add_bad(number, f"no tab; data.labelled expects label, tab, text (found {label.strip()[:40]!r})")
    elif not text.strip():
        found.add_blank(number, _NO_TEXT_AFTER_LABEL)
    return Sentence(text.strip(), label.strip() or None)


def _csv(lines: Numbered, path: Path, data: DataConfig, found: Findings) -> Rows:
    begin = 1  # number of the first line of a row; a row may have several lines
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader((line for _, line in lines), strict=True)
        head: _Head | None = None
        for fields in reader:
            number, begin = begin, reader.line_num + 1
            if len(fields) < 2 and not "".join(fields).strip():
                found.add_blank(number)
            elif head is None:
                head = _head(fields, path, number, data)
            elif (row := head.row(fields, number, found)).text:
                yield number, row
    except csv.Error as error:
        found.add_bad(begin, f"not CSV in the row that begins here: {error}")
        found.raise_bad(str(path))
    finally:
        csv.field_size_limit(limit)


def _tsv(lines: Numbered, path: Path, data: DataConfig, found: Findings) -> Rows:
    head: _Head | None = None
    for number, line in _filled(lines, found):
        fields = line.rstrip("\r\n").split("\t")
        if head is None:
            head = _head(fields, path, number, data)
        elif (row := head.row(fields, number, found)).text:
            yield number, row


def _jsonl(lines: Numbered, path: Path, data: DataConfig, found: Findings) -> Rows:
    for number, line in _filled(lines, found):
        try:
            row = json.loads(line)
            text, label = _of_object(row, data.column), _label_of_object(row, data.label_column)
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, _RowError) else f"not JSON: {error}; write one object per line"
            found.add_bad(number, reason)
            continue
        if text.strip():
            yield number, Sentence(text.strip(), label)
        else:
            found.add_blank(number, _no_text(data.column))


class _RowError(ValueError):
    """A JSON row without the text."""


def _of_object(row: object, column: str) -> str:
    """The text of a JSON object; the empty string for null. Raises _RowError."""
    if not isinstance(row, dict):
        raise _RowError(f"{type(row).__name__}, not an object; write one object per line")
    if column not in row:
        raise _RowError(f"no column `{column}`; found: {', '.join(row)[:200]}; set data.column")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise _RowError(f"`{column}` holds {type(text).__name__}, not text")
    _check_letters(text, column)
    return text


def _label_of_object(row: dict[str, object], column: str | None) -> str | None:
    """The label of a JSON object: a string, a number or a truth value, as text. Raises _RowError."""
    if column is None:
        return None
    if column not in row:
        raise _RowError(f"no column `{column}`; found: {', '.join(row)[:200]}; set data.label_column")
    label = row[column]
    if label is None:
        return None
    if not isinstance(label, str | int | float):
        raise _RowError(f"`{column}` holds {type(label).__name__}, not a label; set data.label_column")
    _check_letters(str(label), column)
    return str(label).strip() or None


def _check_letters(text: str, column: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _RowError(f"`{column}` holds half of a surrogate pair, which is not text") from None


class _Head(NamedTuple):
    """The line of column names: their number, and where the text and the label are (-1: there is no label)."""

    column: str
    width: int
    text_at: int
    label_at: int

    def row(self, fields: list[str], number: int, found: Findings) -> Sentence:
        """The text of a row, or the empty string, and its label."""
        if len(fields) != self.width:
            found.add_bad(number, f"{len(fields)} fields, but the first line names {self.width} columns")
            return Sentence("")
        text = fields[self.text_at].strip()
        if not text:
            found.add_blank(number, _no_text(self.column))
        return Sentence(text, None if self.label_at < 0 else fields[self.label_at].strip() or None)


def _head(names: list[str], path: Path, number: int, data: DataConfig) -> _Head:
    def position(column: str, setting: str) -> int:
        if names.count(column) != 1:
            found = "two columns" if column in names else "no column"
            raise DataError(f"{path}:{number}: {found} `{column}`; found: {', '.join(names)[:200]}; set {setting}")
        return names.index(column)

    label_at = -1 if data.label_column is None else position(data.label_column, "data.label_column")
    return _Head(data.column, len(names), position(data.column, "data.column"), label_at)


def _no_text(column: str) -> str:
    return f"no text in `{column}`; remove the row, or set data.blank_lines to skip"


Reader = Callable[[Numbered, Path, DataConfig, Findings], Rows]
_READERS: dict[str, Reader] = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl}
