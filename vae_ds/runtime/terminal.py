"""A long command outlives its terminal: when a pipe closes or a connection drops, its output goes to a file."""

import os
import sys
from pathlib import Path
from typing import Any, TextIO

LOG = "terminal.log"


class LastingStream:
    """A text stream that continues in a file once nobody can read it.

    After the first write that fails (a closed pipe, a terminal that is gone), the file replaces the stream's
    descriptor, so that output of libraries in other languages goes there, too.
    """

    def __init__(self, stream: TextIO, log: Path) -> None:
        self._stream, self._log = stream, log
        self._is_moved = False

    def write(self, text: str) -> int:
        """Write to the stream, or to the file once the stream is closed."""
        try:
            return self._stream.write(text)
        except OSError:
            self._move()
            return self._stream.write(text)

    def flush(self) -> None:
        """Flush the stream, or the file once the stream is closed."""
        try:
            self._stream.flush()
        except OSError:
            self._move()
            self._stream.flush()

    def writelines(self, lines: Any) -> None:
        """Write lines one after the other."""
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        """Whether a person still reads the stream."""
        return not self._is_moved and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _move(self) -> None:
        self._is_moved = True
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError:
            file = os.open(os.devnull, os.O_WRONLY)
        # What the stream still buffers is written to the file with the next flush.
        os.dup2(file, self._stream.fileno())
        os.close(file)


def outlive_terminal(folder: Path) -> None:
    """Let standard output and standard error of this process continue in FOLDER/terminal.log when nobody reads them."""
    log = folder / LOG
    sys.stdout, sys.stderr = LastingStream(sys.stdout, log), LastingStream(sys.stderr, log)
