"""The results of the GPU check: one JSON file per cell, written at once, so that a second call continues.

A cell is `done`, `failed` (one line, and a file with the traceback) or `skipped` (the reason). Only `done` is final.
"""

import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vae_ds.bench.gpu.cells import Cell
from vae_ds.runtime import records

Result = dict[str, Any]
STATES = ("done", "failed", "skipped")
CURRENT = "current.json"
"""What a process is measuring now: the id of the cell, and when it began."""


def read(to: Path, cells: Sequence[Cell]) -> dict[str, Result]:
    """The results in the directory `to` by the id of their cell. A broken file counts as missing."""
    found = {}
    for cell in cells:
        try:
            result = json.loads(_file(to, cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(result, dict) and result.get("state") in STATES:
            found[cell.id] = result
    return found


def done(to: Path, cell: Cell, values: Mapping[str, Any], seconds: float, device: str) -> None:
    """Write the values of a cell, with the versions and the device that they are of."""
    _write(to, cell, "done", values=dict(values), seconds=round(seconds, 1), environment=_environment(device))


def failed(to: Path, cell: Cell, error: BaseException | str, seconds: float = 0.0) -> None:
    """Write that a cell has failed: the first line of the error, and its traceback into a file beside the result."""
    facts: dict[str, Any] = {"reason": str(error), "seconds": round(seconds, 1)}
    if isinstance(error, BaseException):
        lines = str(error).strip().splitlines()
        file = _file(to, cell).with_suffix(".traceback.txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        facts |= {"reason": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300], "traceback": file.name}
    _write(to, cell, "failed", **facts)


def skipped(to: Path, cell: Cell, reason: str) -> None:
    """Write why a cell was not measured."""
    _write(to, cell, "skipped", reason=reason)


def _write(to: Path, cell: Cell, state: str, **facts: Any) -> None:
    about = {"part": cell.part, "cell": cell.name, "state": state, "expected_s": cell.expected_s}
    records.write_json(_file(to, cell), about | facts)


def _file(to: Path, cell: Cell) -> Path:
    return to / "cells" / f"{cell.id}.json"


def _environment(device: str) -> dict[str, Any]:
    found = records.environment(1, device)
    kept = ("python", "packages", "commit", "commit_modified", "device", "devices", "time")
    return {key: found[key] for key in kept}
