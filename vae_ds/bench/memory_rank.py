"""One rank of `vae-ds bench memory`: python -m vae_ds.bench.memory_rank RUN TO SETTINGS... trains and reads its memory.

Writes TO-RANK.json. `own` is the number of bytes before the model is loaded, `parts` the largest number in each part
of the run. `copies`, on rank 0, is how long a checkpoint made training wait for the copy of the state, as a multiple
of a plain copy of as many bytes. Only anonymous memory counts: pages of a mapped file can be dropped at any time.
"""

import gc
import json
import os
import re
import statistics
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import torch

from vae_ds import config as configuration
from vae_ds import distributed, engine, training
from vae_ds.config import RunConfig
from vae_ds.runtime import records

SAMPLE_S = 0.005
PLAIN_COPIES = 5
# The part of a run, by the innermost of these functions of the package that is running.
PARTS = {
    "restore": "restore",
    "build_model": "load",
    "build_engine": "engine",
    "step": "step",
    "validate": "validation",
    "save": "checkpoint",
    "validated": "export",
    "last": "export",
    "finish": "export",
    "load": "engine",
    "state": "hand-over",
}


class Sampler(threading.Thread):
    """Keeps the largest memory of each part."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.parts: dict[str, int] = {}
        self.is_over = threading.Event()
        self._main = threading.main_thread().ident

    def run(self) -> None:
        while not self.is_over.wait(SAMPLE_S):
            used = anonymous_bytes()
            part = _part(sys._current_frames().get(self._main or 0))
            self.parts[part] = max(used, self.parts.get(part, 0))


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.M)
    assert found is not None
    return int(found[1]) * 1024


def _part(frame: FrameType | None) -> str:
    while frame is not None:
        if "vae_ds/training" in frame.f_code.co_filename and frame.f_code.co_name in PARTS:
            return PARTS[frame.f_code.co_name]
        frame = frame.f_back
    return "other"


def _copies(run_dir: Path, world: int) -> float:
    """The median wait for the copy of a checkpoint, over that of plain copies to new memory; one thread each."""
    written = records.read_rows(run_dir / "checkpoints.jsonl")
    state_B = torch.ones(int(statistics.median(one["size_bytes"] for one in written)) // world, dtype=torch.uint8)
    plain_s = []
    for _ in range(PLAIN_COPIES):
        began_s = time.monotonic()
        state_B.clone()
        plain_s.append(time.monotonic() - began_s)
    return statistics.median(one["copy_s"] for one in written) / statistics.median(plain_s)


def main(run_dir: str, to: str, settings: list[str]) -> None:
    """Measure one training."""
    config = configuration.load(RunConfig, "demo", settings)
    ranks = distributed.start()
    engine.resolve(config.deepspeed, config.precision)  # loads DeepSpeed
    gc.collect()
    own = anonymous_bytes()
    sampler = Sampler()
    sampler.start()
    training.train(config, run_dir)
    sampler.is_over.set()
    sampler.join()
    found: dict[str, object] = {"own": own, "parts": sampler.parts}
    if ranks.is_main:
        found["copies"] = _copies(Path(run_dir), ranks.world)
    Path(f"{to}-{ranks.rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
    sys.stdout.flush()
    os._exit(0)
