"""The progress of a run on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

LINE_EVERY = 0.1  # of a phase
LINE_AFTER_S = 300.0


class Bar:
    """A progress bar on the terminal, one per phase."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}", markup=False),
            console=Console(stderr=True),
            redirect_stdout=sys.stdout.isatty(),  # if standard output goes to a file, it must not go to the terminal
        )
        self._task: Any = None

    def begin(self, name: str, total: int, done: int) -> None:
        self._progress.start()
        self._task = self._progress.add_task(name, total=total, completed=done, terms="")

    def show(self, row: Mapping[str, Any]) -> None:
        if self._task is not None:
            self._progress.update(self._task, terms=terms_of(row))

    def advance(self, steps: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, steps)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class Lines:
    """Plain lines for a standard error that is not a terminal: one per tenth of a phase, and one after five minutes."""

    def __init__(self) -> None:
        self._name = ""
        self._total = self._done = self._last_tenth = 0
        self._row: Mapping[str, Any] = {}
        self._printed_s = self._began_s = time.monotonic()
        self._began = 0

    def begin(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._done, self._row = name, total, done, {}
        self._last_tenth, self._began, self._began_s = self._tenth(), done, time.monotonic()
        self.say(f"{name}: {done}/{total} steps")

    def show(self, row: Mapping[str, Any]) -> None:
        self._row = row

    def advance(self, steps: int) -> None:
        self._done += steps
        if self._tenth() == self._last_tenth and time.monotonic() - self._printed_s < LINE_AFTER_S:
            return
        self._last_tenth = self._tenth()
        percent = 100 * self._done // max(self._total, 1)
        told = [f"{self._name}: {self._done}/{self._total} steps ({percent}%)", terms_of(self._row), self._left()]
        self.say("  ".join(part for part in told if part))

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        self._printed_s = time.monotonic()

    def close(self) -> None:
        pass

    def _left(self) -> str:
        """The time left in the phase by the mean pace of this process, validations included."""
        left = self._total - self._done
        pace_s = (time.monotonic() - self._began_s) / max(self._done - self._began, 1)
        return f"{timedelta(seconds=round(left * pace_s))} left" if left > 0 else ""

    def _tenth(self) -> int:
        return int(self._done / max(self._total * LINE_EVERY, 1))


def is_number(value: Any) -> bool:
    """Whether `value` is a number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def terms_of(row: Mapping[str, Any], keys: Iterable[str] = ("rec", "kl", "beta", "tokens_per_s", "mfu")) -> str:
    """The numbers of `row` under `keys` as one line of text; missing keys are left out."""
    shown = [(key, row[key]) for key in keys if is_number(row.get(key))]
    words = {"tokens_per_s": "{:,.0f} tokens/s", "mfu": "MFU {:.0%}"}
    return "  ".join(words.get(key, key + " {:.4g}").format(value) for key, value in shown)
