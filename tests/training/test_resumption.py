"""What a resumed run may change: nothing that its checkpoints rest on, anything that is still to come."""

import json
from pathlib import Path

import pytest

from vae_ds import config as configuration
from vae_ds.config import RunConfig
from vae_ds.errors import ConfigError
from vae_ds.runtime import records
from vae_ds.training.resumption import FREE, is_done

ENDS = ("phases.1.steps", "phases.1.epochs")


def config(*overrides: str) -> RunConfig:
    return configuration.load(RunConfig, "demo", list(overrides))


def run(folder: Path, phase: int | None, state: str = "stopped") -> Path:
    """A run of the demo whose newest checkpoint is in a phase; None: it has no checkpoint."""
    folder.mkdir()
    (folder / "config.yaml").write_text(configuration.dump(config()), encoding="utf-8")
    records.write_status(folder, state)
    if phase is not None:
        place = folder / "checkpoints" / "step-00000010"
        place.mkdir(parents=True)
        manifest = {"schema_version": 2, "shapes": {}, "frozen": [], "shards": []}
        manifest |= {"progress": {"state": {"phase": phase}}}
        (place / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def done(folder: Path, *overrides: str, resume: str = "auto") -> bool:
    return is_done(folder, config(*overrides), FREE, ENDS, resume)


def test_no_run_is_not_done(tmp_path: Path) -> None:
    assert not done(tmp_path / "none")


def test_a_run_that_is_done_is_done_until_it_is_longer(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", 1, "done")
    assert done(folder)
    assert done(folder, "logging.every=7")
    assert not done(folder, "phases.1.steps=100000")


def test_resume_never_refuses_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already holds a run"):
        done(run(tmp_path / "run", None), resume="never")


@pytest.mark.parametrize(
    "changes", [["phases.1.freeze=[encoder]"], ["phases.1.beta.max=0.5", "phases.1.steps=77"], ["deepspeed=zero3"]]
)
def test_a_phase_to_come_and_how_a_run_is_stored_may_change(tmp_path: Path, changes: list[str]) -> None:
    assert not done(run(tmp_path / "run", 0), *changes)


@pytest.mark.parametrize(
    ("phase", "change", "message"),
    [
        (0, "phases.0.optimizer.lr=0.5", r"phases\.0\.optimizer\.lr was 0\.002, now 0\.5"),
        (1, "phases.1.free_bits.nats=0.7", r"phases\.1\.free_bits\.nats was 15\.0, now 0\.7"),
        (1, "phases.1.freeze=[encoder]", r"phases\.1\.freeze was \[\], now \['encoder'\]"),
        (0, "model.latent_dim=7", r"model\.latent_dim was 32, now 7"),
        (0, "batch.global=128", r"batch\.global was 64, now 128"),
    ],
)
def test_what_checkpoints_rest_on_may_not_change(tmp_path: Path, phase: int, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        done(run(tmp_path / "run", phase), change)


def test_many_changes_are_counted(tmp_path: Path) -> None:
    changes = ["model.latent_dim=7", "batch.global=128", "seed=3", "data.max_tokens=9"]
    with pytest.raises(ConfigError, match="and 1 more; choose another --run-dir"):
        done(run(tmp_path / "run", 0), *changes)


def test_a_run_without_a_checkpoint_has_nothing_to_protect(tmp_path: Path) -> None:
    """A failure before the first checkpoint must not make the corrected command another run."""
    assert not done(run(tmp_path / "run", None, "failed"), "model.latent_dim=7", "phases.0.freeze=[encoder]")
