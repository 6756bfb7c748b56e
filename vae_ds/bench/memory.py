"""`vae-ds bench memory`: the memory of a rank in each part of a run, beside what `vae-ds plan` expects.

A base with random weights of a stated size is trained for a few steps in two phases, and then resumed. Each rank reads
its own memory every few milliseconds, with the part of the run that it is in (`memory_rank`). On a CPU, the device and
the host share one memory. MB is 10^6 bytes.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vae_ds import authoring, engine
from vae_ds import config as configuration
from vae_ds.bench import profiles, ranks
from vae_ds.config import RunConfig
from vae_ds.errors import Failed
from vae_ds.runtime import records

STEPS = 3


@dataclass(frozen=True)
class Row:
    """One ds_config on so many ranks. Values are those of the rank with the largest, in MB above `own_mb`.

    own_mb: resident memory before the model is loaded: Python, torch, DeepSpeed, the process group.
    expected_mb: what `vae-ds plan` expects for a training step, the larger of both phases.
    parts: largest memory in each part of the run: `step` is the training step, `resumed ...` is of the second run.
    bytes_per_parameter: the largest of all parts, less the activations, per parameter.
    """

    ds_config: str
    precision: str
    processes: int
    parameters: int
    own_mb: float
    activations_mb: float
    expected_mb: float
    parts: dict[str, float]
    bytes_per_parameter: float


def memory(
    run_dir: Path,
    *,
    size: str = "t5-small",
    ds_configs: Sequence[str] = ("zero0", "zero1", "zero2", "zero3"),
    precision: str = "fp32",
    processes: int = 1,
    batch: int = 8,
    overrides: Sequence[str] = (),
) -> list[Row]:
    """Measure each of `ds_configs` into a directory of its own below `run_dir`; the directories are removed again.

    size: a key of `profiles.SHAPES`. batch: sentences per step, on all ranks.

    Writes `run_dir`/memory.json. Raises ConfigError for a wrong setting, Failed if a run fails.
    """
    for name in ds_configs:
        engine.resolve(name, precision)
    base = profiles.random_base(run_dir / "base", size)
    settings = [
        *(f"model.base={base}", f"batch.global={batch}", f"phases.0.steps={STEPS}", f"phases.1.steps={STEPS}"),
        *(f"precision={precision}", "logging.tensorboard=false", "data.limit=512", "validation.sentences=16"),
        *("evaluation.batch=8", *overrides),
    ]
    rows = []
    for name in ds_configs:
        rows.append(_measure(run_dir / name, [*settings, f"deepspeed={name}"], processes))
        records.write_json(run_dir / "memory.json", [asdict(row) for row in rows])
    shutil.rmtree(base)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows for people, as a Markdown table."""
    parts = list(dict.fromkeys(part for row in rows for part in row.parts))
    head = ["ds_config", "ranks", *parts, "plan of a step", "of it activations", "bytes per parameter at most"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        values = [f"{row.parts[part]:,.0f}" if part in row.parts else "" for part in parts]
        cells = [row.ds_config, str(row.processes), *values, f"{row.expected_mb:,.0f}", f"{row.activations_mb:,.0f}"]
        lines.append("| " + " | ".join([*cells, f"{row.bytes_per_parameter:.1f}"]) + " |")
    own = max(row.own_mb for row in rows)
    millions = rows[0].parameters / 1e6
    return "\n".join(
        [*lines, "", f"MB of a rank above the {own:,.0f} MB of Python and its libraries; {millions:,.1f} M parameters"]
    )


def _measure(run: Path, settings: Sequence[str], processes: int) -> Row:
    config = configuration.load(RunConfig, "demo", settings)
    shutil.rmtree(run, ignore_errors=True)
    first = _run(run, settings, processes, "first")
    resumed = _run(run, [*settings, f"phases.1.steps={2 * STEPS}"], processes, "resumed")
    shutil.rmtree(run)
    own = max(rank["own"] for rank in first)
    parts = {name: _largest(first, name) for name in first[0]["parts"]}
    again = [name for name in ("restore", "engine") if name in resumed[0]["parts"]]
    parts |= {f"resumed {name}": _largest(resumed, name) for name in again}
    found = authoring.needs(config, config.precision, processes, config.batch.global_size // processes)
    spent = max(need.activations_bytes for need in found)
    parameters = max(need.parameters for need in found)
    return Row(
        ds_config=config.deepspeed,
        precision=config.precision,
        processes=processes,
        parameters=parameters,
        own_mb=own / 1e6,
        activations_mb=spent / 1e6,
        expected_mb=max(need.states_bytes + need.host_bytes + need.activations_bytes for need in found) / 1e6,
        parts={name: round(value / 1e6, 1) for name, value in parts.items()},
        bytes_per_parameter=round((max(parts.values()) - spent) / parameters, 2),
    )


def _largest(every: Sequence[dict[str, Any]], part: str) -> float:
    return max(rank["parts"].get(part, 0) - rank["own"] for rank in every)


def _run(run: Path, settings: Sequence[str], processes: int, name: str) -> list[dict[str, Any]]:
    """Train in child processes. Returns what each rank has measured, in bytes."""
    log, results = run.parent / f"{run.name}-{name}.log", run.parent / f"{run.name}-{name}"
    started = ranks.start(["-m", "vae_ds.bench.memory_rank", str(run), str(results), *settings], processes, log)
    codes = [rank.wait() for rank in started]
    if any(codes):
        raise Failed(f"a rank of {run.name} exited with code {max(codes)}; see {log}")
    files = [Path(f"{results}-{rank}.json") for rank in range(processes)]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for file in (*files, log):
        file.unlink()
    return found
