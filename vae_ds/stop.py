"""The flag that signals set: the ranks agree on it at a step boundary, save, and exit with 75."""

import signal
from collections.abc import Sequence
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A scheduler's warning may come while the libraries still load, and would end a process that has not asked for it. The
# others keep their ordinary effect until the training begins: what prepares the text ends at once.
EARLY_SIGNALS = (signal.SIGUSR1,)


class StopFlag:
    """Whether a signal asked this rank to stop, and which. A second SIGINT interrupts at once, for the impatient."""

    def __init__(self) -> None:
        self.raised: str | None = None

    def install(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        """Take over the signals. Only the main thread of a process may do so."""
        for number in signals:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.raised == "SIGINT":
            raise KeyboardInterrupt
        self.raised = signal.Signals(number).name


def listening() -> StopFlag:
    """A flag that hears the early signals from now on."""
    stop = StopFlag()
    stop.install(EARLY_SIGNALS)
    return stop
