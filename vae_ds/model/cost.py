"""The memory of one forward and backward pass of T5VAE, found by running it with torch's fake tensors.

A fake tensor has a shape and a device, but no numbers. So a base of any size is measured in seconds on any machine.
Shapes: B sentences, T tokens, L latent units.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vae_ds.config import ModelConfig
from vae_ds.model.shapes import skeleton
from vae_ds.model.t5vae import T5VAE, PriorTerms

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Footprint:
    """The memory of one forward and backward pass.

    peak_bytes: largest sum of all tensors that exist at one time, except the weights and their gradients.
    logits_bytes: part of the peak that grows with the vocabulary: the logits, their softmax, and their gradients.
    """

    peak_bytes: int
    logits_bytes: int


def footprint(
    settings: ModelConfig, sentences: int, tokens: int, precision: str = "fp32", frozen: Iterable[str] = ()
) -> Footprint:
    """The footprint of a micro batch whose sentences all have `tokens` tokens, on both sides.

    frozen: names of the parameters that the phase freezes.

    A kernel of a device can keep less than the operators that are counted here, such as the flash kernels of attention.
    Raises ConfigError if the base's configuration cannot be used.
    """

    def loss(model: T5VAE) -> torch.Tensor:
        ids_BT = torch.zeros(sentences, tokens, dtype=torch.long)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        decodes = model.prior is None or any(not name.startswith("prior.") for name in trained)
        eps_BL = torch.zeros(sentences, max(1, model.latent_dim))
        terms = model(ids_BT, torch.ones_like(ids_BT), ids_BT if decodes else None, eps_BL)
        nats = terms.rec_B.sum() + terms.kl_BL.sum()
        return nats - terms.log_p_B.sum() if isinstance(terms, PriorTerms) else nats

    return footprint_of(settings, loss, precision, frozen)


def footprint_of(
    settings: ModelConfig,
    loss: Callable[[T5VAE], torch.Tensor],
    precision: str = "fp32",
    frozen: Iterable[str] = (),
) -> Footprint:
    """The footprint of any loss of a model, and of its backward pass. `loss` makes its inputs: they are fake, too."""
    memory, fixed = _Memory(), set(frozen)
    model = skeleton(settings).train()
    with FakeTensorMode():
        _fill(model, DTYPES[precision])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in fixed)
            if name not in fixed:
                # The engine has the gradients, and they are counted there.
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        memory.leave_out(model.parameters())
        with memory:
            loss(model).backward()
    return Footprint(memory.peak, memory.peak_of(model.t5.config.vocab_size))


def _fill(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the parameters by fake ones; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="cpu"))
            module._parameters[name] = made[id(parameter)]


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _Memory(TorchDispatchMode):
    """Counts the bytes of the storages that the operators inside create, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self._outside: set[int] = set()
        self._alive: dict[int, tuple[int, int]] = {}
        self._now = 0
        self._by_width: Counter[int] = Counter()
        self.peak = 0
        self._at_peak: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # transformers asks whether a mask is all true, and then does without it; a batch has padding.
            return False
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return result

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these."""
        self._outside |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def peak_of(self, width: int) -> int:
        """Bytes at the peak of the tensors whose last dimension is `width`."""
        return self._at_peak.get(width, 0)

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._outside or key in self._alive:
            return
        size, width = storage.nbytes(), tensor.shape[-1] if tensor.dim() else 0
        self._alive[key] = (size, width)
        self._now += size
        self._by_width[width] += size
        weakref.finalize(storage, self._forget, key)
        if self._now > self.peak:
            self.peak = self._now
            self._at_peak = dict(self._by_width)

    def _forget(self, key: int) -> None:
        size, width = self._alive.pop(key)
        self._now -= size
        self._by_width[width] -= size
