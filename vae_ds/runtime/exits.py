"""How a process ends: exit codes, who reports them, and the flag that signals set.

The ranks agree on the flag at a step boundary, save, and exit with 75.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

# EX_TEMPFAIL for what was stopped on request and EX_UNAVAILABLE where another rank, or its machine, is gone or hangs:
# the same command resumes.
EXIT_FAULT, EXIT_USER, EXIT_LOST, EXIT_STOPPED = 1, 2, 69, 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A scheduler's warning may come while the libraries still load, and would end a process that has not asked for it. The
# others keep their ordinary effect until the training begins: what prepares the text ends at once.
EARLY_SIGNALS = (signal.SIGUSR1,)


def own_rank() -> str:
    """This process's rank, before it has joined any group: from a launcher's variable, or from srun's."""
    in_step = "SLURM_STEP_NUM_TASKS" in os.environ
    return os.environ.get("RANK") or (os.environ.get("SLURM_PROCID", "0") if in_step else "0")


def note_exit(code: int) -> None:
    """Leave the exit code where our launcher asks for it: DeepSpeed's can exit 0 after a failure.

    One rank tells, rank 0 unless the launcher of another node asks for its own first rank's.
    """
    place = os.environ.get("VAE_DS_EXIT_FILE")
    if place and own_rank() == os.environ.get("VAE_DS_EXIT_RANK", "0"):
        Path(place).write_text(str(code), encoding="ascii")


class StopFlag:
    """Whether a signal asked this rank to stop, and which. A second SIGINT interrupts at once, for the impatient."""

    def __init__(self) -> None:
        self.raised: str | None = None

    def install(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> dict[signal.Signals, Any]:
        """Take over the signals; who had them before. Only a main thread may: elsewhere nothing is done."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._note) for number in signals}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.raised == "SIGINT":
            raise KeyboardInterrupt
        self.raised = signal.Signals(number).name


@contextmanager
def heeded(stop: StopFlag | None) -> Iterator[StopFlag]:
    """`stop`, with all signals taken over from here on; without one a new flag, which gives them back at the end."""
    flag = stop or StopFlag()
    before = flag.install()
    try:
        yield flag
    finally:
        for number, handler in before.items() if stop is None else ():
            # None: of a program that embeds Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def listening() -> StopFlag:
    """A flag that hears the early signals from now on."""
    stop = StopFlag()
    stop.install(EARLY_SIGNALS)
    return stop
