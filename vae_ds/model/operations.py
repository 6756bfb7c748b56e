"""The floating-point operations of a training step, from the shapes of the weights.

A product of matrices with shapes (I, J) and (J, K) has 2 I J K operations. Other operators are not counted, as in
torch's FlopCounterMode, which finds the same numbers by running the model. Here nothing runs: the count takes
milliseconds at any size. A backward pass has one product for each input of a product that needs a gradient. So frozen
weights cost less, and so does a frozen layer that has nothing to train before it.

Shapes: B sentences, S positions of the encoder's input, T positions of the decoder, padding included.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from vae_ds.model.injection import LatentCrossAttention, LatentSelfAttention, SlotCrossAttention
from vae_ds.model.prior import Coupling, Whitening
from vae_ds.model.t5vae import T5VAE

EXTENTS = ("rows", "source", "target", "source_squared", "target_squared")
"""Sums over the micro batches of a step: B, B S, B T, B S^2, B T^2."""

_ROWS, _SOURCE, _TARGET, _SOURCE_SQUARED, _TARGET_SQUARED = EXTENTS


def extents(source_BS: Sequence[int], target_BT: Sequence[int]) -> dict[str, int]:
    """The EXTENTS of one micro batch, from the shapes of the encoder's input (B, S) and of the targets (B, T)."""
    (rows, source), (_, target) = source_BS, target_BT
    values = (rows, rows * source, rows * target, rows * source**2, rows * target**2)
    return dict(zip(EXTENTS, values, strict=True))


@dataclass(frozen=True)
class Operations:
    """Operations for each unit of EXTENTS: what a step computes grows with the squares of the lengths at most."""

    per: Mapping[str, int]

    def of(self, sums: Mapping[str, float]) -> float:
        """The operations of a forward and backward pass with these EXTENTS; other entries of `sums` are ignored."""
        return float(sum(count * sums[name] for name, count in self.per.items()))


def count_operations(model: T5VAE, frozen: Iterable[str] | None = None, *, recomputed: bool = False) -> Operations:
    """The operations of a forward and backward pass of `model`, which may be on the meta device.

    frozen: names of the parameters that the phase freezes; None for those that do not require a gradient now.
    recomputed: count the second forward pass of gradient checkpointing, if the model has it. Without it, the count is
    the one that defines the MFU (model FLOPs utilization, Chowdhery et al. 2022).
    """
    fixed = None if frozen is None else set(frozen)
    trains = {
        id(parameter): parameter.requires_grad if fixed is None else name not in fixed
        for name, parameter in model.named_parameters()
    }
    counter = _Counter(trains, 1 if recomputed and model.settings.gradient_checkpointing else 0)
    counter.pass_of(model)
    return Operations(counter.totals)


class _Counter:
    """Follows the model from its input to its output. Flags say whether a tensor needs a gradient."""

    def __init__(self, trains: dict[int, bool], recomputed: int) -> None:
        self.totals = dict.fromkeys(EXTENTS, 0)
        self._trains = trains
        self._recomputed = recomputed
        self._forward_passes = 1

    def pass_of(self, model: T5VAE) -> None:
        t5, embedded = model.t5, self._is_trained(model.t5.shared)
        own = {id(parameter) for parameter in model.prior.parameters()} if model.prior is not None else set()
        fits_prior = not any(trained for key, trained in self._trains.items() if key not in own) and bool(own)
        needs_z = False
        if model.bottleneck is not None:
            needs = self._stack(t5.encoder, _SOURCE, _SOURCE_SQUARED, embedded, False)
            needs_z = self._linears((model.bottleneck.mu, model.bottleneck.logvar), _ROWS, needs)
        if model.prior is not None:
            self._prior(model.prior, needs_z)
        if fits_prior:
            return  # no pass of the decoder
        if model.memory_mlp is not None:
            mlp = model.memory_mlp
            needs_z = self._linear(mlp.second, _ROWS, self._linear(mlp.first, _ROWS, needs_z)) or needs_z
        if hasattr(t5.decoder, "memory"):
            embedded = self._linear(t5.decoder.memory, _ROWS, needs_z) or embedded
        needs = self._stack(t5.decoder, _TARGET, _TARGET_SQUARED, embedded, needs_z)
        self._linear(t5.lm_head, _TARGET, needs)

    def _prior(self, prior: nn.Module, needs: bool) -> None:
        for part in prior.modules():
            if isinstance(part, Whitening):
                # The mean is subtracted before the product.
                is_trained = self._is_trained(part)
                needs = self._product(_ROWS, len(part.mean) ** 2, needs or is_trained, is_trained)
            elif isinstance(part, Coupling):
                # The units that a coupling keeps reach the next one whether it trains or not.
                inner = self._linear(part.first, _ROWS, needs)
                needs = self._linear(part.last, _ROWS, self._linear(part.second, _ROWS, inner)) or needs

    def _stack(self, stack: Any, each: str, pairs: str, needs: bool, needs_z: bool) -> bool:
        bias = self._is_trained(stack.block[0].layer[0].SelfAttention.relative_attention_bias)
        with self._checkpointed():
            for block in stack.block:
                needs = self._self_attention(block.layer[0], each, pairs, needs, needs_z, bias) or needs
                if isinstance(block.layer[1], LatentCrossAttention):
                    cross = block.layer[1]
                    needs = self._linear(cross.o, _ROWS, self._linear(cross.memory, _ROWS, needs_z)) or needs
                if isinstance(block.layer[1], SlotCrossAttention):
                    needs = self._slots(block.layer[1], each, needs, needs_z) or needs
                needs = self._feed_forward(block.layer[-1], each, needs) or needs
        return needs or self._is_trained(stack.final_layer_norm)

    def _self_attention(self, layer: Any, each: str, pairs: str, needs: bool, needs_z: bool, bias: bool) -> bool:
        attention = layer.SelfAttention
        normed = needs or self._is_trained(layer.layer_norm)
        query, key, value = (self._linear(part, each, normed) for part in (attention.q, attention.k, attention.v))
        seen = {pairs: 1}
        if isinstance(layer, LatentSelfAttention):
            memory = self._linear(layer.memory, _ROWS, needs_z)
            key, value = key or memory, value or memory
            seen[each] = layer.slots  # z is more keys of each position
        scores = query or key or bias
        for extent, count in seen.items():
            for times in (1 + query + key, 1 + value + scores):
                self._add(extent, 2 * attention.inner_dim * count, times)
        return self._linear(attention.o, each, value or scores)

    def _slots(self, layer: SlotCrossAttention, each: str, needs: bool, needs_z: bool) -> bool:
        attention, count = layer.EncDecAttention, layer.slots
        query = self._linear(attention.q, each, needs or self._is_trained(layer.layer_norm))
        memory = self._linear(layer.memory, _ROWS, needs_z)
        key, value = (self._linear(part, _ROWS, memory, count) for part in (attention.k, attention.v))
        scores = query or key
        for times in (1 + query + key, 1 + value + scores):
            self._add(each, 2 * attention.inner_dim * count, times)
        return self._linear(attention.o, each, value or scores)

    def _feed_forward(self, layer: Any, each: str, needs: bool) -> bool:
        normed = needs or self._is_trained(layer.layer_norm)
        dense = layer.DenseReluDense
        inputs = [getattr(dense, name) for name in ("wi", "wi_0", "wi_1") if hasattr(dense, name)]
        return self._linear(dense.wo, each, self._linears(inputs, each, normed))

    def _linears(self, layers: Iterable[Any], each: str, needs: bool) -> bool:
        """Several layers with the same input. Returns whether the output of one needs a gradient."""
        return True in [self._linear(layer, each, needs) for layer in layers]

    def _linear(self, layer: Any, each: str, needs: bool, count: int = 1) -> bool:
        """A linear layer, or one with adapters, `count` times per unit. Returns whether its output needs a gradient."""
        if hasattr(layer, "base_layer"):
            (down,) = [self._linear(part, each, needs, count) for part in layer.lora_A.values()]
            (up,) = [self._linear(part, each, down, count) for part in layer.lora_B.values()]
            return self._linear(layer.base_layer, each, needs, count) or up
        return self._product(each, count * layer.in_features * layer.out_features, needs, self._is_trained(layer))

    def _product(self, each: str, size: int, needs: bool, is_trained: bool) -> bool:
        self._add(each, 2 * size, 1 + needs + is_trained)
        return needs or is_trained

    def _add(self, extent: str, operations: int, times: int) -> None:
        """`times`: one product forward, and one for each gradient."""
        self.totals[extent] += operations * (times + self._forward_passes - 1)

    def _is_trained(self, module: nn.Module) -> bool:
        return any(self._trains[id(parameter)] for parameter in module.parameters(recurse=False))

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        self._forward_passes += self._recomputed
        yield
        self._forward_passes -= self._recomputed
