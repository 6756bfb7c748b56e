"""Texts from arguments, from files and from standard input, a line each. Files are read in parts."""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vae_ds.errors import ConfigError, DataError

STDIN = "-"
LONGEST_LINE = 1 << 20  # bytes; a longer line is no text


class Line(NamedTuple):
    """A line of the input. `number` counts from 1. `error` says why a bad line has no text, otherwise it is None."""

    number: int
    text: str
    error: str | None = None


def add_input(parser: argparse.ArgumentParser, what: str = "the texts, one per line") -> None:
    """Add `--file` and `--skip-bad`."""
    parser.add_argument("--file", metavar="FILE", help=f"a file with {what}; - is standard input (default: arguments)")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out blank lines (default: they keep their place in the output, with an error)",
    )


def source_of(arguments: argparse.Namespace, texts: Sequence[str]) -> str | None:
    """The file to read, `-` for standard input, None if the texts are arguments. Raises ConfigError for both."""
    if arguments.file is None:
        return STDIN if list(texts) == [STDIN] else None
    if texts:
        raise ConfigError(f"texts are given as arguments and with --file {arguments.file}; give one of them")
    return str(arguments.file)


def lines_of(source: str | None, texts: Sequence[str]) -> Iterator[Line]:
    """The lines of `source`, or the texts as lines. The first line is read at once, so that errors come early.

    Raises DataError if the file is missing, empty or binary, or if there is no text.
    """
    if source is None:
        if not texts:
            raise ConfigError("no text is given; give texts, --file FILE, or - for standard input")
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise DataError(f"sentence {number} is empty; remove it or add text")
        return iter([Line(number, text) for number, text in enumerate(texts, start=1)])
    lines = _read(source)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{_name(source)}: is empty; it needs one text per line")
    return itertools.chain([first], lines)


def in_parts(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    """The lines in lists of `size`."""
    while part := list(itertools.islice(lines, size)):
        yield part


def fields_of(line: Line, count: int) -> Line | list[str]:
    """The `count` texts of a line, which tabs separate, or the line with an error."""
    texts = line.text.split("\t")
    if len(texts) == count and all(text.strip() for text in texts):
        return texts
    return line._replace(error=f"line {line.number} has {len(texts)} texts with tabs between them, not {count}")


def _read(source: str) -> Iterator[Line]:
    if source == STDIN:
        yield from _decoded(sys.stdin.buffer, source)
        return
    try:
        with Path(source).open("rb") as file:
            yield from _decoded(file, source)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from None


def _decoded(file: BinaryIO, source: str) -> Iterator[Line]:
    for number in itertools.count(1):
        content = file.readline(LONGEST_LINE + 1)
        if not content:
            return
        where = f"{_name(source)}: line {number}"
        if b"\0" in content:
            raise DataError(f"{where} has a zero byte; this is no text file")
        if len(content) > LONGEST_LINE:
            raise DataError(f"{where} is longer than {LONGEST_LINE:,} bytes; the file needs one text per line")
        try:
            text = content.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            wrong = content[error.start]
            raise DataError(f"{where} is not UTF-8 (byte {wrong:#04x}); convert the file to UTF-8") from None
        yield Line(number, text, None if text.strip() else f"line {number} is blank")


def _name(source: str) -> str:
    return "standard input" if source == STDIN else source
