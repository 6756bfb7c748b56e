"""Recipes on disk for tests that start real processes."""

from pathlib import Path

from support.tiny import ENGLISH, make_base, write_splits

STEPS = 60


def write_recipe(folder: Path, settings: str) -> Path:
    """Write a recipe with these settings that logs each step to metrics.jsonl alone, and exports its last weights."""
    path = folder / "recipe.yaml"
    quiet = "logging: {every: 1, tensorboard: false, progress: false}\nexport: last\n"
    path.write_text(settings + quiet, encoding="utf-8")
    return path


def small_recipe(folder: Path) -> Path:
    """Two phases with dropout, a checkpoint every few steps, and rows at each."""
    base = make_base(folder / "base", "t5", num_layers=1, num_decoder_layers=1)
    text = write_splits(folder / "text", ENGLISH[:300], ENGLISH[300:350], ENGLISH[350:400])
    return write_recipe(
        folder,
        f"""
name: faulty
model: {{base: {base}, latent_dim: 4, dropout: 0.1}}
data: {{corpus: text, path: {text}, max_tokens: 40, cache_dir: {folder / "cache"}}}
batch: {{global: 16}}
precision: fp32
phases:
  - {{name: warmup, steps: {STEPS // 2}, freeze: [decoder], beta: {{schedule: constant, value: 0}}}}
  - {{name: full, steps: {STEPS // 2}, beta: {{schedule: linear, over_fraction: 0.5}}}}
validation: {{every_steps: 1000, sentences: 20}}
checkpoint: {{every_steps: 4, keep: 2}}
""",
    )
