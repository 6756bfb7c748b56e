"""Curves in Weights & Biases (its offline files) and MLflow (its file store), written by real runs and read back."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.recipes import small_recipe
from support.reports import MAIN, OTHER
from vae_ds import training
from vae_ds.errors import ConfigError
from vae_ds.training import Monitor
from vae_ds.training import trackers as module

pytestmark = pytest.mark.timeout(400)
BOTH = ("wandb", "mlflow")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # MLflow reads this when it opens a store; `begin` sets it for the whole process.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def mlflow_points(runs: Path, tag: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(runs / "mlruns").absolute().as_uri())
    experiment = client.get_experiment_by_name("vae_ds")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, tag)]


def mlflow_run(runs: Path):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(runs / "mlruns").absolute().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("vae_ds").experiment_id])
    return run


def logged(content: bytes) -> Iterator[bytes]:
    """The records of a file in the log format of LevelDB, after the 7 bytes that say what it is.

    A record is in parts, each with a checksum (4 bytes), a length (2) and a kind: 1 whole, 2 first, 3 middle, 4 last.
    A block of 32 KiB ends with zeros if no part fits.
    """
    at, parts = 7, []
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def wandb_rows(run_dir: Path) -> list[dict[str, float]]:
    """All rows of the offline files of a run, in the order of its starts."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in logged(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def wandb_points(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), row[tag]) for row in wandb_rows(run_dir) if tag in row]


def test_a_resumed_run_continues_its_curves(tmp_path: Path) -> None:
    recipe, run_dir = str(small_recipe(tmp_path)), tmp_path / "runs" / "one"
    settings = ["logging.trackers=[wandb,mlflow]", "phases.0.steps=6", "phases.1.steps=6"]
    training.train(recipe, run_dir, settings, until="1")
    assert mlflow_run(run_dir.parent).info.status == "KILLED"  # the run is not done
    training.train(recipe, run_dir, settings)
    steps = list(range(1, 13))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    expected = [(row["step"], row["rec"]) for row in rows]
    assert [step for step, _ in expected] == steps
    for points in (mlflow_points(run_dir.parent, "2_terms/rec/train"), wandb_points(run_dir, "2_terms/rec/train")):
        assert [step for step, _ in points] == steps
        assert [value for _, value in points] == pytest.approx([value for _, value in expected])
    assert [step for step, _ in wandb_points(run_dir, "1_objective/nelbo/valid")] == [6, 12]
    run = mlflow_run(run_dir.parent)
    assert run.info.status == "FINISHED"
    assert run.data.params["phases.0.optimizer.lr"] == "0.001"
    # One run, not one per start.
    ids = {path.name.rpartition("-")[2] for path in run_dir.glob("wandb/offline-run-*")}
    assert ids == {json.loads((run_dir / "trackers" / "wandb.json").read_text())["id"]}


def test_points_that_were_sent_are_not_sent_again(tmp_path: Path) -> None:
    """A run is killed after step 5 and resumes from a checkpoint of step 3."""
    run_dir = tmp_path / "runs" / "one"
    for start, last in ((0, 5), (3, 8)):
        monitor = Monitor(run_dir, MAIN, tensorboard=False, progress=False, trackers=["mlflow"])
        monitor.resume_from(start)
        monitor.begin_run({"name": "one"})
        for step in range(start + 1, last + 1):
            monitor.log({"step": step, "loss": float(step)})
        monitor.close()
    assert mlflow_points(run_dir.parent, "1_objective/loss/train") == [(step, float(step)) for step in range(1, 9)]


def test_other_ranks_have_no_tracker(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "run", OTHER, tensorboard=False, progress=False, trackers=BOTH)
    monitor.begin_run({"name": "one"})
    monitor.log({"step": 1, "loss": 1.0})
    monitor.close()
    assert not list(tmp_path.glob("run*"))
    assert not (tmp_path / "mlruns").exists()


def test_a_tracker_that_fails_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file stands in place of MLflow's store, and Weights & Biases has no key; the rows are written all the same."""
    (tmp_path / "mlruns").write_text("")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    with caplog.at_level(logging.WARNING):
        monitor = Monitor(tmp_path / "run", MAIN, tensorboard=False, progress=False, trackers=BOTH)
        monitor.begin_run({"name": "one"})
        monitor.log({"step": 1, "loss": 1.0})
        monitor.close()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["loss"] == 1.0
    for name in BOTH:
        (told,) = [record.getMessage() for record in caplog.records if f": {name} gets no more" in record.getMessage()]
        assert "the training continues" in told
        assert "\n" not in told


def test_a_silent_server_delays_no_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()

    class Silent(module.Mlflow):
        def begin(self, name, settings) -> None:
            answers.wait(30)

    monkeypatch.setitem(module.KINDS, "mlflow", Silent)
    monkeypatch.setattr(module, "WAITING", 5)
    monkeypatch.setattr(module, "CLOSE_S", 0.1)
    with caplog.at_level(logging.WARNING):
        monitor = Monitor(tmp_path / "run", MAIN, tensorboard=False, progress=False, trackers=["mlflow"])
        monitor.begin_run({"name": "one"})
        for step in range(1, 20):
            monitor.log({"step": step, "loss": 1.0})
        monitor.close()
    answers.set()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 19
    assert "5 points wait for it" in caplog.text


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r'^logging.trackers: wandb is not installed; .*pip install "vae_ds\[wandb\]"'
    ):
        training.train(str(small_recipe(tmp_path)), tmp_path / "run", ["logging.trackers=[wandb]"])
    assert not (tmp_path / "run").exists()
