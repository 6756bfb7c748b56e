"""Show the progress of long tasks: a bar on a terminal, else a plain line on standard error now and then.

Tasks of less than three seconds show nothing. Only rank 0 shows progress.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch.distributed as dist
from tqdm import tqdm

FIRST_S = 3.0  # seconds until the first bar or line
EVERY_S = 15.0  # seconds between the lines

Item = TypeVar("Item")


def is_main() -> bool:
    """Whether this process is rank 0. Works before the process group exists."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


class Progress:
    """Progress of one task, as a context manager. `add` counts the finished units.

    task: what is done, for example "Reading train.txt".
    total: number of units; None if it is unknown.
    unit: plural noun of the units; "B" for bytes.
    initial: number of units that were finished before.
    """

    def __init__(self, task: str, total: int | None = None, unit: str = "sentences", initial: int = 0) -> None:
        self._task, self._total, self._unit, self._done = task, total, unit, initial
        self._shown = is_main()
        self._begun = time.monotonic()
        self._next = self._begun + FIRST_S
        self._bar: Any = None
        if self._shown and sys.stderr is not None and sys.stderr.isatty():
            label = unit if unit == "B" else f" {unit}"
            self._bar = tqdm(
                total=total, initial=initial, desc=task, unit=label, unit_scale=unit == "B", delay=FIRST_S, leave=False
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int = 1) -> None:
        """Count `count` more finished units."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY_S
            _print(f"{self._task}: {self._count()}, {time.monotonic() - self._begun:.0f} s")

    def reach(self, done: int) -> None:
        """Set the number of finished units."""
        self.add(done - self._done)

    def _count(self) -> str:
        done, total = (
            f"{number / 1e6:,.0f}" if self._unit == "B" else f"{number:,}" for number in (self._done, self._total or 0)
        )
        unit = "MB" if self._unit == "B" else self._unit
        if not self._total:
            return f"{done} {unit}"
        return f"{done} of {total} {unit} ({100 * self._done / self._total:.0f} %)"


def progress(items: Iterable[Item], task: str, total: int | None = None, unit: str = "sentences") -> Iterator[Item]:
    """Yield the items and show their number."""
    with Progress(task, total, unit) as shown:
        for item in items:
            yield item
            shown.add()


@contextmanager
def waiting(task: str) -> Iterator[None]:
    """Show how long a task takes whose progress cannot be counted."""
    if not is_main():
        yield
        return
    begun, done = time.monotonic(), threading.Event()

    def report() -> None:
        pause = FIRST_S
        while not done.wait(pause):
            _print(f"{task}: {time.monotonic() - begun:.0f} s")
            pause = EVERY_S

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
