"""How a process ends: exit codes, the file that records them, and the flag that signals set.

The ranks agree on the flag at the end of a step, save a checkpoint, and exit with 75.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

# EXIT_STOPPED is EX_TEMPFAIL: the run was stopped on request. EXIT_LOST is EX_UNAVAILABLE: another rank or its machine
# is gone or hangs. In both cases the same command resumes the run.
EXIT_FAULT, EXIT_USER, EXIT_LOST, EXIT_STOPPED = 1, 2, 69, 75
# SIGHUP: the connection to the terminal is gone.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# A scheduler can send its warning while the libraries are still loading. Without a handler, it would end the process.
# The other signals keep their default effect until the training begins: they end the preparation of the text at once.
EARLY_SIGNALS = (signal.SIGUSR1,)


def own_rank() -> str:
    """The rank of this process before it joins a process group, from the launcher's variable or from srun's."""
    in_step = "SLURM_STEP_NUM_TASKS" in os.environ
    return os.environ.get("RANK") or (os.environ.get("SLURM_PROCID", "0") if in_step else "0")


def note_exit(code: int) -> None:
    """Write the exit code to the file that our launcher names: DeepSpeed's launcher can exit with 0 after a failure.

    Only one rank writes it: rank 0, or on another node the rank in VAE_DS_EXIT_RANK, which is the node's first.
    """
    path = os.environ.get("VAE_DS_EXIT_FILE")
    if path and own_rank() == os.environ.get("VAE_DS_EXIT_RANK", "0"):
        Path(path).write_text(str(code), encoding="ascii")


class StopFlag:
    """The name of the signal that asked this rank to stop, if any. A second SIGINT raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.raised: str | None = None

    def install(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> dict[signal.Signals, Any]:
        """Handle these signals and return the previous handlers. Does nothing in a thread other than the main one.

        A SIGHUP that is ignored stays ignored: `nohup` asks for that.
        """
        if threading.current_thread() is not threading.main_thread():
            return {}
        heard = [one for one in signals if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
        return {number: signal.signal(number, self._note) for number in heard}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.raised == "SIGINT":
            raise KeyboardInterrupt
        self.raised = signal.Signals(number).name


@contextmanager
def heeded(stop: StopFlag | None) -> Iterator[StopFlag]:
    """Let `stop` handle all stop signals. If None, use a new flag and restore the previous handlers at the end."""
    flag = stop or StopFlag()
    previous = flag.install()
    try:
        yield flag
    finally:
        for number, handler in previous.items() if stop is None else ():
            # None: the handler was not installed from Python, but by a program that embeds it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def listening() -> StopFlag:
    """A new flag that handles the early signals from now on."""
    stop = StopFlag()
    stop.install(EARLY_SIGNALS)
    return stop
