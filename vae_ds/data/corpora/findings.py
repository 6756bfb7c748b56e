"""The blank lines and the bad lines of a file: counted while it is read, reported in one message."""

from dataclasses import dataclass, field
from typing import Literal

from vae_ds.errors import DataError

LISTED = 10  # line numbers that a message names
NO_TEXT = "a line without text; remove it, or set data.blank_lines to skip"


@dataclass
class Findings:
    """The numbers of the blank lines and of the lines with an error. Memory does not grow with their number.

    blank_lines: `skip` counts blank lines, `error` also makes each of them an error.
    """

    blank_lines: Literal["skip", "error"] = "skip"
    blank: int = 0
    first_blank: list[int] = field(default_factory=list)
    bad: int = 0
    first_bad: list[int] = field(default_factory=list)
    reason: str = ""
    last_bad: int = -1

    def add_blank(self, number: int, reason: str = NO_TEXT) -> None:
        """Count a line without text."""
        self.blank += 1
        if len(self.first_blank) < LISTED:
            self.first_blank.append(number)
        if self.blank_lines == "error":
            self.add_bad(number, reason)

    def add_bad(self, number: int, reason: str) -> None:
        """Count a line with an error. Further errors of the same line are ignored."""
        if number == self.last_bad:
            return
        self.last_bad = number
        self.bad += 1
        self.reason = self.reason or reason
        if len(self.first_bad) < LISTED:
            self.first_bad.append(number)

    def raise_bad(self, where: str) -> None:
        """Raise DataError if there is a line with an error. `where` is the path, before the line number."""
        if self.bad:
            raise DataError(f"{where}:{self.first_bad[0]}: {self.reason}{_listed(self.bad, self.first_bad)}")

    def raise_blank(self, where: str) -> None:
        """Raise DataError if there is a blank line, for files that were read before with `skip`."""
        if self.blank:
            raise DataError(f"{where}:{self.first_blank[0]}: {NO_TEXT}{_listed(self.blank, self.first_blank)}")


def _listed(count: int, first: list[int]) -> str:
    if count == 1:
        return ""
    return f"; {count} bad lines in all: {', '.join(map(str, first))}{', ...' if count > len(first) else ''}"
