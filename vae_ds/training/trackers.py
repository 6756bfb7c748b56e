"""The curves of a run in Weights & Biases and MLflow (`logging.trackers`), through their own clients.

They get the settings of the run and the points of all curves that TensorBoard has, under the same tags. Where the data
goes is set by the variables of the clients: WANDB_MODE, WANDB_PROJECT and WANDB_API_KEY, MLFLOW_TRACKING_URI and
MLFLOW_EXPERIMENT_NAME. Without a tracking server, MLflow gets a file store in `mlruns` beside the run directory.

A tracker works in a thread of its own: a slow or silent server delays no training step. A tracker that fails is a
warning, and gets no more points. `trackers/NAME.json` in the run directory has its name of the run, so that a resumed
run continues its curves.
"""

import importlib.util
import json
import logging
import os
import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vae_ds.errors import ConfigError
from vae_ds.runtime import records
from vae_ds.training.tensorboard import curves_of, hparams_of

log = logging.getLogger(__name__)

PROJECT = "vae_ds"  # of Weights & Biases, and the experiment of MLflow, if their variables name no other
WAITING = 10_000  # calls that wait for a tracker; further ones are dropped
CLOSE_S = 60.0  # the longest wait for a tracker at the end of a run


def check(names: Sequence[str]) -> None:
    """Raise ConfigError if a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f'logging.trackers: {name} is not installed; install it with `pip install "vae_ds[{name}]"`'
            )


class Trackers:
    """The trackers `names` of the run in `run_dir`. On rank 0 only. No method raises or waits, except `close`."""

    def __init__(self, names: Sequence[str], run_dir: Path) -> None:
        self._lines = [_Line(name, lambda name=name: KINDS[name](run_dir)) for name in names]  # type: ignore[misc]

    def begin_run(self, recipe: Mapping[str, Any]) -> None:
        """Begin the run, or continue it. `recipe` is the recipe as a tree."""
        name, settings = str(recipe.get("name", "run")), hparams_of(recipe)
        for line in self._lines:
            line.put(lambda tracker: tracker.begin(name, settings))

    def scalars(self, values: Mapping[str, Any], split: str | None, step: int) -> None:
        """Add a point to the curve of each number in `values`."""
        points, now_s = curves_of(values, split), time.time()
        for line in self._lines:
            line.put(lambda tracker: tracker.add(points, step, now_s))

    def close(self, is_done: bool) -> None:
        """End the run, which is done or will be resumed. Waits for the trackers, a minute at most."""
        for line in self._lines:
            line.put(lambda tracker: tracker.end(is_done))
        for line in self._lines:
            line.close()


class Tracker(ABC):
    """One tracking service."""

    name: str

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.file = run_dir / "trackers" / f"{self.name}.json"

    @abstractmethod
    def begin(self, name: str, settings: Mapping[str, int | float | str]) -> None:
        """Begin or continue the run with this name and these settings."""

    @abstractmethod
    def add(self, points: Mapping[str, float], step: int, now_s: float) -> None:
        """Add points by tag."""

    @abstractmethod
    def end(self, is_done: bool) -> None:
        """Send what is left, and end the run."""

    def known(self) -> dict[str, Any]:
        """What an earlier start of the run has kept; empty at its first."""
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def keep(self, facts: Mapping[str, Any]) -> None:
        """Keep this for a resumption."""
        records.write_json(self.file, facts)


class Wandb(Tracker):
    """Weights & Biases. With WANDB_MODE=offline, its files are in `wandb/` of the run directory, for `wandb sync`."""

    name = "wandb"

    def begin(self, name: str, settings: Mapping[str, int | float | str]) -> None:
        import wandb

        known = self.known().get("id") or uuid.uuid4().hex[:12]
        self.keep({"id": known})
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.api.api_key:
            # It would ask on the terminal.
            raise RuntimeError("no API key; run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=known,
            resume="allow",
            dir=self.run_dir,
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Points have a step of their own: the client's step must rise by each call, in a resumed run, too.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def add(self, points: Mapping[str, float], step: int, now_s: float) -> None:
        self._run.log({**points, "step": step})

    def end(self, is_done: bool) -> None:
        self._run.finish(exit_code=0 if is_done else 1)


class Mlflow(Tracker):
    """MLflow, by its client, which has no current run that a program around this one could change."""

    name = "mlflow"

    def begin(self, name: str, settings: Mapping[str, int | float | str]) -> None:
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if place is None:
            place = (self.run_dir.absolute().parent / "mlruns").as_uri()
        if not place.startswith(("http", "databricks")):
            # MLflow 3 refuses its own file store without it. Its databases need the whole package.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=place)
        known = self.known()
        if known.get("uri") == place:
            self._run = str(known["run"])
            self._client.update_run(self._run, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        place_of = found.experiment_id if found else self._client.create_experiment(experiment)
        self._run = self._client.create_run(place_of, run_name=name).info.run_id
        self.keep({"uri": place, "run": self._run})
        self._client.log_batch(self._run, params=[Param(key, str(value)) for key, value in settings.items()])

    def add(self, points: Mapping[str, float], step: int, now_s: float) -> None:
        now_ms = int(1000 * now_s)
        self._client.log_batch(self._run, metrics=[self._metric(tag, v, now_ms, step) for tag, v in points.items()])

    def end(self, is_done: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if is_done else "KILLED")


KINDS: dict[str, type[Tracker]] = {kind.name: kind for kind in (Wandb, Mlflow)}


class _Line:
    """The calls that wait for one tracker, and the thread that makes them."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name, self._make = name, make
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(WAITING)
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Tracker], None]) -> None:
        if self._has_failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._fail(f"{WAITING:,} points wait for it")

    def close(self) -> None:
        if not self._has_failed:
            self._calls.put(None)
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                self._fail(f"it did not end within {CLOSE_S:.0f} s")

    def _work(self) -> None:
        tracker = self._make()
        while (call := self._calls.get()) is not None:
            if self._has_failed:
                return
            try:
                call(tracker)
            except Exception as error:  # of any kind: a training does not end because of its curves
                self._fail(" ".join(str(error).split())[:300] or type(error).__name__)
                return

    def _fail(self, why: str) -> None:
        self._has_failed = True
        log.warning("logging.trackers: %s gets no more points: %s; the training continues", self._name, why)
