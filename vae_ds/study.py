"""Many runs of one recipe, planned from a small YAML and trained one at a time, here or as a SLURM array."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_ds import config as configuration
from vae_ds import jobs, records, trainer
from vae_ds.errors import ConfigError
from vae_ds.settings import RunConfig, StudyConfig
from vae_ds.stop import StopFlag


@dataclass(frozen=True)
class Row:
    """One run of a study: its name, which is its directory's, and what it changes in the recipe."""

    name: str
    overrides: tuple[str, ...]


def rows(study: StudyConfig) -> list[Row]:
    """Every run: the grid in the order of its keys, then the variants, each once a seed. Raises ConfigError."""
    points: list[tuple[str, dict[str, Any]]] = []
    if study.grid:
        for values in itertools.product(*study.grid.values()):
            point = dict(zip(study.grid, values, strict=True))
            points.append(("+".join(f"{_short(key, study.grid)}={value}" for key, value in point.items()), point))
    points += [(variant.name, variant.set) for variant in study.variants]
    if not points:
        raise ConfigError(f"study {study.name}: neither `grid` nor `variants` names a run")
    found = []
    for seed in study.seeds:
        for name, changes in points:
            settings = {**study.set, **changes, "seed": seed}
            whole = f"{name}+seed={seed}" if len(study.seeds) > 1 else name
            found.append(Row(whole, tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())))
    twice = [row.name for row in found if sum(row.name == other.name for other in found) > 1]
    if twice:
        raise ConfigError(f"study {study.name}: two runs are called {twice[0]}")
    return found


def check(study: StudyConfig) -> None:
    """Resolve every row's recipe. Raises ConfigError that names the row."""
    for row in rows(study):
        try:
            configuration.load(RunConfig, study.recipe, row.overrides)
        except ConfigError as error:
            raise ConfigError(f"study {study.name}, run {row.name}: {error}") from None


def states(study: StudyConfig, root: Path) -> list[tuple[Row, str]]:
    """What became of each run: `missing`, or as its status.json says."""
    found = []
    for row in rows(study):
        status = records.read_status(root / row.name)
        found.append((row, records.of_the_living(status)["state"] if status else "missing"))
    return found


def row_of(study: StudyConfig, number: int) -> Row:
    """The row of a number, counted from 0. Raises ConfigError if there is none."""
    every = rows(study)
    if not 0 <= number < len(every):
        raise ConfigError(f"study {study.name}: no run {number}; it has {len(every)}, counted from 0")
    return every[number]


def run(study: StudyConfig, row: Row, run_dir: Path, stop: StopFlag, extra: Sequence[str] = ()) -> None:
    """Train a row and evaluate it on the test split; what is done is not done again. A collective."""
    trainer.train(configuration.load(RunConfig, study.recipe, [*row.overrides, *extra]), run_dir, stop=stop)
    if not (run_dir / "eval-test.json").is_file():
        jobs.evaluate_run(run_dir, "test", {})


def _short(key: str, grid: dict[str, Any]) -> str:
    """The last part of a dotted key, or all of it where two keys of the grid end alike."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in grid) == 1 else key
