"""`export: best` is the model of the lowest validated nelbo, also if that is the last one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.launch import WORKER, job, launch, run_jobs
from support.recipes import small_recipe
from support.tiny import demo_settings
from vae_ds.training import train

SHORT = ("phases.0.steps=2", "phases.1.steps=6", "validation.every_steps=2", "checkpoint.every_steps=2")


def model_is_of(run: Path) -> list[int]:
    """The steps of the checkpoints that have the weights of the exported model."""
    model = load_file(run / "model" / "model.safetensors")
    found = []
    for folder in sorted((run / "checkpoints").glob("step-*")):
        stored: dict[str, torch.Tensor] = {}
        for shard in folder.glob("*.safetensors"):
            stored |= load_file(shard)
        if all(torch.equal(tensor, stored[f"weights/{name}"]) for name, tensor in model.items()):
            found.append(int(folder.name.removeprefix("step-")))
    return found


def best_of(run: Path) -> int:
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    return int(min(rows, key=lambda row: row["nelbo"])["step"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("lr", "is_last_best"), [("2e-3", True), ("0.5", False)])
def test_the_best_validation_is_exported(tmp_path: Path, lr: str, is_last_best: bool) -> None:
    """A fair learning rate improves to the end; one that is far too high does not."""
    rates = [f"phases.1.optimizer.lr={lr}", "phases.1.learning_rate.warmup_steps=0"]
    beta = ["phases.1.beta={schedule: constant, value: 1}", "checkpoint.keep=10", "export=best"]
    settings = [*demo_settings(tmp_path), *SHORT, *rates, *beta, "logging.tensorboard=false"]
    run = train("demo", tmp_path / "run", settings)
    best = best_of(run)
    assert (best == 8) is is_last_best
    assert model_is_of(run) == [best]


@pytest.mark.timeout(300)
def test_the_last_step_is_exported(tmp_path: Path) -> None:
    settings = [*demo_settings(tmp_path), *SHORT, "phases.1.optimizer.lr=0.5", "checkpoint.keep=10", "export=last"]
    run = train("demo", tmp_path / "run", [*settings, "logging.tensorboard=false"])
    assert model_is_of(run) == [8]


@pytest.mark.timeout(600)
def test_a_best_model_that_cannot_be_written_is_a_warning_on_every_rank(tmp_path: Path) -> None:
    """Rank 0 alone meets it, and the others must not wait for it.

    At the end of the run it is an error, and the same command writes the last model.
    """
    recipe, run = small_recipe(tmp_path / "made"), tmp_path / "run"
    before = """
from vae_ds.model import T5VAE
def full(self, path, *args, **kwargs):
    raise OSError(28, "No space left on device", str(path))
T5VAE.save_pretrained = full
"""
    short = ["export=best", "validation.every_steps=2", "phases.0.steps=2", "phases.1.steps=4"]
    listing = tmp_path / "jobs.json"
    listing.write_text(json.dumps([job(recipe, run, *short)]), encoding="utf-8")
    worker = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = launch(["-c", f"{before}\n{worker}", WORKER, listing], timeout_s=200, check=False)
    assert not done.timed_out, done.report()
    assert done.output.count("model: cannot be written (rank 0: OSError: [Errno 28] No space left on device") >= 3
    for said in done.outputs:
        assert "StorageError" in said, done.report()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    run_jobs(2, [job(recipe, run, *short)], tmp_path)
    assert model_is_of(run) == [6]
