"""Whole runs with real processes: phases at each ZeRO stage, world sizes, micro batches, free bits, stop and resume."""

import json
import math
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.checkpoint_cases import weights_at
from support.launch import job, run_jobs
from support.models import groups_by_module
from support.processes import curve, rows
from support.tiny import ENGLISH, make_base, write_splits
from vae_ds import config as configuration
from vae_ds.config.settings import RunConfig
from vae_ds.data.batches import collate, epoch_batches, from_texts
from vae_ds.model.t5vae import T5VAE, load_tokenizer
from vae_ds.training.phases import freeze

FREE_BITS = {"per_dim": 1.0, "per_dim_batch": 1.0, "total": 8.0}
STEPS = 16  # of each of the two phases
# What must not change the losses: the run's name and its settings.
ENGINES = {
    **{f"stage{stage}": [f"deepspeed=zero{stage}"] for stage in range(4)},
    **{f"offload{stage}": [f"deepspeed=zero{stage}_fp32_offload"] for stage in (1, 2, 3)},
    "offload-params": ["deepspeed=zero3_fp32_offload_params"],
    "accumulation": ["batch.micro=4", "deepspeed=zero2"],
    "tokens": ["batch.tokens=100", "deepspeed=zero3"],
    "activation-checkpointing": ["model.gradient_checkpointing=true"],
}
# Decay, and a rate of their own for the new weights, in the second phase.
GROUPS = ("phases.1.optimizer={lr: 2.0e-3, clip: 50, weight_decay: 0.1, new_weights_lr_factor: 3.0}",)
# One run on 2, 1, 2 and 3 processes: stage, micro batch, and the step at which each but the last is stopped.
ELASTIC = [(2, 0, 16, 5), (1, 1, 5, STEPS - 4), (2, 3, 8, STEPS + 7), (3, 2, 5, None)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phases on 300 short sentences: a warm-up with a frozen decoder, then everything."""
    folder = tmp_path_factory.mktemp("trainer")
    base = make_base(folder / "base", "t5", num_layers=1, num_decoder_layers=2)
    text = write_splits(folder / "text", ENGLISH[:300], ENGLISH[300:350], ENGLISH[350:400])
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
name: small
model: {{base: {base}, latent_dim: 8, dropout: 0}}
data: {{corpus: text, path: {text}, max_tokens: 24, cache_dir: {folder / "cache"}}}
batch: {{global: 32}}
precision: fp32
phases:
  - name: warmup
    steps: {STEPS}
    freeze: [decoder, embeddings, memory]
    beta: {{schedule: constant, value: 0}}
    denoise: 0.2
    optimizer: {{lr: 2.0e-3, clip: 50}}
  - name: full
    steps: {STEPS}
    beta: {{schedule: linear, max: 1, over_fraction: 0.5}}
    optimizer: {{lr: 2.0e-3, clip: 50}}
    learning_rate: {{schedule: cosine, warmup_steps: 3}}
validation: {{every_steps: {STEPS}, sentences: 50}}
checkpoint: {{every_steps: 1000, keep: 9}}
logging: {{every: 1, tensorboard: false, progress: false}}
export: last
""",
        encoding="utf-8",
    )
    return path


def assert_same_curve(one: Path, other: Path, tolerance: float) -> None:
    first, second = curve(one), curve(other)
    assert [row["step"] for row in first] == [row["step"] for row in second] == list(range(1, 2 * STEPS + 1))
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "rec", "kl", "beta", "lr"):
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (key, a, b)
        # A unit on the threshold of free bits has a gradient or none: one rounding decides.
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance), (a, b)


def checkpoint_weights(run_dir: Path, step: int) -> Mapping[str, torch.Tensor]:
    """All weights of the checkpoint at a global step, by parameter name."""
    return weights_at(run_dir / "checkpoints" / f"step-{step:08d}")


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run that the tests below compare, in one launch of two processes and one of one."""
    folder = tmp_path_factory.mktemp("runs")
    two = [job(recipe, folder / name, *settings) for name, settings in ENGINES.items()]
    one = []
    for mode, nats in FREE_BITS.items():
        bits = f"phases.1.free_bits={{mode: {mode}, nats: {nats}}}"
        two.append(job(recipe, folder / f"two-{mode}", bits, "batch.micro=8"))
        one += [job(recipe, folder / f"one-{mode}-{micro}", bits, f"batch.micro={micro}") for micro in (32, 4)]
    both = "model.injection=self_attention+embedding"
    two.append(job(recipe, folder / "two-injected", both, "deepspeed=zero3"))
    one.append(job(recipe, folder / "one-injected", both, "deepspeed=zero0"))
    dropout = ("model.dropout=0.1",)
    two.append(job(recipe, folder / "whole", *dropout))
    for phase, stop_at in (("warmup", 6), ("full", STEPS + 7)):
        two.append(job(recipe, folder / f"stopped-{phase}", *dropout, stop_at=stop_at))
        two.append(job(recipe, folder / f"stopped-{phase}", *dropout))
    two.append(job(recipe, folder / "groups-two", *GROUPS, "deepspeed=zero3"))
    one.append(job(recipe, folder / "groups-one", *GROUPS, "deepspeed=zero1"))
    aggressive = ("phases.1.aggressive={inner_steps: 5, check_every: 2}", "validation.every_steps=5")
    two.append(job(recipe, folder / "aggressive-two", *aggressive, "deepspeed=zero2"))
    two.append(job(recipe, folder / "aggressive-stopped", *aggressive, "deepspeed=zero2", stop_at=STEPS + 6))
    two.append(job(recipe, folder / "aggressive-stopped", *aggressive, "deepspeed=zero2"))
    one.append(job(recipe, folder / "aggressive-one", *aggressive, "deepspeed=zero0"))
    elastic = [
        job(recipe, folder / "elastic", f"deepspeed=zero{stage}", f"batch.micro={micro}", stop_at=stop_at)
        for _, stage, micro, stop_at in ELASTIC
    ]
    run_jobs(2, [*two, elastic[0]], folder)
    shutil.copytree(folder / "stage1", folder / "boundary")
    shutil.rmtree(folder / "boundary" / "checkpoints" / f"step-{2 * STEPS:08d}")
    (folder / "boundary" / "status.json").unlink()
    run_jobs(1, [*one, elastic[1], job(recipe, folder / "boundary", "deepspeed=zero3")], folder)
    for (world, *_), part in zip(ELASTIC[2:], elastic[2:], strict=True):
        run_jobs(world, [part], folder)
    return folder


@pytest.fixture(scope="module")
def plain(recipe: Path) -> list[dict[str, float]]:
    return plain_loop(recipe)


def plain_loop(recipe: Path, *overrides: str) -> list[dict[str, float]]:
    """The recipe as a plain PyTorch loop: torch's AdamW, whole global batches, the schedules by their formulas."""
    config = configuration.load(RunConfig, str(recipe), overrides)
    tokenizer = load_tokenizer(config.model.base)
    tokens = from_texts(ENGLISH[:300], tokenizer, config.data.max_tokens)
    model = T5VAE.from_base(config.model, config.seed).train()
    rows = []
    for index, phase in enumerate(config.phases):
        freeze(model, phase.freeze)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decay, factor = phase.optimizer.weight_decay, phase.optimizer.new_weights_lr_factor
        adam = torch.optim.AdamW(
            [
                {
                    "params": [parameter],
                    "weight_decay": 0.0 if "layer_norm" in name or "relative_attention_bias" in name else decay,
                    "factor": factor if groups_by_module(model)[name] in ("bottleneck", "memory") else 1.0,
                }
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            ],
            betas=(0.9, 0.999),
            eps=1e-8,
        )
        for step in range(STEPS):
            warm = min(1.0, (step + 1) / 3)
            cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 3) / (STEPS - 3)))
            lr, beta = (2e-3, 0.0) if index == 0 else (2e-3 * warm * cosine, min(1.0, step / (STEPS / 2)))
            epoch, number = divmod(step, len(tokens) // 32)
            order_SG = epoch_batches(tokens.lengths_N, 32, config.batch.bucket_batches, config.seed, index, epoch)
            batch = collate(
                tokens, order_SG[number], pad_id=tokenizer.pad_token_id, latent_dim=8, seed=config.seed,
                keys=(index, epoch), denoise=phase.denoise,
            )  # fmt: skip
            terms = model(**batch.arguments())
            loss = (terms.rec_B + beta * terms.kl_BL.sum(1)).mean()
            adam.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trainable, 50.0)
            for group in adam.param_groups:
                group["lr"] = lr * group["factor"]
            adam.step()
            row = {"loss": loss, "rec": terms.rec_B.mean(), "kl": terms.kl_BL.sum(1).mean(), "grad_norm": norm}
            rows.append({key: value.item() for key, value in row.items()} | {"beta": beta, "lr": lr})
    return rows


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", range(4))
def test_phases_freeze_and_hand_over(runs: Path, recipe: Path, stage: int) -> None:
    """Phase 1 leaves every frozen tensor bit-identical and moves all others; phase 2 moves all."""
    run_dir = runs / f"stage{stage}"
    settings = configuration.load(RunConfig, str(run_dir / "config.yaml")).model
    model = T5VAE.from_base(settings, seed=0)
    start, groups = {name: p.detach() for name, p in model.named_parameters()}, groups_by_module(model)
    assert set(groups.values()) == {"encoder", "decoder", "embeddings", "memory", "bottleneck"}
    middle, end = checkpoint_weights(run_dir, STEPS), checkpoint_weights(run_dir, 2 * STEPS)
    assert start.keys() == middle.keys() == end.keys()
    for name, before in start.items():
        if groups[name] in {"decoder", "embeddings", "memory"}:
            assert torch.equal(before, middle[name]), f"{name} moved though frozen"
        else:
            assert not torch.equal(before, middle[name]), f"{name} did not move in phase 1"
        assert not torch.equal(middle[name], end[name]), f"{name} did not move in phase 2"
    exported = load_file(run_dir / "model" / "model.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, end[name]), f"{name} was not exported exactly"


@pytest.mark.parametrize("name", [*ENGINES, "elastic", "boundary"])
def test_every_engine_is_the_plain_loop(runs: Path, plain: list[dict[str, float]], name: str) -> None:
    """At each ZeRO stage, offloaded, accumulated, checkpointed, resumed on other ranks and stages: the same losses."""
    steps = curve(runs / name)
    assert [row["step"] for row in steps] == list(range(1, 2 * STEPS + 1))
    for step, (found, wanted) in enumerate(zip(steps, plain, strict=True)):
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, key, found, wanted)


@pytest.mark.parametrize("name", ["groups-one", "groups-two"])
def test_weight_decay_and_the_rate_of_the_new_weights(runs: Path, recipe: Path, name: str) -> None:
    """At ZeRO 1 and 3, as in the plain loop; the logged rate is that of the pretrained weights."""
    wanted = plain_loop(recipe, *GROUPS)
    assert wanted[-1]["loss"] != pytest.approx(curve(runs / "stage1")[-1]["loss"], rel=1e-3), "the groups do nothing"
    for step, (found, row) in enumerate(zip(curve(runs / name), wanted, strict=True)):
        for key, value in row.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, key, found, row)


@pytest.mark.parametrize("mode", FREE_BITS)
def test_the_optimisation_does_not_know_the_cluster(runs: Path, mode: str) -> None:
    """One process and two, micro batches of 4, 8 and 32: one loss curve."""
    assert_same_curve(runs / f"two-{mode}", runs / f"one-{mode}-32", 1e-4)
    assert_same_curve(runs / f"two-{mode}", runs / f"one-{mode}-4", 1e-4)


def test_another_injection_at_stage_3(runs: Path) -> None:
    """Weights that hooks hand on are gathered where they are needed."""
    assert_same_curve(runs / "two-injected", runs / "one-injected", 1e-4)
    assert curve(runs / "one-injected")[-1]["loss"] != curve(runs / "stage0")[-1]["loss"]


def test_free_bits_matter(runs: Path) -> None:
    """Without this, the comparison above could pass with thresholds that never bind."""
    last = {mode: curve(runs / f"two-{mode}")[-1]["loss"] for mode in FREE_BITS}
    assert len({round(loss, 4) for loss in last.values()}) == len(FREE_BITS), last


@pytest.mark.parametrize("phase", ["warmup", "full"])
def test_a_resumed_run_is_the_run_never_stopped(runs: Path, phase: str) -> None:
    """Stopped by a signal to one rank and run again, with dropout: the same rows, the same weights."""
    assert curve(runs / f"stopped-{phase}") == curve(runs / "whole")
    ours, theirs = (load_file(runs / name / "model" / "model.safetensors") for name in (f"stopped-{phase}", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((runs / f"stopped-{phase}" / "status.json").read_text())["state"] == "done"


def test_aggressive_training_is_one_run_on_any_ranks_and_resumed(runs: Path) -> None:
    found = curve(runs / "aggressive-two")
    assert_same_curve(runs / "aggressive-two", runs / "aggressive-one", 1e-4)
    assert curve(runs / "aggressive-stopped") == found
    assert all("aggressive" not in row for row in found[:STEPS])
    assert found[STEPS]["aggressive"] == 1.0
    assert found[STEPS]["loss"] == pytest.approx(curve(runs / "stage2")[STEPS]["loss"], rel=1e-4)
    assert found[-1]["loss"] != curve(runs / "stage2")[-1]["loss"]


def test_the_loss_falls_and_is_logged(runs: Path) -> None:
    found = curve(runs / "whole")
    assert sum(row["rec"] for row in found[-5:]) < 0.97 * sum(row["rec"] for row in found[:5])
    wanted = {"phase", "step", "epoch", "rec", "kl", "kl_weighted", "beta", "loss", "lr", "grad_norm", "padding"}
    assert wanted | {"skipped_steps"} <= found[0].keys()
    assert [row["phase"] for row in found] == ["warmup"] * STEPS + ["full"] * STEPS
    for row in rows(runs / "whole"):
        assert row["positions_per_s"] * (1 - row["padding"]) == pytest.approx(row["tokens_per_s"])
        assert 0 < row["mfu"] < 1
        assert 0.5 < sum(value for key, value in row.items() if key.startswith("share_")) <= 1
        assert row["share_data"] > 0
    # A single row can have waited for the other processes of the machine.
    share = {
        name: statistics.median(row[f"share_{name}"] for row in rows(runs / "whole")) for name in ("backward", "data")
    }
    assert share["backward"] > share["data"]
    assert found[0]["beta"] == 0.0
    assert found[-1]["beta"] == 1.0
