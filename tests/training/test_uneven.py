"""Micro batches of different sizes and numbers, on ranks that do not divide the batch: the step of the whole batch."""

from pathlib import Path

import pytest
import torch

from support.launch import job, run_jobs
from support.processes import curve
from support.recipes import write_recipe
from support.tiny import ENGLISH, make_base, write_splits
from vae_ds import config as configuration
from vae_ds.config.settings import RunConfig
from vae_ds.data.batches import collate, epoch_batches, from_texts
from vae_ds.data.cuts import limits_of, share
from vae_ds.model.t5vae import T5VAE, load_tokenizer

STEPS, GLOBAL, LR, EPS, FREE_NATS = 3, 32, 1e-3, 1e-3, 0.1
# The ranks, and the settings of the cut. 32 sentences do not divide over 3 ranks, nor a rank's share by 5 or 3.
CUTS = {
    "one-micro": (1, "batch.micro=5", "deepspeed=zero0"),
    "one-tokens": (1, "batch.tokens=70", "deepspeed=zero1"),
    "two-micro": (2, "batch.micro=3", "deepspeed=zero2"),
    "two-tokens": (2, "batch.tokens=70", "deepspeed=zero3"),
    "two-alone": (2, "batch.tokens=1", "deepspeed=zero1"),
    "three-tokens": (3, "batch.tokens=70", "deepspeed=zero2"),
    "three-alone": (3, "batch.micro=1", "deepspeed=zero3"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uneven")
    base = make_base(folder / "base", "t5", num_layers=1, num_decoder_layers=1)
    text = write_splits(folder / "text", ENGLISH[:200], ENGLISH[300:304], ENGLISH[350:354])
    return write_recipe(
        folder,
        f"""
name: small
model: {{base: {base}, latent_dim: 8, dropout: 0, pooling: mean}}
data: {{corpus: text, path: {text}, max_tokens: 24, cache_dir: {folder / "cache"}}}
batch: {{global: {GLOBAL}}}
precision: fp32
phases:
  - name: all
    steps: {STEPS}
    beta: {{schedule: constant, value: 1}}
    free_bits: {{mode: per_dim_batch, nats: {FREE_NATS}}}
    denoise: 0.2
    optimizer: {{lr: {LR}, eps: {EPS}}}
validation: {{every_steps: 1000, sentences: 4}}
checkpoint: {{every_steps: 1000}}
""",
    )


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for world in (1, 2, 3):
        jobs = [job(recipe, folder / name, *settings) for name, (ranks, *settings) in CUTS.items() if ranks == world]
        run_jobs(world, jobs, folder)
    return folder


@pytest.fixture(scope="module")
def plain(recipe: Path) -> list[dict[str, float]]:
    """Torch's AdamW on whole global batches, without micro batches and ranks."""
    config = configuration.load(RunConfig, str(recipe))
    tokenizer = load_tokenizer(config.model.base)
    tokens = from_texts(ENGLISH[:200], tokenizer, 24)
    model = T5VAE.from_base(config.model, config.seed).train()
    adam = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=0.0)
    order_SG = epoch_batches(tokens.lengths_N, GLOBAL, config.batch.bucket_batches, config.seed, 0, 0)
    rows = []
    counts_L = torch.ones(8)
    for index_G in order_SG[:STEPS]:
        batch = collate(
            tokens, index_G, pad_id=tokenizer.pad_token_id, latent_dim=8, seed=config.seed, keys=(0, 0), denoise=0.2
        )
        terms = model(**batch.arguments())
        # The threshold is on the mean of the previous global batch; a unit below it counts as the threshold.
        loss = (terms.rec_B + (terms.kl_BL * counts_L + FREE_NATS * (1 - counts_L)).sum(1)).mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        adam.step()
        counts_L = (terms.kl_BL.detach().mean(0) > FREE_NATS).float()
        row = {"loss": loss, "rec": terms.rec_B.mean(), "kl": terms.kl_BL.sum(1).mean(), "grad_norm": norm}
        rows.append({key: value.item() for key, value in row.items()} | {"held": 8 - counts_L.sum().item()})
    return rows


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CUTS)
def test_a_step_in_unequal_parts_is_the_step_of_the_whole(runs: Path, plain: list[dict[str, float]], name: str) -> None:
    found = curve(runs / name)
    assert len(found) == STEPS
    for step, (row, wanted) in enumerate(zip(found, plain, strict=True)):
        for key in ("loss", "rec", "kl", "grad_norm"):
            # Later steps also contain the rounding of the updates before.
            tolerance = 1e-6 if step == 0 else 1e-5
            assert row[key] == pytest.approx(wanted[key], rel=tolerance), (step, key, row, wanted)


def test_the_cuts_of_these_runs_are_unequal(recipe: Path, plain: list[dict[str, float]]) -> None:
    """Otherwise the comparison above would say little. Some units are held at the threshold, and others are not."""
    assert any(0 < row["held"] < 8 for row in plain[:-1]), [row["held"] for row in plain]
    config = configuration.load(RunConfig, str(recipe))
    tokens = from_texts(ENGLISH[:200], load_tokenizer(config.model.base), 24)
    order_SG = epoch_batches(tokens.lengths_N, GLOBAL, config.batch.bucket_batches, config.seed, 0, 0)
    numbers, fillers = {}, {}
    for name, (world, setting, _) in CUTS.items():
        limits = limits_of(configuration.load(RunConfig, str(recipe), [setting]).batch, world, 24)
        cuts = [share(index_G, tokens.lengths_N, 0, world, limits) for index_G in order_SG[:STEPS]]
        last = [share(index_G, tokens.lengths_N, world - 1, world, limits) for index_G in order_SG[:STEPS]]
        numbers[name] = {len(pieces) for pieces in cuts}
        fillers[name] = any((weight_B == 0).any() for pieces in last for _, weight_B in pieces)
        if not name.endswith("alone"):
            assert any(len({len(index_B) for index_B, _ in pieces}) > 1 for pieces in cuts), name
    assert len(numbers["two-tokens"]) > 1, numbers
    assert [name for name, has in fillers.items() if has] == ["three-alone"]
