"""More ranks than the other tests have: eight, stopped or killed, whose runs go on at three ranks."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.launch import job, run_jobs
from support.processes import curve
from support.recipes import write_recipe
from support.tiny import ENGLISH, make_base, write_splits
from vae_ds.training import checkpoint, trainer

# With other load, many times its two minutes.
pytestmark = pytest.mark.timeout(900)
WORLD, FEWER = 8, 3
WARMUP, FULL = 3, 25
STOP_AT, KILL_AT = 5, 7


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phases, and a global batch that neither 8 nor 3 ranks divide."""
    folder = tmp_path_factory.mktemp("eight")
    base = make_base(folder / "base", "t5", num_layers=1, num_decoder_layers=2)
    text = write_splits(folder / "text", ENGLISH[:300], ENGLISH[300:350], ENGLISH[350:400])
    return write_recipe(
        folder,
        f"""
name: eight
model: {{base: {base}, latent_dim: 8, dropout: 0}}
data: {{corpus: text, path: {text}, max_tokens: 24, cache_dir: {folder / "cache"}}}
batch: {{global: 20}}
precision: fp32
phases:
  - {{name: warmup, steps: {WARMUP}, freeze: [decoder], optimizer: {{lr: 2.0e-3, clip: 50}}}}
  - {{name: full, steps: {FULL}, optimizer: {{lr: 2.0e-3, clip: 50, weight_decay: 0.1}}}}
validation: {{every_steps: 1000, sentences: 16}}
checkpoint: {{every_steps: 2}}
""",
    )


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` was never disturbed. `stopped` (ZeRO 1) and `killed` (ZeRO 3) go on at fewer ranks and another stage."""
    folder = tmp_path_factory.mktemp("runs")
    trainer.train(str(recipe), folder / "whole", ["deepspeed=zero0"])
    stopped = job(recipe, folder / "stopped", "deepspeed=zero1", stop_at=STOP_AT)
    run_jobs(WORLD, [stopped, job(recipe, folder / "killed", "deepspeed=zero3", kill_at=KILL_AT)], folder)
    for name in ("stopped", "killed"):
        shutil.copytree(folder / name, folder / f"{name}-before")
    then = [job(recipe, folder / "stopped", "deepspeed=zero3"), job(recipe, folder / "killed", "deepspeed=zero1")]
    run_jobs(FEWER, then, folder)
    return folder


@pytest.mark.parametrize("name", ["stopped", "killed"])
def test_eight_ranks_have_written_the_checkpoint(runs: Path, name: str) -> None:
    found = checkpoint.newest(runs / f"{name}-before")
    assert found is not None
    assert found.manifest["world"] == WORLD
    assert len(found.manifest["shards"]) == WORLD
    assert WARMUP < found.step < WARMUP + FULL, "the run was not cut inside its second phase, so nothing is tested"
    sizes = [shard["size"] for shard in found.manifest["shards"]]
    assert max(sizes) < 1.5 * sum(sizes) / WORLD, sizes


@pytest.mark.parametrize("name", ["stopped", "killed"])
def test_three_ranks_go_on_as_if_nothing_had_happened(runs: Path, name: str) -> None:
    """The rows of all steps, those of eight ranks and those of three, and the weights at the end."""
    found, wanted = curve(runs / name), curve(runs / "whole")
    assert [row["step"] for row in found] == list(range(1, WARMUP + FULL + 1))
    for row, other in zip(found, wanted, strict=True):
        for key in ("loss", "rec", "kl", "lr"):
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), (key, row, other)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3), (row, other)
    assert json.loads((runs / name / "status.json").read_text(encoding="utf-8"))["state"] == "done"
    ours, theirs = (load_file(runs / one / "model" / "model.safetensors") for one in (name, "whole"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        # Adam moves a weight whose gradient is nearly 0 by its sign, which rounding decides.
        differing = float((ours[key] - tensor).norm() / tensor.norm())
        assert differing < 1e-3, (key, differing)
