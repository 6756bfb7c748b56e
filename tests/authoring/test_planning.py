"""`vae-ds plan`: which ds_config and micro batch fit, for published sizes whose weights are not there."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import T5Config

from support.tiny import NORMAL_PRIOR, demo_settings
from vae_ds import authoring, cli
from vae_ds import config as configuration
from vae_ds.authoring import budget
from vae_ds.bench.profiles import SHAPES, VOCABULARY, Shape
from vae_ds.config import RunConfig

LARGER = {**SHAPES, "t5-3b": Shape(1024, 128, 16384, 32, 24)}
# Parameters of the published T5s, in millions, with a tied head.
MILLIONS = {"t5-base": 222.9, "t5-large": 737.7, "t5-3b": 2851.6}


def published(folder: Path, size: str) -> list[str]:
    """Settings of the demo on a text of some sentences, with the shape of a published T5."""
    settings = demo_settings(folder)
    T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **asdict(LARGER[size])).save_pretrained(folder / "base")
    return [*settings, *NORMAL_PRIOR, "model.latent_dim=32", "phases.0.steps=10", "phases.1.steps=20", "precision=bf16"]


def planned(folder: Path, size: str, gpus: int, gpu_gb: float, *more: str) -> authoring.Plan:
    config = configuration.load(RunConfig, "demo", [*published(folder, size), "data.max_tokens=48", *more])
    return authoring.plan(config, gpus, gpu_gb, tflops=100.0)


@pytest.mark.parametrize(
    ("size", "gpus", "gpu_gb", "ds_config"),
    [
        ("t5-base", 1, 24, "zero1"),
        ("t5-large", 1, 8, "zero2_offload"),
        ("t5-3b", 8, 40, "zero1"),
    ],
)
def test_what_fits(size: str, gpus: int, gpu_gb: float, ds_config: str, tmp_path: Path) -> None:
    plan = planned(tmp_path, size, gpus, gpu_gb, "batch.global=64")
    # The VAE has no queries, keys and values of the cross-attention.
    shape = LARGER[size]
    left_out = 3 * shape.d_model * shape.d_kv * shape.num_heads * shape.num_layers
    assert plan.parameters / 1e6 == pytest.approx(MILLIONS[size] - left_out / 1e6, rel=0.01)
    assert plan.chosen is not None
    assert plan.chosen.ds_config == ds_config
    full = plan.phases[-1]
    # Weights, states and activations of the chosen micro batch fit, and one sentence more does not.
    spent = plan.chosen.device_bytes + full.activations(plan.chosen.micro)
    assert spent <= 0.9 * gpu_gb * 1e9
    if plan.chosen.micro < 64 / gpus:
        assert any(
            plan.chosen.device_bytes + phase.activations(plan.chosen.micro + 1) > 0.9 * gpu_gb * 1e9
            for phase in plan.phases
        )
    # A warm-up with a frozen decoder computes less per step, and needs fewer states.
    assert plan.phases[0].flops / 10 < full.flops / 20
    assert plan.hours == pytest.approx(sum(phase.flops for phase in plan.phases) / (1e14 * gpus * 3600))


def test_nothing_fits(tmp_path: Path) -> None:
    plan = planned(tmp_path, "t5-base", 1, 0.5)
    assert plan.chosen is None
    assert "nothing fits: set model.gradient_checkpointing=true" in authoring.text(plan)


def test_states_by_hand() -> None:
    """Bytes of 1,000 trained and 500 frozen parameters on four ranks, term by term."""
    by_hand = {
        ("zero0", "fp32"): (4 * 1500 + 4 * 1000 + 8 * 1000, 0),
        ("zero0", "bf16"): (2 * 1500 + 2 * 1000 + 4 * 1000 + 12 * 1000, 0),
        ("zero1", "fp32"): (4 * 1500 + 4 * 1000 + 12 * 250, 0),
        ("zero1", "bf16"): (2 * 1500 + 2 * 1000 + 4 * 1000 + 12 * 250, 0),
        ("zero2", "bf16"): (2 * 1500 + 4 * 250 + 12 * 250 + 8000, 0),
        ("zero3", "bf16"): (2 * 375 + 8 * 250 + 12 * 250 + 2 * 1500 + 8000, 0),
        ("zero2_offload", "bf16"): (2 * 1500 + 8000, 8 * 250 + 12 * 250),
        ("zero3_offload", "bf16"): (2 * 375 + 2 * 1500 + 8000, 8 * 250 + 12 * 250),
        ("zero3_offload_params", "bf16"): (2 * 1500 + 8000, 2 * 375 + 8 * 250 + 12 * 250),
    }
    for (name, precision), (device, host) in by_hand.items():
        found = budget.states(name, precision, 1000, 500, 4)
        assert (found.device, found.host) == (device, host), (name, precision)
    for name in ("zero0", "zero1", "zero2"):
        assert budget.states(name, "fp32", 1000, 500, 1).device == 4 * 1500 + 12 * 1000, "nothing to divide"
    with pytest.raises(ValueError, match="zero9: the memory of this ds_config is not known"):
        budget.states("zero9", "bf16", 1000, 0, 1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*demo_settings(tmp_path), "phases.0.steps=10", "phases.1.steps=20"]
    assert cli.run(["plan", "demo", "--gpus", "2", "--gpu-memory", "16", "--set", *settings]) == 0
    told = capsys.readouterr().out
    assert "2 x 16 GB" in told
    assert "take deepspeed=zero1" in told
    assert "time:" not in told
    assert cli.run(["plan", "demo", "--gpus", "2", "--tflops", "1", "--json", "--set", *settings]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [phase["steps"] for phase in found["phases"]] == [10, 20]
    assert found["chosen"]["ds_config"] == "zero1"
    assert found["hours"] > 0
    assert cli.run(["plan", "demo", "--gpus", "17", "--set", *settings]) == 2
    assert "batch.global 16 has fewer sentences than 17 GPUs" in capsys.readouterr().err
    assert cli.run(["plan", "dmo"]) == 2
    assert "dmo" in capsys.readouterr().err
