"""What a step of a training copies from the device: the sums, once. More copies would leave a GPU without work.

A real training on the CPU; `bench.gpu.copies` says how a CPU stands in for a device there.
"""

from pathlib import Path

import pytest
import torch

from support import tiny
from vae_ds import training
from vae_ds.bench.gpu import copies
from vae_ds.bench.gpu.copies import TO_HOST

QUIET = ("phases.0.steps=2", "phases.1.steps=3", "logging.tensorboard=false", "batch.micro=8")


@pytest.mark.parametrize("engine", ["zero0 fp32", "zero1 bf16"])
@pytest.mark.parametrize("prior", ["normal", "flow"])
def test_one_copy_a_step(prior: str, engine: str, tmp_path: Path) -> None:
    ds_config, precision = engine.split()
    settings = [*tiny.demo_settings(tmp_path), *QUIET, f"deepspeed={ds_config}", f"precision={precision}"]
    settings += [*(tiny.NORMAL_PRIOR if prior == "normal" else ()), "phases.1.denoise=0.2"]
    with copies.watched_steps() as steps:
        training.train("demo", tmp_path / "run", settings)
    told = copies.lines(steps[-1].found + steps[-1].of_engine)
    assert [copies.count(step.found, TO_HOST) for step in steps] == [1] * 5, told
    # At stage 0 in fp32, torch's own AdamW would apply a step that is not finite: the engine asks for the norm.
    own = 1 if engine == "zero0 fp32" else 0
    assert [copies.count(step.of_engine, TO_HOST) for step in steps] == [own] * 5, told


def test_each_way_to_the_host_is_seen() -> None:
    device, watched = torch.device("cpu"), copies.Copies()
    with watched.watch():
        there = torch.ones(3, device=device) * 2
        ways = [there.cpu, there.tolist, there.sum().item, lambda: float(there[0]), lambda: bool(there.all())]
        ways += [lambda: there[there > 1], lambda: there.to("cpu"), lambda: there.nonzero(), there.numpy]
        for number, way in enumerate(ways, start=1):
            way()
            assert copies.count(watched.found, TO_HOST, "other") == number
        here = there.cpu()
        for way in (here.tolist, here.sum().item, lambda: torch.zeros(2).tolist()):
            way()
    assert copies.count(watched.found, TO_HOST, "other") == len(ways) + 1
