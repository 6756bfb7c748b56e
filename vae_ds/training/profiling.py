"""A profile of a few training steps of rank 0: a trace, a table of the operators, and on a GPU its memory.

Files in `profile/PHASE/` of the run directory:

- `trace.json.gz`: what ran when, for https://ui.perfetto.dev or chrome://tracing.
- `operators.txt`: the operators that took most time, with shapes, calls and memory.
- `memory.pickle`: on a GPU, each allocation of these steps, for https://pytorch.org/memory_viz.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from vae_ds.config import ProfileConfig
from vae_ds.distributed import Ranks
from vae_ds.runtime import records

log = logging.getLogger(__name__)

SHOWN_OPERATORS = 40
KEPT_ALLOCATIONS = 1_000_000


class Profiler:
    """Profiles the steps `start` to `start + steps - 1` of a phase, counted from 1 in this process, on rank 0."""

    def __init__(self, settings: ProfileConfig | None, folder: Path, left: int, ranks: Ranks) -> None:
        """With `settings` None, and on other ranks, every step runs as it is. `left`: the phase has so many steps."""
        self._settings = settings if ranks.is_main else None
        self._folder, self._left = folder, left
        self._on_gpu = ranks.device.type == "cuda"
        self._step = 0
        self._profile: Any = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """A training step inside. The last profiled one writes the files, which takes seconds."""
        settings = self._settings
        if settings is None:
            yield
            return
        self._step += 1
        if self._step == settings.start:
            self._begin()
        yield
        if self._profile is not None and self._step >= min(settings.start + settings.steps - 1, self._left):
            self._end()

    def close(self) -> None:
        """Write what there is, if a training fails or stops before the last step to profile."""
        if self._profile is not None:
            self._end()
        elif self._settings is not None and self._step < self._settings.start:
            log.warning("profile.start %d: not reached in %d steps", self._settings.start, self._step)

    def _begin(self) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=KEPT_ALLOCATIONS)
        self._profile = torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True)
        self._profile.start()

    def _end(self) -> None:
        profile, self._profile = self._profile, None
        if self._on_gpu:
            torch.cuda.synchronize()
        profile.stop()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self._folder / "trace.json.gz"))
            key = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
            found = profile.key_averages(group_by_input_shape=True).table(key, row_limit=SHOWN_OPERATORS)
            records.replace_file(self._folder / "operators.txt", found.encode())
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(self._folder / "memory.pickle"))
        except OSError as error:
            log.warning("no profile was written: %s", error)
        finally:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)
        log.info("profile: %s", self._folder)
