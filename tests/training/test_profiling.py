"""The profile of a training: which steps, which files."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from support.reports import MAIN, OTHER
from vae_ds.config import ProfileConfig
from vae_ds.distributed import Ranks
from vae_ds.training.profiling import Profiler


def train(profiler: Profiler, steps: int) -> None:
    """A product of its own size in each step, and one after them."""
    for number in range(1, steps + 1):
        with profiler.step():
            torch.ones(number, 64) @ torch.ones(64, 32)
    if profiler._left == steps:
        torch.ones(99, 64) @ torch.ones(64, 32)
    profiler.close()


def shapes(folder: Path) -> set[int]:
    """The numbers of rows of the products in the trace."""
    with gzip.open(folder / "trace.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return {event["args"]["Input Dims"][0][0] for event in events if event.get("name") == "aten::mm"}


def test_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    train(Profiler(ProfileConfig(start=3, steps=2), tmp_path, 6, MAIN), 6)
    assert shapes(tmp_path) == {3, 4}
    assert "aten::mm" in (tmp_path / "operators.txt").read_text(encoding="utf-8")


def test_the_last_step_of_a_phase_ends_the_profile(tmp_path: Path) -> None:
    """A validation follows, which is no training step."""
    profiler = Profiler(ProfileConfig(start=2, steps=9), tmp_path, 3, MAIN)
    train(profiler, 3)
    assert shapes(tmp_path) == {2, 3}


def test_a_training_that_fails_leaves_what_there_is(tmp_path: Path) -> None:
    train(Profiler(ProfileConfig(start=2, steps=9), tmp_path, 100, MAIN), 3)
    assert shapes(tmp_path) == {2, 3}


def test_a_phase_that_is_too_short_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(Profiler(ProfileConfig(start=5), tmp_path, 3, MAIN), 3)
    assert "profile.start 5: not reached in 3 steps" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("settings", "ranks"), [(None, MAIN), (ProfileConfig(start=1), OTHER)])
def test_others_write_nothing(tmp_path: Path, settings: ProfileConfig | None, ranks: Ranks) -> None:
    train(Profiler(settings, tmp_path, 3, ranks), 3)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_stops_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a directory", encoding="utf-8")
    train(Profiler(ProfileConfig(start=1, steps=1), tmp_path / "file" / "full", 2, MAIN), 2)
    assert "no profile was written" in caplog.text
