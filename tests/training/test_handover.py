"""The weights between two phases: read from the checkpoint, gathered if there is none, and in no one's memory after."""

import errno
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.recipes import small_recipe
from vae_ds.engine import PhaseEngine
from vae_ds.errors import Stopped
from vae_ds.runtime import StopFlag
from vae_ds.training import shards, trainer

pytestmark = pytest.mark.timeout(800)
# In 16 bits, the weights of the module are not exact: neither the frozen nor the trained ones.
SHORT = ["phases.0.steps=3", "phases.1.steps=3", "precision=bf16", "deepspeed=zero1"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_recipe(tmp_path_factory.mktemp("handover")))


@pytest.fixture(scope="module")
def model(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What an undisturbed run exports. It gathers no whole tensor: not for a checkpoint, a phase or the export."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a whole tensor is gathered")

    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseEngine, "tensors", refuse)
        at_each_step(patch, lambda: assert_nothing_is_open(run))
        trainer.train(recipe, run, SHORT)
    return exported(run)


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def at_each_step(patch: pytest.MonkeyPatch, look: Callable[[], None]) -> None:
    step = trainer.Trainer.step

    def watched(self: trainer.Trainer, *arguments: Any) -> Any:
        look()
        return step(self, *arguments)

    patch.setattr(trainer.Trainer, "step", watched)


def assert_nothing_is_open(run: Path) -> None:
    """A mapped file keeps its space on the disk after it was deleted."""
    assert f"{run}/checkpoints" not in Path("/proc/self/maps").read_text(encoding="utf-8")


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_phase_starts_in_memory_if_its_checkpoint_cannot_be_written(
    recipe: str,
    model: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A full disk at the end of the first phase: a warning, the same run, and the weights are freed at its start."""
    write, tensors = shards.write, PhaseEngine.tensors
    gathered: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def full_once(folder: Path, *arguments: Any) -> dict[str, Any]:
        if folder.name.endswith("step-00000003"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, *arguments)

    def counted(self: PhaseEngine, **settings: Any) -> Any:
        assert settings == {"moments": False}
        for name, kind, tensor in tensors(self, **settings):
            gathered.append(weakref.ref(tensor))
            yield name, kind, tensor

    monkeypatch.setattr(shards, "write", full_once)
    monkeypatch.setattr(PhaseEngine, "tensors", counted)
    at_each_step(monkeypatch, lambda: alive.append(sum(one() is not None for one in gathered)))
    with caplog.at_level(logging.WARNING):
        trainer.train(recipe, tmp_path / "run", SHORT)
    assert "No space left on device; the previous checkpoint stays" in caplog.text
    assert len(gathered) == len(model)
    assert alive == [0] * 6
    assert_same(exported(tmp_path / "run"), model)


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_resumed_state_is_let_go(
    recipe: str, model: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Stopped inside a phase and at its end: the same run, and no file of the checkpoint stays open."""
    stop = StopFlag()
    run = tmp_path / "run"
    steps: list[int] = []

    def stops() -> None:
        assert_nothing_is_open(run)
        steps.append(1)
        if len(steps) == at:
            stop.raised = "SIGTERM"

    with pytest.MonkeyPatch.context() as patch:
        at_each_step(patch, stops)
        with pytest.raises(Stopped):
            trainer.train(recipe, run, SHORT, stop=stop)
    at_each_step(monkeypatch, lambda: assert_nothing_is_open(run))
    trainer.train(recipe, run, SHORT)
    assert_same(exported(run), model)
