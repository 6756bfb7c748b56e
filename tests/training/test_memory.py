"""Out of memory is one line that names the settings that help, with the last checkpoint complete."""

import re
from pathlib import Path

import pytest
import torch

from support.launch import launch
from support.tiny import demo_settings
from vae_ds.errors import OutOfMemory
from vae_ds.training import checkpoint
from vae_ds.training.memory import explain_out_of_memory

# After the first checkpoint the rank with number WHO may take no more memory than it has.
CODE = """
import os, resource, sys
from vae_ds import cli
from vae_ds.training import trainer
step = trainer.Trainer.step
def limited(self, plan, engine, feed):
    if self.saver.newest and self.setup.ranks.rank == {who}:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used, used))
    return step(self, plan, engine, feed)
trainer.Trainer.step = limited
os._exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "who"), [(1, 0), (2, 1)])
def test_a_host_without_memory(tmp_path: Path, world: int, who: int) -> None:
    run = tmp_path / "run"
    changes = ["batch.global=64", "phases.0.steps=8", "checkpoint.every_steps=2", "data.max_tokens=24"]
    command = ["train", "demo", "--run-dir", str(run), "--set", *demo_settings(tmp_path, d_ff=2048), *changes]
    finished = launch(["-c", CODE.format(who=who), *command], processes=world, timeout_s=200, check=False)
    assert finished.codes[who] == 1, finished.report()
    output = finished.outputs[who]
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.match(
        rf"error: rank {who}: out of memory on the host during a step of phase warmup; lower batch\.micro \(now", line
    )
    assert "Traceback" not in output
    newest = checkpoint.newest(run)
    assert newest is not None
    assert newest.step == 2


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "GPU"),
        (MemoryError(), "host"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), "host"),
    ],
)
def test_every_kind_is_known(error: Exception, place: str) -> None:
    with pytest.raises(OutOfMemory, match=f"out of memory on the {place} during a validation; lower it"):  # noqa: SIM117
        with explain_out_of_memory("a validation", "lower it"):
            raise error


def test_another_error_stays_itself() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory("a step", "nothing"):
        raise RuntimeError("shapes differ")
