"""Many runs of one recipe, planned from a small YAML and trained one at a time, here or as a SLURM array."""

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
    """One run of a study: its name, which is its directory's, its recipe, and what it changes there.

    `yardstick`: the name of the plain language model that it is measured against, if the study has one.
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
    """A study, a file or a shipped name.

    `settings`, by dotted key, hold for every run that does not set them itself. `further` are more runs: a name, then
    what it changes as KEY=VALUE. `length` and `seeds` replace the study's. Raises ConfigError.
    """
    tree = configuration.load(StudyConfig, study).model_dump()
    tree["set"] |= settings or {}
    tree["variants"] += [{"name": name, "set": dict(map(split_override, changes))} for name, *changes in further]
    tree["length"] = tree["length"] if length is None else length
    tree["seeds"] = list(seeds or tree["seeds"])
    return configuration.build(StudyConfig, tree, study)


def rows(study: StudyConfig) -> list[Row]:
    """Every run: the grid in the order of its keys, then the variants, each once a seed. Raises ConfigError."""
    points: list[tuple[str, str, dict[str, Any]]] = []
    if study.grid:
        for values in itertools.product(*study.grid.values()):
            point = dict(zip(study.grid, values, strict=True))
            name = "+".join(f"{_short(key, study.grid)}={value}" for key, value in point.items())
            # A base's name may have a slash, a list has brackets and blanks.
            points.append((re.sub(r"[^\w.+=-]+", "-", name), study.recipe, point))
    points += [(variant.name, variant.recipe or study.recipe, variant.set) for variant in study.variants]
    if not points:
        raise ConfigError(f"study {study.name}: neither `grid` nor `variants` names a run")
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
        raise ConfigError(f"study {study.name}: two runs are called {twice[0]}")
    if study.yardstick and study.yardstick not in [name for name, *_ in points]:
        raise ConfigError(f"study {study.name}: `yardstick` names {study.yardstick}, which is none of its runs")
    return found


def resolve(study: StudyConfig, row: Row, extra: Sequence[str] = ()) -> RunConfig:
    """A row's complete recipe, with further KEY=VALUE. Raises ConfigError that names the row."""
    try:
        config = configuration.load(RunConfig, row.recipe, [*row.overrides, *extra])
    except ConfigError as error:
        raise ConfigError(f"study {study.name}, run {row.name}: {error}") from None
    phases = tuple(_stretched(phase, study.length) for phase in config.phases)
    return config.model_copy(update={"name": f"{study.name}-{row.name}", "phases": phases})


def _stretched(phase: PhaseConfig, factor: float) -> PhaseConfig:
    """A phase with its lengths in epochs times `factor`."""
    changes: dict[str, Any] = {"epochs": phase.epochs and phase.epochs * factor}
    if isinstance(phase.beta, LinearBeta) and phase.beta.over_epochs:
        changes["beta"] = phase.beta.model_copy(update={"over_epochs": phase.beta.over_epochs * factor})
    return phase.model_copy(update=changes)


def check(study: StudyConfig, extra: Sequence[str] = ()) -> None:
    """Resolve every row's recipe, with further KEY=VALUE. Raises ConfigError that names the row."""
    for row in rows(study):
        resolve(study, row, extra)


def states(study: StudyConfig, root: Path) -> list[tuple[Row, str]]:
    """What became of each run: `missing`, `trained` but not evaluated, or as its status.json says."""
    found = []
    for row in rows(study):
        status = records.read_status(root / row.name)
        state = records.of_the_living(status)["state"] if status else "missing"
        found.append((row, "trained" if state == "done" and not _is_evaluated(root / row.name) else state))
    return found


def row_of(study: StudyConfig, number: int) -> Row:
    """The row of a number, counted from 0. Raises ConfigError if there is none."""
    every = rows(study)
    if not 0 <= number < len(every):
        raise ConfigError(f"study {study.name}: no run {number}; it has {len(every)}, counted from 0")
    return every[number]


def run(study: StudyConfig, row: Row, root: Path, stop: StopFlag, extra: Sequence[str] = ()) -> None:
    """Train a row in its directory below `root` and evaluate it on the test split, against the yardstick if that is
    evaluated by then; what is done is not done again. A collective."""
    # Planning and listing a study need no torch, which takes seconds to load.
    from vae_ds import distributed, training
    from vae_ds.evaluation import finished_run

    run_dir = root / row.name
    training.train(resolve(study, row, extra), run_dir, stop=stop)
    distributed.start()
    yardstick = root / row.yardstick if row.yardstick and _is_evaluated(root / row.yardstick) else None
    # Rank 0 may have written either just now.
    is_evaluated, yardstick = distributed.broadcast_object((_is_evaluated(run_dir), yardstick))
    if not is_evaluated:
        finished_run.evaluate_run(run_dir, "test", {}, yardstick=None if yardstick is None else str(yardstick))


def run_all(study: StudyConfig, root: Path, stop: StopFlag, extra: Sequence[str] = ()) -> list[str]:
    """Train and evaluate what is missing, the yardstick first. Returns the names of the runs that failed. A collective.

    A run that fails is told, and does not keep the others from running. Raises Stopped after a signal.
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
                _tell(error, root / row.name)
    return failed


def _tell(error: Exception, run_dir: Path) -> None:
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    if (run_dir / "config.yaml").is_file():
        records.write_status(run_dir, "failed", reason=f"{type(error).__name__}: {error}")


def _is_evaluated(run_dir: Path) -> bool:
    return (run_dir / "eval-test.json").is_file()


def _short(key: str, grid: dict[str, Any]) -> str:
    """The last part of a dotted key, or all of it where two keys of the grid end alike."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in grid) == 1 else key
