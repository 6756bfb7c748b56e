"""How z enters a stock T5 decoder.

Each decoder block's cross-attention layer gives way to a small module with the same signature, so that the stock
decoder, its loss path and `generate` take z, shaped (B, 1, L), as their `encoder_hidden_states`.

Shapes: B sentences, T tokens, H = d_model, L latent units, A heads, S = d_kv.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vae_ds.settings import ModelConfig


class LatentCrossAttention(nn.Module):
    """Cross-attention whose sole key and value is z: the softmax over one key is 1, so it is `o(z W_n)` everywhere.

    The query and key projections and the layer norm of the stock layer have no influence there and are gone; the
    pretrained output projection `o` (A*S -> H) stays. `memory` is W_n (L -> A*S), K_n = V_n = z W_n. Of the stock
    layer's dropouts only the output's is kept: the one on attention weights would silence whole heads.
    """

    def __init__(self, memory: nn.Linear, o: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.memory = memory
        self.o = o
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden_states: Tensor, key_value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden_states (B, T, H), key_value_states z (B, 1, L). Returns (B, T, H) and no position bias, no weights.

        z comes in float32. It is cast to the decoder's dtype here: the sum would promote the residual stream otherwise.
        Caches are left alone; z W_n is one small product a sentence.
        """
        added_B1H = self.o(self.memory(key_value_states.to(self.memory.weight.dtype)))
        added_BTH = added_B1H.expand_as(hidden_states)  # dropout draws for each position, as in the stock layer
        return hidden_states + self.dropout(added_BTH).to(hidden_states.dtype), None, None


class NoCrossAttention(nn.Module):
    """The layer of a plain language model: it adds nothing."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns hidden_states (B, T, H) as they came."""
        return hidden_states, None, None


class SafeInHalf(nn.Linear):
    """T5's last feed-forward projection, `wo`: where its weight is float16 it computes in float32.

    Its outputs pass float16's largest number in pretrained models, so transformers keeps its weight in float32; an
    engine that casts all weights undoes that unseen. The residual stream is float32 from there on, as in transformers.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_ff) to (..., H): float32 for a float16 weight, else as any linear layer."""
        if self.weight.dtype != torch.float16:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float())


def guard_half(t5: Any) -> None:
    """Make every `wo` of a stock T5 safe in float16, in place; names and weights stay."""
    for module in t5.modules():
        wo = getattr(module, "wo", None)
        if isinstance(wo, nn.Linear):
            # The class alone differs, so what holds the layer, its weight or its hooks need not know.
            wo.__class__ = SafeInHalf


def inject(t5: Any, settings: ModelConfig, generator: torch.Generator) -> None:
    """Replace the cross-attention of each decoder block of a stock T5, in place, as `settings.injection` says.

    W_n of all layers are drawn from N(0, memory_std^2), 1/L by default, in the order of the layers and from `generator`
    alone. Injection `none` also removes the encoder: nothing reads it, and an optimizer would still decay it.
    """
    config = t5.config
    if settings.injection == "none":
        del t5.encoder
    for block in t5.decoder.block:
        if settings.injection == "none":
            block.layer[1] = NoCrossAttention()
            continue
        std = settings.memory_std or 1.0 / math.sqrt(settings.latent_dim)
        memory = normal_linear(nn.Linear, settings.latent_dim, config.num_heads * config.d_kv, std, generator)
        block.layer[1] = LatentCrossAttention(memory, block.layer[1].EncDecAttention.o, config.dropout_rate)


def normal_linear(
    kind: type[nn.Linear], inputs: int, outputs: int, std: float, generator: torch.Generator
) -> nn.Linear:
    """A linear layer without bias, float32 on the CPU, its weight drawn from N(0, std^2) with `generator` alone.

    Made on the meta device first: torch's own initial values would advance the global generator.
    """
    layer = kind(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator, dtype=torch.float32) * std)
    return layer
