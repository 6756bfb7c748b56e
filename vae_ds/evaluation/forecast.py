"""How long an evaluation will take, from the time of one of its first forward passes, told before the hours are spent.

The unit of work is a token of a forward pass on this rank: sentences (or importance samples) times the longest of them.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from vae_ds.distributed import Ranks

LONG_S = 600.0  # an evaluation that takes longer than this is announced
WARM_UP = 1  # forward passes that are not representative: they load kernels


class Forecast:
    """Measures one forward pass of the decoder, and announces on rank 0 what all of them will take.

    tokens: the work of this rank by task, in the words of the announcement.
    passes: number of forward passes that will be timed.
    """

    def __init__(self, ranks: Ranks, tokens: Mapping[str, float], passes: int) -> None:
        self._ranks, self._tokens = ranks, tokens
        self._measured = min(WARM_UP, passes - 1)  # the number of the pass that is measured
        self._passed = 0

    @contextmanager
    def timed(self, tokens: int) -> Iterator[None]:
        """Time a forward pass over so many tokens, if it is the one to measure."""
        number, self._passed = self._passed, self._passed + 1
        if number != self._measured or not self._ranks.is_main:
            yield
            return
        self._wait()
        begun = time.monotonic()
        yield
        self._wait()
        self._announce((time.monotonic() - begun) / tokens)

    def _wait(self) -> None:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)

    def _announce(self, of_token_s: float) -> None:
        took_s = {task: tokens * of_token_s for task, tokens in self._tokens.items()}
        if sum(took_s.values()) < LONG_S:
            return
        parts = ", ".join(f"{_words(duration_s)} for {task}" for task, duration_s in took_s.items())
        line = f"the forward passes of this evaluation take about {_words(sum(took_s.values()))}: {parts}"
        print(line, file=sys.stderr, flush=True)


def _words(duration_s: float) -> str:
    return f"{duration_s / 3600:.1f} hours" if duration_s >= 3600 else f"{duration_s / 60:.0f} minutes"
