"""`vae-ds bench speed`: the speed of this package beside what it is compared with, in one table.

Each measure runs its contestants in turns (`contest`), so that a slow minute of the machine hits all of them, and gives
the median of the paired values with their quartiles. A row is marked as noisy if these are far apart, if there were
fewer than three pairs, or if other programs used more than 5% of the cores. Rows that need a GPU are empty without one.
"""

import logging
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vae_ds.bench import speed_other, speed_training
from vae_ds.bench.contest import NOISY_LOAD, Neighbours
from vae_ds.bench.speed_rows import Place, Row
from vae_ds.errors import ConfigError, Failed
from vae_ds.runtime import cores, records

log = logging.getLogger(__name__)

ON_GPUS = {
    "mfu": (
        ("one GPU, bf16, t5-base and t5-large shapes, lengths of yahoo", 50.0),
        ("the same, lengths of snli", 40.0),
    ),
    "loop": (("one GPU, t5-base shape", 5.0),),
}
MEASURES: dict[str, Callable[[Place], list[Row]]] = {
    "published": speed_training.published,
    "memory": speed_training.memory,
    "huggingface": speed_training.huggingface,
    "loop": speed_training.loop,
    "ranks": speed_training.ranks,
    "compile": speed_training.compiled,
    "phases": speed_training.phases_by_count,
    "mfu": speed_training.mfu,
    "iw": speed_other.iw,
    "evaluation": speed_other.evaluation,
    "padding": speed_other.padding,
    "start": speed_other.start,
}
"""The measures by name, in the order of the table."""


def speed(
    run_dir: Path, *, only: Sequence[str] = (), is_quick: bool = False, lines: int = 1_000_000
) -> tuple[dict[str, Any], list[Row]]:
    """Run the measures `only`, or all. Returns the facts of the measurement and its rows.

    is_quick: the smallest size: it shows that the measures work, in seconds. lines: the longest text of `start`.

    Writes `run_dir`/speed.json after each measure. A measure that fails gives an empty row with the reason. Raises
    ConfigError for an unknown measure.
    """
    for name in only:
        if name not in MEASURES:
            raise ConfigError(f"--only {name}: the measures are {', '.join(MEASURES)}")
    facts = records.environment(1, "cpu") | {
        "processor": _processor(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": cores(),
        "quick": is_quick,
    }
    work = run_dir / "work"
    shutil.rmtree(work, ignore_errors=True)
    place, rows = Place(work, is_quick, lines), list[Row]()
    for name, measure in MEASURES.items():
        if only and name not in only:
            continue
        log.info("bench speed: %s", name)
        rows += _measured(name, measure, place)
        rows += [_on_gpu(name, case, goal) for case, goal in ON_GPUS.get(name, ())]
        records.write_json(run_dir / "speed.json", {"facts": facts, "rows": [as_json(row) for row in rows]})
    shutil.rmtree(work, ignore_errors=True)
    return facts, rows


def as_json(row: Row) -> dict[str, Any]:
    """A row for other programs."""
    return asdict(row) | {"is_met": row.is_met}


def table(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """The rows for people, as a Markdown table."""
    lines = ["| measure | case | value | quartiles | pairs | goal | met |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        quartiles = "" if row.low is None or row.high is None or row.pairs < 2 else f"{row.low:.3g} to {row.high:.3g}"
        value = (
            row.reason if row.value is None else f"{row.value:.3g} {row.unit}" + (" (noisy)" if row.is_noisy else "")
        )
        met = {None: "", True: "yes", False: "no"}[row.is_met]
        cells = [row.measure, row.case, value, quartiles, str(row.pairs or ""), _goal(row), met]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    quick = ["The quick size: the numbers mean nothing."] if facts["quick"] else []
    return "\n".join([*lines, "", f"{facts['date']}; {facts['processor']}, {facts['cores']} cores; {versions}", *quick])


def _measured(name: str, measure: Callable[[Place], list[Row]], place: Place) -> list[Row]:
    neighbours = Neighbours()
    try:
        rows = measure(place)
    except (Failed, ImportError) as error:
        return [Row(name, "", "", reason=f"not measured: {error}")]
    load = neighbours.load()
    # What is counted does not depend on the machine.
    is_loaded = load > NOISY_LOAD and name not in ("padding", "memory")
    return [
        replace(row, is_noisy=row.is_noisy or is_loaded, facts={**row.facts, "load_of_others": round(load, 3)})
        for row in rows
    ]


def _processor() -> str:
    try:
        told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        told = None
    return told[1].strip() if told else platform.machine()


def _on_gpu(name: str, case: str, goal: float) -> Row:
    reason = "needs a GPU" if not torch.cuda.is_available() else "see `vae-ds bench gpu`"
    least_most = (goal, None) if name == "mfu" else (None, goal)
    return Row(name, case, "%", goal=least_most, reason=reason)


def _goal(row: Row) -> str:
    least, most = row.goal
    words = [f"at least {least:.3g}"] if least is not None else []
    return " and ".join([*words, *([f"at most {most:.3g}"] if most is not None else [])])
