"""Out of memory is one line that names the settings that help, with the last checkpoint complete."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from support.launch import launch
from support.tiny import demo_settings, make_base
from vae_ds.bench.ranks import RETURN_FREED_MEMORY
from vae_ds.config import ModelConfig
from vae_ds.errors import OutOfMemory
from vae_ds.model import T5VAE
from vae_ds.training import checkpoint
from vae_ds.training.memory import MOST_TOKENS, bytes_per_token, explain_out_of_memory, fitting_tokens

# After the first checkpoint the rank with number WHO may take SPARE bytes of memory more than it has. A step asks for
# tensors of many MB, which fail; objects of a few bytes, without which no message could be written, do not.
SPARE = 2_000_000
CODE = """
import os, resource, sys
from vae_ds import cli
from vae_ds.training import trainer
step = trainer.Trainer.step
def limited(self, plan, engine, feed):
    if self.saver.newest and self.setup.ranks.rank == {who}:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + {spare}, used + {spare}))
    return step(self, plan, engine, feed)
trainer.Trainer.step = limited
os._exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world", "who"), [(1, 0), (2, 1)])
def test_a_host_without_memory(tmp_path: Path, world: int, who: int) -> None:
    run = tmp_path / "run"
    changes = ["batch.global=64", "phases.0.steps=8", "checkpoint.every_steps=2", "data.max_tokens=24"]
    command = ["train", "demo", "--run-dir", str(run), "--set", *demo_settings(tmp_path, d_ff=2048), *changes]
    # Memory that a process has freed and kept would be outside the limit.
    code, env = CODE.format(who=who, spare=SPARE), RETURN_FREED_MEMORY
    finished = launch(["-c", code, *command], processes=world, timeout_s=200, env=env, check=False)
    assert finished.codes[who] == 1, finished.report()
    output = finished.outputs[who]
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.match(
        rf"error: rank {who}: out of memory on the host during a step of phase warmup; lower batch\.tokens or "
        r"batch\.micro \(now at most 1,536 tokens;",
        line,
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_layers": 4, "num_decoder_layers": 2},
        {"d_model": 128, "num_heads": 8},
        {"d_ff": 512, "feed_forward_proj": "gated-gelu"},
    ],
)
def test_the_estimate_of_a_token_covers_what_the_model_saves(
    shape: dict[str, Any], precision: torch.dtype, checkpointing: bool, tmp_path: Path
) -> None:
    """`batch.tokens: auto` on GPUs: an estimate below the truth runs out of memory."""
    base = make_base(tmp_path / "base", "t5", dropout_rate=0.1, **shape)
    settings = ModelConfig(base=str(base), latent_dim=8, gradient_checkpointing=checkpointing)
    model = T5VAE.from_base(settings).train().to(precision)
    sentences, longest = 4, 48
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no place is used twice
        return tensor

    ids_BT = torch.ones(sentences, longest, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = model(ids_BT, ids_BT, ids_BT, torch.zeros(sentences, 8))
    assert terms.rec_B.requires_grad
    found = sum(kept.untyped_storage().nbytes() for place, kept in saved.items() if place not in weights)
    estimate = bytes_per_token(model, precision.itemsize, longest) * sentences * longest
    # With checkpointing, the backward pass also holds the tensors of one layer, which it computes again.
    model.settings = settings.model_copy(update={"gradient_checkpointing": False})
    most = bytes_per_token(model, precision.itemsize, longest) * sentences * longest if checkpointing else 2 * found
    assert found < estimate < most


def test_what_fits_is_a_power_of_two() -> None:
    """A little more or less free memory must not change the cut, and so the dropout, of a run that resumes."""
    assert fitting_tokens(40e9, 1e6) == fitting_tokens(39e9, 1e6) == 16_384
    assert fitting_tokens(-1e9, 1e6) == 1
    assert fitting_tokens(1e15, 1e6) == MOST_TOKENS


def test_another_error_stays_itself() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory("a step", "nothing"):
        raise RuntimeError("shapes differ")
