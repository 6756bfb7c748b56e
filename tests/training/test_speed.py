"""The speed of a training, as a row of the log tells it."""

import time

import pytest
import torch

from support.reports import MAIN, OTHER
from vae_ds.config import ModelConfig
from vae_ds.model import count_operations, extents, skeleton
from vae_ds.training.speed import PARTS, Speed, matrix_rate

MODEL = skeleton(ModelConfig(base="tiny", latent_dim=8))
SIZES = extents((10, 12), (10, 11))
TOTALS = {name: torch.tensor([float(value)]) for name, value in {"tokens": 90, **SIZES}.items()}


def step(speed: Speed, duration_s: float = 0.05) -> None:
    with speed.step(), speed.part("forward"):
        time.sleep(duration_s)
    speed.count(TOTALS)


def test_only_the_time_of_steps_counts() -> None:
    speed = Speed(MODEL, MAIN, "fp32")
    for _ in range(2):
        step(speed)
        time.sleep(0.5)  # a validation
    row = speed.row()
    assert 180 / 0.5 < row["tokens_per_s"] <= 180 / 0.1
    assert row["positions_per_s"] == pytest.approx(row["tokens_per_s"] * 110 / 90)
    of_step = count_operations(MODEL).of(SIZES)
    assert row["tflops"] == pytest.approx(row["tokens_per_s"] / 90 * of_step / 1e12)
    assert row["mfu"] == pytest.approx(row["tflops"] * 1e12 / matrix_rate(MAIN.device, torch.float32))
    assert row["peak_memory_gb"] > 0.05
    # The next row begins anew.
    step(speed)
    assert speed.row()["tokens_per_s"] > 90 / 0.5


def test_operations_are_those_of_a_rank_and_rank_0_alone_knows_the_rate() -> None:
    speed = Speed(MODEL, OTHER, "fp32")
    step(speed)
    row = speed.row()
    assert row["tflops"] == pytest.approx(row["tokens_per_s"] / 90 * count_operations(MODEL).of(SIZES) / 2e12)
    assert "mfu" not in row


def test_the_parts_of_one_step_a_row() -> None:
    speed = Speed(MODEL, MAIN, "fp32")
    for _ in range(2):
        step(speed, 0.2)
        step(speed, 0.0)
        row = speed.row()
        assert {f"share_{name}" for name in PARTS} <= row.keys()
        assert 0.9 < row["share_forward"] <= 1
        assert row["share_update"] == 0
