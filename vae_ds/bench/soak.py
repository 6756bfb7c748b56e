"""The soak test: a long run on several ranks that are killed repeatedly.

It measures whether the run ends with the same weights as an undisturbed run, and whether its memory stays constant.
The memory of a rank is the smallest resident set size within some seconds, in MB of 10^6 bytes, which excludes the
temporary memory of a step; glibc is set to return freed memory at once. Steps are applied optimizer steps of the whole
run.
"""

import itertools
import json
import math
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

from vae_ds import config as configuration
from vae_ds.bench import ranks
from vae_ds.config import RunConfig
from vae_ds.errors import ConfigError, Failed
from vae_ds.runtime import records

WARM_STEPS = 400  # at the start of each stretch: allocators and caches fill, and the first validation allocates memory
SAMPLE_S = 0.25
WINDOW = 40  # readings per sample; the sample is their minimum
END_S = 90.0


@dataclass
class Stretch:
    """The time between a start of the ranks and their kill or end.

    `samples` are pairs of the step and the MB of each rank, one per window. `validated_step` is the step at which the
    first validation was seen to be complete, None if there was none.
    """

    rank_killed: int | None = None
    first_step: int | None = None
    validated_step: int | None = None
    last_step: int = 0
    samples: list[tuple[int, list[float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Soak:
    """The result of a soak test.

    The memory slope is the largest of all ranks, None if no stretch was long enough. The weights are compared only if
    requested and if the run is done; otherwise `same_weights` is None.
    """

    steps: int
    processes: int
    kills: int
    duration_s: float
    steps_repeated: int
    memory_mb: float
    memory_slope_mb_per_1000_steps: float | None
    same_weights: bool | None


def soak(
    recipe: str,
    run_dir: Path,
    *,
    overrides: Sequence[str] = (),
    processes: int = 2,
    kill_every_s: float = 180.0,
    minutes: float | None = None,
    seed: int = 0,
    compare: bool = True,
) -> Soak:
    """Train `recipe` into `run_dir`/soak, and kill a random rank (SIGKILL) about every `kill_every_s` seconds.

    No rank is killed after the last step. The run must write a checkpoint between two kills, otherwise it makes no
    progress: set `checkpoint.every_steps` of the recipe accordingly. After `minutes`, the soak test ends with the next
    kill, even if the run is not done. With `compare`, and if the run is done, the recipe is trained again, undisturbed,
    into `run_dir`/quiet, and the weights are compared bit by bit.

    Writes `run_dir`/soak.json, and the samples to `run_dir`/stretches.json. Raises ConfigError if the directory already
    contains a soak test or the recipe is wrong, Failed if the ranks exit before the run is done without being killed.
    """
    configuration.load(RunConfig, recipe, overrides)  # report a wrong recipe here; the ranks report only to their log
    if (run_dir / "soak").exists():
        raise ConfigError(f"{run_dir} already contains a soak test; choose another --run-dir")
    draw = random.Random(seed)
    began_s = time.monotonic()
    stretches: list[Stretch] = []
    target = run_dir / "soak"
    while not _is_done(target) and (minutes is None or time.monotonic() - began_s < 60 * minutes):
        kill_after_s = kill_every_s * draw.uniform(0.5, 1.5)
        stretches.append(_stretch(recipe, target, overrides, processes, kill_after_s, draw.randrange(processes)))
        if stretches[-1].rank_killed is None and not _is_done(target):
            raise Failed(f"the ranks exited before the run was done, without a kill; see {run_dir / 'output.log'}")
    starts = [stretch.first_step or 0 for stretch in stretches[1:]]
    result = Soak(
        steps=stretches[-1].last_step,
        processes=processes,
        kills=sum(stretch.rank_killed is not None for stretch in stretches),
        duration_s=round(time.monotonic() - began_s, 1),
        steps_repeated=sum(
            max(0, before.last_step - start + 1) for before, start in zip(stretches, starts, strict=False)
        ),
        memory_mb=round(max((max(mb) for one in stretches for _, mb in one.samples), default=0.0), 1),
        memory_slope_mb_per_1000_steps=memory_slope(stretches),
        same_weights=None,
    )
    # Write the result before the undisturbed run, which takes long too.
    records.write_json(run_dir / "stretches.json", [asdict(stretch) for stretch in stretches])
    records.write_json(run_dir / "soak.json", asdict(result))
    if compare and _is_done(target):
        _stretch(recipe, run_dir / "quiet", overrides, processes, None, 0)
        result = replace(result, same_weights=_same_weights(run_dir / "soak", run_dir / "quiet"))
        records.write_json(run_dir / "soak.json", asdict(result))
    return result


def memory_slope(stretches: Sequence[Stretch], warm_steps: int = WARM_STEPS) -> float | None:
    """The growth of the memory in MB per 1000 steps: the largest of all ranks.

    The growth of a rank is the median slope over all pairs of samples of one stretch (the Theil-Sen estimator). The
    median is robust against outliers: samples whose whole window lies in a validation or in the copy for a checkpoint.
    The first `warm_steps` steps of each stretch, and the steps before the end of its first validation, are excluded.
    Returns None if fewer than 20 pairs remain.
    """
    slopes: list[list[float]] = []
    for stretch in stretches:
        if stretch.first_step is None or stretch.validated_step is None:
            continue
        begin = max(stretch.first_step + warm_steps, stretch.validated_step + 1)
        warm = [sample for sample in stretch.samples if sample[0] >= begin]
        for (before, had), (step, has) in itertools.combinations(warm, 2):
            if step > before:
                slopes.append([(new - old) / (step - before) for new, old in zip(has, had, strict=True)])
    return round(float(np.median(slopes, axis=0).max()) * 1000, 3) if len(slopes) >= 20 else None


def _stretch(
    recipe: str, run: Path, overrides: Sequence[str], processes: int, kill_after_s: float | None, victim: int
) -> Stretch:
    """Start the ranks and sample their memory. Kill one after `kill_after_s`, and wait until all have ended."""
    stretch = Stretch()
    started = _start(recipe, run, overrides, processes)
    since = time.time()
    advanced_s: float | None = None
    validations = _validations(run)
    readings: list[list[float]] = []

    def note_validation(step: int) -> None:
        if stretch.validated_step is None and _validations(run) > validations:
            stretch.validated_step = step

    try:
        while all(rank.poll() is None for rank in started):
            time.sleep(SAMPLE_S)
            step, memory_mb = _last_step(run, since), _memory_mb(started)
            if step is None or memory_mb is None:
                continue
            if stretch.first_step is None:
                stretch.first_step = step
            note_validation(step)
            readings.append(memory_mb)
            if len(readings) == WINDOW:
                stretch.samples.append((step, [min(of_rank) for of_rank in zip(*readings, strict=True)]))
                readings = []
            # A resumed run starts with its earlier rows. Killed before it adds a row, it would make no progress.
            if advanced_s is None and step > stretch.first_step:
                advanced_s = time.monotonic()
            lasted_s = 0.0 if advanced_s is None else time.monotonic() - advanced_s
            due = kill_after_s is not None and lasted_s > kill_after_s
            # After its last step, a run only validates and writes. A resumed run would have nothing to train.
            if due and step < (records.read_status(run) or {}).get("total_steps", math.inf):
                stretch.rank_killed = victim
                started[victim].send_signal(signal.SIGKILL)
                break
        deadline_s = time.monotonic() + END_S
        while any(rank.poll() is None for rank in started) and time.monotonic() < deadline_s:
            time.sleep(0.1)
    finally:
        for rank in started:
            rank.kill()
            rank.wait()
    stretch.last_step = _last_step(run, since) or 0
    note_validation(stretch.last_step)  # the last validation may end between the last sample and the exit
    return stretch


def _start(recipe: str, run: Path, overrides: Sequence[str], processes: int) -> list[subprocess.Popen[bytes]]:
    words = ["-m", "vae_ds", "train", recipe, "--run-dir", str(run)]
    return ranks.start([*words, "--set", *overrides] if overrides else words, processes, run.parent / "output.log")


def _memory_mb(started: Sequence[subprocess.Popen[bytes]]) -> list[float] | None:
    """The resident set size of each rank. None if one of them has ended; a zombie has no memory."""
    try:
        memory_mb = [psutil.Process(rank.pid).memory_info().rss / 1e6 for rank in started]
    except psutil.Error:
        return None
    return memory_mb if all(memory_mb) else None


def _last_step(run: Path, since: float) -> int | None:
    """The last logged step, None if nothing has been logged since the time `since`."""
    file = run / "metrics.jsonl"
    if not file.is_file() or file.stat().st_mtime < since:
        return None
    whole = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return int(json.loads(whole[-1])["step"]) if whole else None


def _validations(run: Path) -> int:
    file = run / "evaluations.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def _is_done(run: Path) -> bool:
    return (records.read_status(run) or {}).get("state") == "done"


def _same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
