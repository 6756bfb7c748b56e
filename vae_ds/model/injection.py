"""How z enters a stock T5 decoder.

Layers of the decoder's blocks give way to small modules with the same signature, so that the stock decoder, its loss
path and `generate` take z, shaped (B, 1, L), as their `encoder_hidden_states`.

`cross_attention` is Park & Lee's text. `self_attention` and `embedding` are the memory and the embedding scheme of
Optimus (Li et al. 2020), which adds them up by default; the first is also what Park & Lee's published code ran.

Shapes: B sentences, T tokens, K keys so far, H = d_model, L latent units, A heads, S = d_kv.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import EncoderDecoderCache

from vae_ds.config import ModelConfig


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


class LatentSelfAttention(nn.Module):
    """The stock self-attention layer with one more key and value, z W_n, visible to every position, without a bias.

    Key and value are one vector, K_n = V_n = z W_n, as in Optimus and in Park & Lee's code: both project z to one
    vector a layer (A*S wide) and use it as past key and as past value. It stands at no position: the tokens keep
    their relative distances, and no cache holds it. Layers, norm and dropouts are the stock layer's own.
    """

    def __init__(self, stock: Any, memory: nn.Linear) -> None:
        super().__init__()
        self.SelfAttention = stock.SelfAttention
        self.layer_norm = stock.layer_norm
        self.dropout = stock.dropout
        self.memory = memory

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        *,
        latent: Tensor,
        **_: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """hidden_states (B, T, H), latent z (B, 1, L), the rest as in the stock layer. Returns (B, T, H) and the bias.

        `attention_mask` and `position_bias`, in and out, know nothing of z. z is cast to the decoder's dtype here.
        """
        attention = self.SelfAttention
        normed_BTH = self.layer_norm(hidden_states)
        query_BATS, key_BATS, value_BATS = (
            self._heads(part(normed_BTH)) for part in (attention.q, attention.k, attention.v)
        )
        z_BA1S = self._heads(self.memory(latent.to(self.memory.weight.dtype))).to(key_BATS.dtype)

        pair = isinstance(past_key_values, EncoderDecoderCache)
        cache = past_key_values.self_attention_cache if pair else past_key_values
        seen = 0 if cache is None else cache.get_seq_length(attention.layer_idx)
        # A static cache counts in place: the sum has to be taken before its update.
        position_T = torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen
        key_BAKS, value_BAKS = key_BATS, value_BATS
        if cache is not None:
            key_BAKS, value_BAKS = cache.update(key_BATS, value_BATS, attention.layer_idx)

        if position_bias is None:
            position_bias = attention.compute_bias(
                len(position_T), key_BAKS.shape[2], device=hidden_states.device, past_seen_tokens=position_T[0]
            )
        biased = _masked(position_bias, attention_mask, position_T)
        mixed_BATS = functional.scaled_dot_product_attention(
            query_BATS,
            torch.cat([z_BA1S, key_BAKS], 2),
            torch.cat([z_BA1S, value_BAKS], 2),
            attn_mask=functional.pad(biased, (1, 0)).to(query_BATS.dtype),
            dropout_p=attention.dropout if attention.training else 0.0,
            scale=1.0,  # T5 has the scale in its weights
        )
        added_BTH = attention.o(mixed_BATS.transpose(1, 2).flatten(2))
        return hidden_states + self.dropout(added_BTH), position_bias, None

    def _heads(self, states: Tensor) -> Tensor:
        """(B, T, A*S) to (B, A, T, S)."""
        return states.unflatten(-1, (self.SelfAttention.n_heads, -1)).transpose(1, 2)


def _masked(bias_ATK: Tensor, mask: Tensor | None, position_T: Tensor) -> Tensor:
    """The position bias with what a token may not see at minus infinity; `mask` in any of transformers' forms."""
    if mask is None:  # transformers leaves out a mask that is causal and no more
        mask = torch.arange(bias_ATK.shape[-1], device=bias_ATK.device) <= position_T[:, None]
    if mask.dtype == torch.bool:
        return bias_ATK.masked_fill(~mask, -math.inf)
    return bias_ATK + mask


class NoCrossAttention(nn.Module):
    """The layer of a decoder without cross-attention: it adds nothing, and has no parameters."""

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
    """Let z into the decoder of a stock T5, in place, as `settings.injection` says; what is not needed goes.

    W_proj is drawn from N(0, memory_std^2), 1/L by default, from `generator` alone: W_n in the order of the layers,
    then the embedding's. Only `cross_attention` keeps anything of the cross-attention. Injection `none` also removes
    the encoder: nothing reads it, and an optimizer would still decay it.
    """
    config, decoder = t5.config, t5.decoder
    ways = settings.injection.split("+")
    std = settings.memory_std or 1.0 / math.sqrt(settings.latent_dim)

    def memory(width: int) -> nn.Linear:
        return normal_linear(nn.Linear, settings.latent_dim, width, std, generator)

    if "none" in ways:
        del t5.encoder
    for block in decoder.block:
        output = block.layer[1].EncDecAttention.o
        block.layer[1] = NoCrossAttention()
        if "cross_attention" in ways:
            block.layer[1] = LatentCrossAttention(memory(output.in_features), output, config.dropout_rate)
        if "self_attention" in ways:
            block.layer[0] = LatentSelfAttention(block.layer[0], memory(output.in_features))
    # Hooks, since a stack calls no layer of its blocks with its embeddings, and no self-attention with z.
    if "self_attention" in ways:
        decoder.register_forward_pre_hook(_hand_down, with_kwargs=True)
    if "embedding" in ways:
        decoder.memory = memory(config.d_model)
        decoder.register_forward_pre_hook(_embed, with_kwargs=True)


def _hand_down(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give z to each block; the stock stack hands what it does not know to all of them."""
    return args, kwargs | {"latent": kwargs["encoder_hidden_states"]}


def _embed(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add z W to the embedding of each token: before the stack's dropout, as in Optimus. z is cast here."""
    z_B1L = kwargs["encoder_hidden_states"].to(decoder.memory.weight.dtype)
    embedded_BTH = decoder.embed_tokens(kwargs["input_ids"])
    summed_BTH = embedded_BTH + decoder.memory(z_B1L).to(embedded_BTH.dtype)
    return args, kwargs | {"input_ids": None, "inputs_embeds": summed_BTH}


def normal_linear(
    kind: type[nn.Linear], inputs: int, outputs: int, std: float, generator: torch.Generator
) -> nn.Linear:
    """A linear layer without bias, float32 on the CPU, its weight drawn from N(0, std^2) with `generator` alone.

    Made on the meta device first: torch's own initial values would advance the global generator.
    """
    layer = kind(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator, dtype=torch.float32) * std)
    return layer
