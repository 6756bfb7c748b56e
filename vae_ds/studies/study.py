"""Studies: many runs, planned from a small YAML file and trained one at a time, on this machine or as a SLURM array."""

import itertools
import json
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_ds import config as configuration
from vae_ds.config import LinearBeta, PhaseConfig, RunConfig, StudyConfig, split_override
from vae_ds.errors import ConfigError, Stopped, UserError
from vae_ds.runtime import StopFlag, records


@dataclass(frozen=True)
class Row:
    """One run of a study. `name` is also the name of its directory; `overrides` are changes of its recipe.

    `yardstick`: the name of the plain language model that the run is compared with, if the study has one.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    yardstick: str | None = None


def load(
    study: str,
    settings: Mapping[str, Any] | None = None,
    further: Sequence[Sequence[str]] = (),
    length: float | None = None,
    seeds: Sequence[int] | None = None,
) -> StudyConfig:
    """Load a study from a file, or a shipped study by its name.

    `settings`, by dotted key, apply to every run that does not set them itself. Each item of `further` is a further
    run: its name, then its changes as KEY=VALUE. `length` and `seeds` replace those of the study. Raises ConfigError.
    """
    tree = configuration.load(StudyConfig, study).model_dump()
    tree["set"] |= settings or {}
    tree["variants"] += [{"name": name, "set": dict(map(split_override, changes))} for name, *changes in further]
    tree["length"] = tree["length"] if length is None else length
    tree["seeds"] = list(seeds or tree["seeds"])
    return configuration.build(StudyConfig, tree, study)


def rows(study: StudyConfig) -> list[Row]:
    """All runs: for each seed, the grid in the order of its keys, then the variants. Raises ConfigError."""
    points: list[tuple[str, str, dict[str, Any]]] = []
    if study.grid:
        for values in itertools.product(*study.grid.values()):
            point = dict(zip(study.grid, values, strict=True))
            name = "+".join(f"{_short(key, study.grid)}={value}" for key, value in point.items())
            # The name of a base may contain a slash, a list contains brackets and spaces.
            points.append((re.sub(r"[^\w.+=-]+", "-", name), study.recipe, point))
    points += [(variant.name, variant.recipe or study.recipe, variant.set) for variant in study.variants]
    if not points:
        raise ConfigError(f"study {study.name}: neither `grid` nor `variants` defines a run")
    found = []
    for seed in study.seeds:
        tail = f"+seed={seed}" if len(study.seeds) > 1 else ""
        for name, recipe, changes in points:
            settings = {**study.set, **changes, "seed": seed}
            overrides = tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())
            yardstick = study.yardstick if study.yardstick != name else None
            found.append(Row(name + tail, recipe, overrides, yardstick and yardstick + tail))
    twice = [row.name for row in found if sum(row.name == other.name for other in found) > 1]
    if twice:
        raise ConfigError(f"study {study.name}: two runs have the name {twice[0]}; rename one")
    if study.yardstick and study.yardstick not in [name for name, *_ in points]:
        raise ConfigError(f"study {study.name}: `yardstick` is {study.yardstick}, which is not a run of the study")
    return found


def resolve(study: StudyConfig, row: Row, extra: Sequence[str] = ()) -> RunConfig:
    """The complete recipe of a row, with further KEY=VALUE. Raises ConfigError with the name of the row."""
    try:
        config = configuration.load(RunConfig, row.recipe, [*row.overrides, *extra])
    except ConfigError as error:
        raise ConfigError(f"study {study.name}, run {row.name}: {error}") from None
    phases = tuple(_stretched(phase, study.length) for phase in config.phases)
    return config.model_copy(update={"name": f"{study.name}-{row.name}", "phases": phases})


def _stretched(phase: PhaseConfig, factor: float) -> PhaseConfig:
    """A phase with its lengths in epochs multiplied by `factor`."""
    changes: dict[str, Any] = {"epochs": phase.epochs and phase.epochs * factor}
    if isinstance(phase.beta, LinearBeta) and phase.beta.over_epochs:
        changes["beta"] = phase.beta.model_copy(update={"over_epochs": phase.beta.over_epochs * factor})
    return phase.model_copy(update=changes)


def check(study: StudyConfig, extra: Sequence[str] = ()) -> None:
    """Resolve the recipes of all rows, with further KEY=VALUE. Raises ConfigError with the name of the row."""
    for row in rows(study):
        resolve(study, row, extra)


def states(study: StudyConfig, root: Path) -> list[tuple[Row, str]]:
    """The state of each run: `missing`, `trained` (but not evaluated), or the state in its status.json."""
    found = []
    for row in rows(study):
        status = records.read_status(root / row.name)
        state = records.of_the_living(status)["state"] if status else "missing"
        found.append((row, "trained" if state == "done" and not _is_evaluated(root / row.name) else state))
    return found


def row_of(study: StudyConfig, number: int) -> Row:
    """The row with this number, counted from 0. Raises ConfigError if there is none."""
    every = rows(study)
    if not 0 <= number < len(every):
        raise ConfigError(f"study {study.name}: no run {number}; the runs have the numbers 0 to {len(every) - 1}")
    return every[number]


def run(study: StudyConfig, row: Row, root: Path, stop: StopFlag, extra: Sequence[str] = ()) -> None:
    """Train a row in its directory below `root` and evaluate it on the test split. A collective.

    The evaluation uses the yardstick if the yardstick was already evaluated. Finished work is not repeated."""
    # Imported here because torch takes seconds to load, and planning a study does not need it.
    from vae_ds import distributed, training
    from vae_ds.evaluation import finished_run

    run_dir = root / row.name
    training.train(resolve(study, row, extra), run_dir, stop=stop)
    distributed.start()
    yardstick = root / row.yardstick if row.yardstick and _is_evaluated(root / row.yardstick) else None
    # Rank 0 may have written either file just now, so the other ranks must not look for themselves.
    is_evaluated, yardstick = distributed.broadcast_object((_is_evaluated(run_dir), yardstick))
    if not is_evaluated:
        name = None if yardstick is None else str(yardstick)
        metrics = finished_run.evaluate_run(run_dir, "test", {}, yardstick=name)
        if metrics is not None:
            training.tensorboard.record_evaluation(run_dir, "test", metrics)


def run_all(study: StudyConfig, root: Path, stop: StopFlag, extra: Sequence[str] = ()) -> list[str]:
    """Train and evaluate what is missing, the yardstick first. Returns the names of failed runs. A collective.

    A failure is printed, and the other runs continue. Raises Stopped after a signal.
    """
    from vae_ds import distributed

    failed = []
    ranks = distributed.start()
    every = sorted(rows(study), key=lambda row: row.yardstick is not None)
    for number, row in enumerate(every, 1):
        if ranks.is_main:
            print(f"\n== {number} of {len(every)}: {row.name}", flush=True)
        try:
            run(study, row, root, stop, extra)
        except Stopped:
            raise
        except Exception as error:
            failed.append(row.name)
            if ranks.is_main:
                _report_failure(error, root / row.name)
    return failed


def _report_failure(error: Exception, run_dir: Path) -> None:
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    if (run_dir / "config.yaml").is_file():
        records.write_end(run_dir, "failed", f"{type(error).__name__}: {error}")


def _is_evaluated(run_dir: Path) -> bool:
    return (run_dir / "eval-test.json").is_file()


def _short(key: str, grid: dict[str, Any]) -> str:
    """The last part of a dotted key, or the whole key if two keys of the grid have the same last part."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in grid) == 1 else key
