"""Trainings with a learned prior: fitted alone after training, and along, at each ZeRO stage; resumed; exported."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.launch import job, run_jobs
from support.processes import rows
from support.recipes import write_recipe
from support.tiny import ENGLISH, make_base, write_splits
from vae_ds import config as configuration
from vae_ds.config import FreeBits, RunConfig
from vae_ds.distributed import Ranks
from vae_ds.errors import ConfigError, DataError
from vae_ds.model import T5VAE, PriorTerms, gaussian
from vae_ds.training.objective import StepSettings, loss_of
from vae_ds.training.preparation import check_model, prepare

STEPS = 12  # of each phase
ALONE = "freeze: [encoder, decoder, embeddings, memory, bottleneck], optimizer: {lr: 2.0e-2}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior that trains along, with free bits of the batch, then a phase that fits it alone."""
    folder = tmp_path_factory.mktemp("prior")
    base = make_base(folder / "base", "t5", num_layers=1, num_decoder_layers=1)
    text = write_splits(folder / "text", ENGLISH[:128], ENGLISH[128:160], ENGLISH[160:192])
    return write_recipe(
        folder,
        f"""
name: prior
model: {{base: {base}, latent_dim: 4, dropout: 0, prior: flow, prior_couplings: 2, prior_width: 8,
  slots: 2, memory_mlp: 6}}
data: {{corpus: text, path: {text}, max_tokens: 24, cache_dir: {folder / "cache"}}}
batch: {{global: 16}}
precision: fp32
phases:
  - {{name: along, steps: {STEPS}, free_bits: {{mode: total_batch, nats: 2.0}}, optimizer: {{lr: 2.0e-3}}}}
  - {{name: alone, steps: {STEPS}, {ALONE}}}
validation: {{every_steps: {STEPS}, sentences: 32}}
checkpoint: {{every_steps: 1000, keep: 9}}
""",
    )


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior-runs")
    two = [job(recipe, folder / f"zero{stage}", f"deepspeed=zero{stage}") for stage in (0, 3)]
    two.append(job(recipe, folder / "bf16", "precision=bf16", "deepspeed=zero3"))
    two.append(job(recipe, folder / "stopped", "deepspeed=zero2", stop_at=STEPS + STEPS // 2))
    two.append(job(recipe, folder / "stopped", "deepspeed=zero2"))
    two.append(job(recipe, folder / "zero1"))
    run_jobs(2, two, folder)
    return folder


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors") | load_file(run / "model" / "priors" / "flow.safetensors")


@pytest.mark.parametrize("name", ["zero0", "stopped", "zero3"])
def test_every_stage_and_a_resumed_run_give_the_same_curve_and_the_same_prior(runs: Path, name: str) -> None:
    for one, other in zip(rows(runs / name), rows(runs / "zero1"), strict=True):
        for key in ("loss", "kl", "kl_normal", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), (key, one["step"])
    wanted = weights_of(runs / "zero1")
    for weight_name, weight in weights_of(runs / name).items():
        assert torch.allclose(weight, wanted[weight_name], atol=1e-4), weight_name


def test_bf16_stays_near_float32(runs: Path) -> None:
    last, exact = rows(runs / "bf16")[-1], rows(runs / "zero1")[-1]
    assert last["kl"] == pytest.approx(exact["kl"], rel=0.05)


def test_a_phase_that_fits_the_prior_alone_moves_nothing_else_and_lowers_the_kl(runs: Path) -> None:
    told = rows(runs / "zero1")
    along, alone = told[:STEPS], told[STEPS:]
    assert all("rec" in row and "nelbo" in row for row in along)
    assert not any("rec" in row or "nelbo" in row for row in alone), "it decodes nothing"
    # The same codes: the KL to N(0, I) differs by the choice of the sentences only.
    saved = [row["kl_normal"] - row["kl"] for row in alone]
    assert sum(saved[-4:]) > sum(saved[:4]) + 0.2
    first = [json.loads(line) for line in (runs / "zero1" / "evaluations.jsonl").read_text().splitlines()]
    assert first[0]["rec"] == pytest.approx(first[1]["rec"], abs=1e-6)
    assert first[0]["kl_normal"] == pytest.approx(first[1]["kl_normal"], abs=1e-6)
    assert first[1]["kl"] < first[0]["kl"]
    assert first[1]["nelbo"] == pytest.approx(first[1]["rec"] + first[1]["kl"])


def test_a_model_that_is_loaded_again_has_its_prior(runs: Path) -> None:
    model = T5VAE.from_pretrained(runs / "zero1")
    assert model.settings.prior == "flow"
    for name, weight in model.named_parameters():
        if name.startswith("prior."):
            assert torch.equal(weight, weights_of(runs / "zero1")[name]), name
    assert any(weight.abs().max() > 0.01 for name, weight in model.named_parameters() if name.endswith("last.weight"))
    z_BL = torch.randn(5, 4)
    plain = T5VAE.from_pretrained(runs / "zero1", prior="normal")
    assert torch.equal(plain.log_prior(z_BL), gaussian.log_prior(z_BL))
    assert not torch.allclose(model.log_prior(z_BL), plain.log_prior(z_BL), atol=0.01)


# The objective


def step(nats: float = 0.0, held: float | None = None, beta: float = 0.5, decodes: bool = True) -> StepSettings:
    held_L = None if held is None else torch.full((2,), held / 2)
    return StepSettings(4, FreeBits(mode="total_batch", nats=nats), beta, 1e-3, None, held_L, held, decodes)


@pytest.mark.parametrize(
    ("now", "penalty", "of_q"),
    [
        (step(), 2.5, 0.5),
        (step(nats=3.0), 2.5, 0.5),  # before the first step
        (step(nats=3.0, held=3.5), 2.5, 0.5),
        (step(nats=3.0, held=3.0), 3.0, 0.0),
        (step(nats=3.0, held=0.5, beta=1.0), 3.0, 0.0),
    ],
)
def test_the_loss_with_a_sampled_kl(now: StepSettings, penalty: float, of_q: float) -> None:
    """-log p(z) trains the prior with weight 1 in any case; log q has the weight beta, or 0 below the threshold."""
    rec_B, log_q_B, log_p_B = (torch.full((4,), value, requires_grad=True) for value in (10.0, 1.0, -1.5))
    kl_BL = torch.ones(4, 2)
    weight_B = torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = loss_of(PriorTerms(rec_B, kl_BL, kl_BL, kl_BL, log_q_B, log_p_B), weight_B, now)
    found.loss.backward()
    assert rec_B.grad.tolist() == [1, 1, 1, 0]
    assert log_p_B.grad.tolist() == [-1, -1, -1, 0]
    assert log_q_B.grad.tolist() == [of_q, of_q, of_q, 0]
    assert now.prior_pull == of_q
    told = {name: value.tolist() for name, value in found.sums.items()}
    wanted = {"loss": 3 * (10 + now.beta * penalty), "rec": 30.0, "penalty": 3 * penalty, "kl_sampled": 7.5}
    assert told == wanted | {"kl_L": [3.0, 3.0]}


# Errors


def changed(recipe: Path, *overrides: str) -> RunConfig:
    return configuration.load(RunConfig, str(recipe), overrides)


def test_a_wrong_phase_is_an_error_before_any_weight_is_loaded(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"^phases\.0\.free_bits\.mode is per_dim, .* use total_batch"):
        check_model(changed(recipe, "phases.0.free_bits.mode=per_dim"))
    check_model(changed(recipe, "phases.1.free_bits={mode: per_dim, nats: 1}"))
    check_model(changed(recipe, "phases.0.free_bits.mode=per_dim", "model.prior=normal", "phases.1.freeze=[encoder]"))


def test_too_few_sentences_for_a_prior_are_an_error(recipe: Path, tmp_path: Path) -> None:
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    message = re.escape(
        "the training split has 128 sentences, too few for a prior of 16 latent units; use at least 160"
    )
    with pytest.raises(DataError, match=f"^{message}"):
        prepare(changed(recipe, "model.latent_dim=16"), tmp_path / "run", ranks)


@pytest.mark.parametrize("stored", ["a prior of the run", "no prior"])
def test_a_run_starts_from_a_trained_model_and_its_prior(recipe: Path, runs: Path, tmp_path: Path, stored: str) -> None:
    """Without a prior of the recipe's kind, it begins a new one: so is one fitted to a finished run by a recipe."""
    from vae_ds.training import train

    export = tmp_path / "export"
    shutil.copytree(runs / "zero1" / "model", export)
    if stored == "no prior":
        shutil.rmtree(export / "priors")
    start = weights_of(runs / "zero1")
    overrides = (
        f"model.weights={export}",
        f"phases=[{{name: alone, steps: 1, {ALONE}}}]",
        "phases.0.optimizer.lr=1e-9",
    )
    found = weights_of(train(str(recipe), tmp_path / "run", overrides))
    assert all(torch.allclose(found[name], start[name], atol=1e-6) for name in found if "prior" not in name)
    same = [torch.allclose(found[name], start[name], atol=1e-6) for name in found if "prior" in name]
    assert all(same) if stored != "no prior" else not all(same)
    if stored != "no prior":
        with pytest.raises(ConfigError, match="prior_width of its prior `flow` is 8, the recipe's 9"):
            check_model(changed(recipe, f"model.weights={export}", "model.prior_width=9"))
