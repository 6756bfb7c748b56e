"""`status.json` during a training: the phase, the step of the phase and of the run, what is left."""

import json
import time
from pathlib import Path

import pytest
import torch

from vae_ds import config as configuration
from vae_ds.config import RunConfig
from vae_ds.distributed import Ranks
from vae_ds.training import phases
from vae_ds.training.state import TrainState
from vae_ds.training.status import Status


@pytest.fixture
def plans() -> list[phases.PhasePlan]:
    config = configuration.load(RunConfig, "demo", ["phases.0.steps=10", "phases.1.steps=30"])
    return phases.plan(config.phases, 100)


def read(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    return found


def test_a_status_counts_in_the_phase_and_in_the_run(tmp_path: Path, plans: list[phases.PhasePlan]) -> None:
    state = TrainState(phase=1, step=5)
    status = Status(tmp_path, Ranks(0, 0, 1, torch.device("cpu")), plans)
    status.begin_phase(state)
    time.sleep(0.2)
    state.step = 15
    status.validated(20, {"nelbo": 60.5, "kl": 9.0, "verdict": "uses z", "cost": "2 nats", "kl_per_dim": [1.0]})
    status.exported({"step": 20, "reason": "the best"})
    status.write("running", state, epoch=0.25, checkpoint="step-00000020")
    found = read(tmp_path)
    assert found["export"] == {"step": 20, "reason": "the best"}
    assert (found["phase"], found["phase_number"], found["phases"]) == ("full", 2, 2)
    assert (found["phase_step"], found["phase_steps"]) == (15, 30)
    assert (found["step"], found["total_steps"]) == (25, 40)
    assert (found["epoch"], found["checkpoint"]) == (0.25, "step-00000020")
    validation = found["validation"]
    assert isinstance(validation, dict)
    assert (validation["step"], validation["nelbo"], validation["verdict"]) == (20, 60.5, "uses z")
    assert validation["cost"] == "2 nats"
    assert "kl_per_dim" not in validation
    # 10 steps took at least 0.2 s, and 15 are left.
    left = found["seconds_left"]
    assert isinstance(left, float)
    assert 0.3 <= left < 100.0


def test_a_done_run_has_all_its_steps(tmp_path: Path, plans: list[phases.PhasePlan]) -> None:
    status = Status(tmp_path, Ranks(0, 0, 1, torch.device("cpu")), plans)
    status.write("done", TrainState(phase=1, step=30))
    found = read(tmp_path)
    assert (found["step"], found["total_steps"], found["seconds_left"]) == (40, 40, None)


def test_other_ranks_write_nothing(tmp_path: Path, plans: list[phases.PhasePlan]) -> None:
    Status(tmp_path, Ranks(1, 1, 2, torch.device("cpu")), plans).write("running", TrainState())
    assert not list(tmp_path.iterdir())
