"""The output of a report: report.md in parts, and a CSV file for each table."""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vae_ds.runtime import records

Cell = str | int | float | None
Row = dict[str, Cell]


@dataclass
class Page:
    """The folder of a report, and the parts of its report.md so far."""

    folder: Path
    split: str
    parts: list[str] = field(default_factory=list)

    def say(self, *parts: str) -> None:
        self.parts += parts

    def section(self, title: str, text: str) -> None:
        """Add a heading and its text, unless the page has this heading already."""
        if f"## {title}" not in self.parts:
            self.say(f"## {title}", text)

    def table(self, name: str, head: Mapping[str, str], rows: Sequence[Row]) -> None:
        """Add a table in Markdown without its empty columns, and write the whole table to NAME.csv."""
        self.csv(name, list(head), rows)
        used = {key: title for key, title in head.items() if any(row.get(key) is not None for row in rows)}
        self.say(markdown(used, rows), f"[{name}.csv]({name}.csv)")

    def csv(self, name: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        records.replace_file(self.folder / f"{name}.csv", text.getvalue().encode())

    def figure(self, name: str, title: str) -> None:
        self.say(f"[![{title}]({name}.png)]({name}.svg)")


def markdown(head: Mapping[str, str], rows: Iterable[Row]) -> str:
    lines = [list(head.values()), ["---"] * len(head)]
    lines += [[escape(shown(row.get(key))) for key in head] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if 0.1 <= abs(value) < 1e6 else f"{value:.2g}"
    return "" if value is None else str(value)


def escape(text: str) -> str:
    return re.sub(r"([|*_<>\[\]`\\])", r"\\\1", text.replace("\n", " "))


def listed(names: Iterable[str]) -> str:
    return ", ".join(escape(name) for name in names)


def number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
