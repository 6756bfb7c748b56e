"""Results as lines for people, as JSON lines, CSV or arrays, on standard output or in a file that is written whole."""

import argparse
import csv
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from vae_ds.errors import ConfigError, StorageError
from vae_ds.runtime import run_dirs

ROWS = (".jsonl", ".csv")
PLAIN = (".txt",)


def add_output(parser: argparse.ArgumentParser, arrays: Sequence[str] = ()) -> None:
    """Add `--to`. `arrays`: endings of files of arrays, which the command writes itself."""
    endings = ", ".join((*ROWS, *arrays, *PLAIN))
    parser.add_argument("--to", metavar="FILE", help=f"write to a file, by its ending: {endings} (default: print)")
    parser.set_defaults(endings=(*ROWS, *arrays, *PLAIN))


def check_output(arguments: argparse.Namespace) -> None:
    """Check that the file of `--to` can be written. Raises ConfigError. Call it before a model is loaded."""
    if arguments.to is None:
        return
    path = Path(arguments.to)
    if path.suffix.lower() not in arguments.endings:
        raise ConfigError(f"--to {path}: the ending must be one of {', '.join(arguments.endings)}")
    if path.is_dir():
        raise ConfigError(f"--to {path}: is a directory; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--to {path}: {path.parent} is no directory")
    run_dirs.check_writable(path.parent, "--to")


class Output:
    """The results of a command, as a context manager. A file gets its name at the end, if nothing failed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path = None if arguments.to is None else Path(arguments.to)
        self.suffix = "" if self.path is None else self.path.suffix.lower()
        self._as_json = self.suffix == ".jsonl" or (self.path is None and arguments.json)
        self._table: Any = None
        self._part: Path | None = None
        self.file: IO[Any] = sys.stdout

    def __enter__(self) -> Self:
        if self.path is not None:
            # Without the name and the ending of the file, so that no program takes it for the whole.
            self._part = self.path.with_name(f".part-{socket.gethostname()}-{os.getpid()}-results")
            is_text = self.suffix in ROWS + PLAIN
            self.file = self._part.open("w", encoding="utf-8", newline="") if is_text else self._part.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.path is None or self._part is None:
            return
        try:
            if kind is None:
                self.finish()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            if kind is None:
                os.replace(self._part, self.path)
        except OSError as fault:
            if kind is None:
                raise StorageError(f"{self.path} could not be written: {fault.strerror}") from None
        finally:
            self._part.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise StorageError(f"{self.path} could not be written: {error.strerror}") from None

    def row(self, plain: str, facts: dict[str, Any], columns: Sequence[str] = ()) -> None:
        """One result: a line for people, or its facts. `columns`: all columns of a CSV file, without `error`."""
        if self._as_json:
            self._print(json.dumps(facts, ensure_ascii=False))
        elif self.suffix == ".csv":
            if self._table is None:
                self._table = csv.DictWriter(self.file, [*(columns or facts), "error"], restval="", lineterminator="\n")
                self._table.writeheader()
            self._table.writerow(facts)
        else:
            self._print(plain)

    def finish(self) -> None:
        """What is left to write when all results are there. For subclasses."""

    def _print(self, line: str) -> None:
        print(line, file=self.file)


class Throughput:
    """Counts the texts of a command, and says at the end on standard error how many they were per second."""

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._begun, self._done, self._bad = time.monotonic(), 0, 0

    def add(self, done: int, bad: int = 0) -> None:
        """Count texts that are done, and bad lines."""
        self._done, self._bad = self._done + done, self._bad + bad

    def tell(self, device: Any, skipped: bool, world: int = 1) -> None:
        """Print the line, and how many lines were bad."""
        duration_s = time.monotonic() - self._begun
        if self._bad:
            what = "left out" if skipped else "with an error in place of a result"
            print(f"{self._bad:,} bad {'line' if self._bad == 1 else 'lines'} {what}", file=sys.stderr)
        if self._is_shown:
            rate = self._done / max(duration_s, 1e-9)
            texts = "text" if self._done == 1 else "texts"
            where = device.type if world > 1 else device
            place = f"{where}, {world} processes" if world > 1 else f"{where}"
            print(f"{self._done:,} {texts} in {duration_s:.1f} s ({rate:,.0f} per second, {place})", file=sys.stderr)
