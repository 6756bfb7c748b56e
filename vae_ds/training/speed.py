"""How fast a phase trains: tokens and operations a second, the share of the device's rate, the parts of a step.

The operations are those of the model on the positions that a step computes, padding included (`count_operations` of
`vae_ds.model`). The rate of the device is measured: that of one large product of matrices in the precision of the run.
Their quotient is the MFU (model FLOPs utilization, Chowdhery et al. 2022).
"""

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from vae_ds.distributed import Ranks
from vae_ds.engine import DTYPES
from vae_ds.model import EXTENTS, T5VAE, count_operations
from vae_ds.training.phases import PhasePlan
from vae_ds.training.preparation import Setup
from vae_ds.training.profiling import Profiler

PARTS = ("data", "forward", "backward", "update", "sums")
"""data: choose, pad and copy a batch. backward and update include the communication of the engine. sums: the one other
collective of a step, in which a rank waits for the slowest one."""

SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices whose product is timed
REPEATS = 3


class Counted(NamedTuple):
    """What all ranks have computed: target tokens, and the operations of the model with padding."""

    tokens: float
    operations: float


class Speed:
    """Counts what this process has trained since the last row of the log. Nothing of it goes into a checkpoint."""

    def __init__(self, model: T5VAE | None, ranks: Ranks, precision: str, profiler: Profiler | None = None) -> None:
        """For a phase, before an engine divides the parameters of `model`. `profiler` sees each step.

        Without `model`, as in a pretraining, operations are not counted.
        """
        self._ranks, self._profiler = ranks, profiler
        self._operations = None if model is None else count_operations(model)
        # The other ranks need no rate. They wait for rank 0, so it is measured beside idle neighbours.
        is_rated = ranks.is_main and model is not None
        self._rate = matrix_rate(ranks.device, DTYPES[precision]) if is_rated else 0.0
        self._begin_row()

    def _begin_row(self) -> None:
        self._sums = dict.fromkeys(("tokens", *EXTENTS), 0.0)
        self._seconds = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._sampled_s = 0.0
        self._is_sampled = True

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a step. The first one after a row of the log is sampled: its parts are timed, too."""
        with nullcontext() if self._profiler is None else self._profiler.step():
            began_s = time.perf_counter()
            yield
            took_s = time.perf_counter() - began_s
        self._seconds += took_s
        if self._is_sampled:
            self._sampled_s, self._is_sampled = took_s, False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time one of PARTS, in a sampled step only: a GPU has to finish before and after it."""
        if not self._is_sampled:
            yield
            return
        began_s = self._now_s()
        yield
        self._parts[name] += self._now_s() - began_s

    def count(self, totals: Mapping[str, torch.Tensor | float]) -> None:
        """Add the `tokens` and EXTENTS of a step, sums over all ranks. Without a model, only `target` of these."""
        for name in self._sums.keys() & totals.keys():
            self._sums[name] += float(totals[name])

    def counted(self) -> Counted:
        """What was counted since the last row."""
        return Counted(self._sums["tokens"], self._operations.of(self._sums) if self._operations else 0.0)

    def row(self) -> dict[str, float]:
        """What a row of the log says, and begin the next one.

        tokens_per_s: target tokens of all ranks. positions_per_s: the same with padding. tflops: 10^12 operations a
        second and rank. mfu: their share of the measured rate. peak_memory_gb: of rank 0 since its start, on a GPU what
        torch has allocated, else the resident memory. share_*: of the sampled step, the rest is Python around it.
        """
        seconds = max(self._seconds, 1e-9)
        rate = self.counted().operations / seconds / self._ranks.world
        row = {
            "tokens_per_s": self._sums["tokens"] / seconds,
            "positions_per_s": self._sums["target"] / seconds,
            "peak_memory_gb": self._peak_bytes() / 1e9,
        }
        if self._operations:
            row["tflops"] = rate / 1e12
        if self._rate:
            row["mfu"] = rate / self._rate
        if self._sampled_s:
            row |= {f"share_{name}": spent / self._sampled_s for name, spent in self._parts.items()}
        self._begin_row()
        return row

    def close(self) -> None:
        """The phase ends, or training fails: write what the profiler has."""
        if self._profiler is not None:
            self._profiler.close()

    def _now_s(self) -> float:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return time.perf_counter()

    def _peak_bytes(self) -> int:
        if self._ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._ranks.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def speed_of(setup: Setup, plan: PhasePlan, done: int, model: T5VAE) -> Speed:
    """The speed of a phase of which `done` steps are done, with the profile that the recipe asks for.

    Call it before an engine divides the parameters of `model`.
    """
    profiler = Profiler(setup.config.profile, setup.run_dir / "profile" / plan.name, plan.steps - done, setup.ranks)
    return Speed(model, setup.ranks, setup.precision, profiler)


@lru_cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices: the best of a few.

    Takes tenths of a second and, on a GPU, less than a gigabyte, which is freed. Leaves torch's generators alone.
    """
    side = SIDE[device.type]
    drawn: Any = torch.Generator().manual_seed(0)
    # A processor multiplies zeros with less power, so faster.
    one = torch.randn(side, side, generator=drawn).to(device, dtype)
    best_s = float("inf")
    for _ in range(1 + REPEATS):  # the first one loads the kernel
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began_s = time.perf_counter()
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - began_s)
    del one
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2 * side**3 / best_s
