"""The loss of a step on a device that is not there: torch's fake tensors on "cuda".

A tensor that stays on the host, in the model or in the loss, fails here as it does on a GPU.
"""

import itertools
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from support import tiny
from support.fake_cuda import CUDA, fake_cuda, like
from support.models import UNITS
from vae_ds.config import FreeBits, ModelConfig
from vae_ds.data import Batch, collate, from_texts
from vae_ds.distributed import NamedSums
from vae_ds.model import EXTENTS, T5VAE, load_tokenizer, skeleton
from vae_ds.training.trainer import StepSettings, Trainer

INJECTIONS = ("cross_attention", "self_attention", "embedding", "self_attention+embedding", "none")
# Every pooling and every precision occurs.
WAYS = {
    "fp32": (torch.float32, "max", "last"),
    "bf16": (torch.bfloat16, "mean", "all"),
    "fp16": (torch.float16, "mean", "last"),
}
MODES = ("per_dim", "per_dim_batch", "total")


def on_device(model: T5VAE, dtype: torch.dtype) -> T5VAE:
    """Replace the parameters by fake ones; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(like(parameter, dtype), requires_grad=False)
            module._parameters[name] = made[id(parameter)]
    return model


def real_batch(denoise: float, latent_dim: int) -> Batch:
    tokens = from_texts(tiny.ENGLISH[:4], load_tokenizer(tiny.base()), 40)
    return collate(tokens, range(4), pad_id=0, latent_dim=latent_dim, seed=0, keys=(), denoise=denoise)


def loss_of_a_step(model: T5VAE, batch: Batch, free_bits: FreeBits, *, is_first: bool = False) -> torch.Tensor:
    """The loss that the trainer gives to its engine, and the sums of its step. Only the engine is a stand-in."""
    losses: list[torch.Tensor] = []
    engine: Any = SimpleNamespace(
        forward=model, backward=lambda loss, is_last: losses.append(loss), step=lambda lr, half: None
    )
    trainer: Any = SimpleNamespace(
        speed=SimpleNamespace(part=lambda name: nullcontext()), setup=SimpleNamespace(ranks=SimpleNamespace(world=2))
    )
    sizes = {**dict.fromkeys(("loss", "rec", "penalty", "tokens", *EXTENTS), 1), "kl_L": model.latent_dim}
    held_L = None if is_first else torch.zeros(model.latent_dim, device=CUDA)
    now = StepSettings(sentences=4, free_bits=free_bits, beta=0.5, lr=1.0, half=None, held_L=held_L)
    Trainer.forward_backward_update(trainer, engine, batch, now, NamedSums(CUDA, **sizes), is_last=True)
    (loss,) = losses
    return loss


def fakes(real: Batch) -> Batch:
    tensors = {name: like(value) for name, value in vars(real).items() if isinstance(value, torch.Tensor)}
    return Batch(**tensors, tokens=real.tokens)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("injection", INJECTIONS)
def test_the_loss_stays_on_the_device(injection: Any, way: str) -> None:
    dtype, *pooling = WAYS[way]
    settings: dict[str, Any] = dict(zip(("pooling", "pool_layers"), pooling, strict=True))
    model = skeleton(ModelConfig(base=tiny.base(), latent_dim=UNITS, injection=injection, **settings)).train()
    real = real_batch(0.3, model.latent_dim)
    with fake_cuda():
        loss = loss_of_a_step(on_device(model, dtype), fakes(real), FreeBits())
    assert loss.device.type == "cuda"
    assert loss.dtype == torch.float32


def test_each_free_bits_mode_stays_on_the_device() -> None:
    model, real = skeleton(ModelConfig(base=tiny.base(), latent_dim=UNITS)).train(), real_batch(0.0, UNITS)
    with fake_cuda():
        on_device(model, torch.float32)
        for mode, is_first in itertools.product(MODES, (True, False)):
            loss = loss_of_a_step(model, fakes(real), FreeBits(mode=mode, nats=1.0), is_first=is_first)
            assert loss.device.type == "cuda"


@pytest.mark.parametrize("left", ["input_ids_BT", "attention_mask_BT", "labels_BT", "eps_BL", "weight_B"])
def test_a_tensor_on_the_host_is_found(left: str) -> None:
    """The check itself: a batch of which one tensor stays on the host."""
    model, real = skeleton(ModelConfig(base=tiny.base(), latent_dim=UNITS)).train(), real_batch(0.3, UNITS)
    with fake_cuda():
        on_device(model, torch.float32)
        on_host = torch.empty(getattr(real, left).shape, dtype=getattr(real, left).dtype)
        with pytest.raises(RuntimeError, match="device"):
            loss_of_a_step(model, replace(fakes(real), **{left: on_host}), FreeBits())
