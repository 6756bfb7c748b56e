"""Runs the parts of the GPU check, each in a process of its own, within some minutes.

A process that ends too early, by an error of CUDA or for lack of memory, takes down the cell that it was measuring. A
new process goes on with the next cell.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import torch

from vae_ds.bench import ranks
from vae_ds.bench.gpu import cells, results, tables
from vae_ds.bench.gpu.cells import REFERENCE, START_S, Cell
from vae_ds.errors import ConfigError
from vae_ds.runtime import records

POLL_S = 0.2
WORKER = ("-m", "vae_ds.bench.gpu.worker")
# A cell that takes so much longer than expected hangs.
PATIENCE, LEAST_PATIENCE_S = 5.0, 120.0
NO_GPU = (
    "torch finds no GPU here; run the check on a machine with one, or use --cpu for its small half, --only reference "
    "for the part that needs no GPU, or --dry-run for the list of its parts"
)

Tell = Callable[[str], None]


def check(
    to: Path, minutes: float = 10.0, only: Sequence[str] | None = None, cpu: bool = False, tell: Tell = print
) -> dict[str, results.Result]:
    """Measure what is missing in the directory `to`, within `minutes`, and write `to`/gpu.json and `to`/gpu.md.

    only: names of parts, None for all. cpu: the small half, on the CPU. tell: gets a line per part and cell.

    Returns the results of the chosen cells by their id. Raises ConfigError without a GPU, or for an unknown part.
    """
    chosen = cells.chosen(only, cpu)
    if not cpu and not torch.cuda.is_available() and any(cell.part != REFERENCE for cell in chosen):
        raise ConfigError(NO_GPU)
    until_s = time.time() + 60 * minutes
    known = results.read(to, chosen)
    missing = [cell for cell in chosen if known.get(cell.id, {}).get("state") != "done"]
    if len(missing) < len(chosen):
        tell(f"{len(chosen) - len(missing)} of {len(chosen)} results are in {to} already")
    # On a CPU, no error takes down a process, so one is enough.
    groups = [missing] if cpu else [list(group) for _, group in groupby(missing, lambda cell: cell.part)]
    for group in filter(None, groups):
        _part(to, group, cpu, until_s, tell)
        _write(to, cpu)
    _write(to, cpu)
    return results.read(to, chosen)


def listing(only: Sequence[str] | None = None, cpu: bool = False) -> str:
    """The parts in their order with the number of cells and the expected time, for people."""
    rows = []
    for part, group in groupby(cells.chosen(only, cpu), lambda cell: cell.part):
        every = list(group)
        rows.append((part, len(every), START_S + sum(cell.expected_s for cell in every), cells.PARTS[part]))
    lines = [f"{'part':<13}{'cells':>6}{'expected':>11}  what"]
    lines += [f"{part:<13}{count:>6}{seconds:>9.0f} s  {what}" for part, count, seconds, what in rows]
    return "\n".join([*lines, f"{'all':<13}{sum(row[1] for row in rows):>6}{sum(row[2] for row in rows):>9.0f} s"])


def _part(to: Path, group: Sequence[Cell], cpu: bool, until_s: float, tell: Tell) -> None:
    """Measure the cells of a part. Each of them has a new result afterwards."""
    names = list(dict.fromkeys(cell.part for cell in group))
    missing = list(group)
    while missing:
        left_s = until_s - time.time()
        fitting = [cell for cell in missing if START_S + cell.expected_s <= left_s]
        for cell in missing if not fitting else ():
            need_s = START_S + cell.expected_s
            results.skipped(to, cell, f"{max(0.0, left_s):.0f} s were left, {need_s:g} s are expected")
        if not fitting:
            break
        expected_s = START_S + sum(cell.expected_s for cell in missing)
        tell(f"{', '.join(names)}: {len(missing)} cells, about {expected_s:.0f} s, {left_s:.0f} s left")
        began_s = time.time()
        reason = _process(to, missing, cpu, until_s)
        missing = _without_result(to, missing, began_s, reason)
    after = results.read(to, group)
    for cell in group:
        result = after[cell.id]
        tell(f"  {result['state']:<8}{cell.id}" + (f": {result['reason']}" if result.get("reason") else ""))


def _process(to: Path, missing: Sequence[Cell], cpu: bool, until_s: float) -> str:
    """Start a process for these cells and wait for it. Returns how it has ended, in words."""
    (to / results.CURRENT).unlink(missing_ok=True)
    part = missing[0].part
    log = to / "logs" / f"{'cpu' if cpu else part}.log"
    # The reference is of the CPU. All other parts see the devices that this process sees.
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if cpu or part == REFERENCE else {}
    scale = "cpu" if cpu else "gpu"
    words = [*WORKER, str(to), scale, str(until_s), *(cell.id for cell in missing)]
    (process,) = ranks.start(words, 1, log, env=hidden | _package(), keeps_freed_memory=True)
    began_s = time.time()
    expected_s = {cell.id: cell.expected_s for cell in missing}
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            current = _current(to)
            since_s = began_s if current is None else current[1]
            limit_s = max(LEAST_PATIENCE_S, PATIENCE * (START_S if current is None else expected_s[current[0]]))
            if time.time() - since_s > limit_s:
                return f"did not end within {limit_s:.0f} s; see {log}"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    return f"its process ended with code {process.returncode}; see {log}"


def _without_result(to: Path, missing: Sequence[Cell], began_s: float, reason: str) -> list[Cell]:
    """The cells that a process has left. The one that it was measuring has failed, for this `reason`."""
    current = _current(to)
    left = []
    for cell in missing:
        file = to / "cells" / f"{cell.id}.json"
        if file.is_file() and file.stat().st_mtime >= began_s - 1:
            continue
        # Without a current cell, the process could not even start: another one cannot either.
        if current is None or current[0] == cell.id:
            results.failed(to, cell, reason)
        else:
            left.append(cell)
    return left


def _current(to: Path) -> tuple[str, float] | None:
    try:
        found = json.loads((to / results.CURRENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(found["cell"]), float(found["began_s"])


def _package() -> dict[str, str]:
    """The package need not be installed."""
    root = str(Path(__file__).resolve().parents[3])
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _write(to: Path, cpu: bool) -> None:
    every = cells.cells(cpu)
    found = results.read(to, every)
    records.write_json(to / "gpu.json", {"cells": [found[cell.id] for cell in every if cell.id in found]})
    records.replace_file(to / "gpu.md", tables.markdown(every, found).encode())
