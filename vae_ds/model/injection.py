"""Inject z into a stock T5 decoder (docs/method.md, From z to the sentence).

Small modules with the same signature replace layers of the decoder's blocks. The stock decoder, its loss and `generate`
then take z, with shape (B, 1, L), as their `encoder_hidden_states`.

`cross_attention` is the method in the text of Park & Lee. `self_attention` and `embedding` are the memory and the
embedding scheme of Optimus (Li et al. 2020), which uses both by default. The published code of Park & Lee uses
`self_attention`.

Shapes: B sentences, T tokens, K keys so far, P slots of z, H = d_model, L latent units, A heads, S = d_kv.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import EncoderDecoderCache

from vae_ds.config import ModelConfig


class LatentCrossAttention(nn.Module):
    """Cross-attention with z as its only key and value. The softmax over one key is 1, so the output is `o(z W_n)`.

    The query and key projections and the layer norm of the stock layer have no effect in this case and are removed. The
    pretrained output projection `o` (A*S -> H) stays. `memory` is W_n (L -> A*S), with K_n = V_n = z W_n. The dropout
    of the output is kept. The dropout of attention weights is removed, because it would disable whole heads.
    """

    def __init__(self, memory: nn.Linear, o: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.memory = memory
        self.o = o
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden_states: Tensor, key_value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden_states (B, T, H), key_value_states z (B, 1, L). Returns (B, T, H), no position bias and no weights.

        z is float32 and is cast to the dtype of the decoder here. Otherwise the sum would promote the residual stream.
        Caches are not used, because z W_n is one small product per sentence.
        """
        added_B1H = self.o(self.memory(key_value_states.to(self.memory.weight.dtype)))
        added_BTH = added_B1H.expand_as(hidden_states)  # a separate dropout mask per position, as in the stock layer
        return hidden_states + self.dropout(added_BTH).to(hidden_states.dtype), None, None


class SlotCrossAttention(nn.Module):
    """The stock cross-attention over P keys and values of z: with several, the softmax and the queries matter again.

    `memory` is W_n (L -> P*H). Its P slots stand where the stock layer has the states of an encoder, so all of its
    pretrained projections stay, and so does its dropout of attention weights.
    """

    def __init__(self, stock: Any, memory: nn.Linear, slots: int) -> None:
        super().__init__()
        self.EncDecAttention = stock.EncDecAttention
        self.layer_norm = stock.layer_norm
        self.dropout = stock.dropout
        self.memory = memory
        self.slots = slots

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden_states (B, T, H), key_value_states z (B, 1, L). Returns (B, T, H), no position bias and no weights.

        All slots are visible, so the mask, which is that of one key, is not used. Caches are used as in the stock
        layer. z is cast to the dtype of the decoder here.
        """
        memory_B1X = self.memory(key_value_states.to(self.memory.weight.dtype))
        slots_BPH = memory_B1X.squeeze(1).unflatten(-1, (self.slots, -1))
        added_BTH, *_ = self.EncDecAttention(
            self.layer_norm(hidden_states), key_value_states=slots_BPH, past_key_values=past_key_values
        )
        return hidden_states + self.dropout(added_BTH), None, None


class MemoryMlp(nn.Module):
    """z with the output of a small network of z beside it: what the memory reads with `memory_mlp`. Float32.

    W_proj is linear, so without the network the decoder's first look at z does not see how units combine.
    """

    def __init__(self, units: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = normal_linear(Float32Linear, units, width, 1.0 / math.sqrt(units), generator)
        self.second = normal_linear(Float32Linear, width, width, 1.0 / math.sqrt(width), generator)

    def forward(self, z_B1L: Tensor) -> Tensor:
        """(B, 1, L) to (B, 1, L + width), float32."""
        with torch.autocast(z_B1L.device.type, enabled=False):
            return torch.cat([z_B1L.float(), self.second(functional.gelu(self.first(z_B1L)))], -1)


class LatentSelfAttention(nn.Module):
    """The stock self-attention layer with one more key and value, z W_n, visible at every position, without a bias.

    With several slots, z W_n is cut into that many keys and values.

    Key and value are the same vector, K_n = V_n = z W_n, as in Optimus and in the code of Park & Lee: both project z to
    one vector per layer (width A*S) and use it as past key and past value. It has no position, so the tokens keep their
    relative distances, and it is not stored in caches. Projections, norm and dropouts are those of the stock layer.
    """

    def __init__(self, stock: Any, memory: nn.Linear, slots: int) -> None:
        super().__init__()
        self.slots = slots
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

        `attention_mask` and `position_bias`, in and out, do not include z. z is cast to the dtype of the decoder here.
        """
        attention = self.SelfAttention
        normed_BTH = self.layer_norm(hidden_states)
        query_BATS, key_BATS, value_BATS = (
            self._heads(part(normed_BTH)) for part in (attention.q, attention.k, attention.v)
        )
        memory_B1X = self.memory(latent.to(self.memory.weight.dtype))
        z_BAPS = self._heads(memory_B1X.unflatten(-1, (self.slots, -1)).squeeze(1)).to(key_BATS.dtype)

        pair = isinstance(past_key_values, EncoderDecoderCache)
        cache = past_key_values.self_attention_cache if pair else past_key_values
        seen = 0 if cache is None else cache.get_seq_length(attention.layer_idx)
        # A static cache updates its length in place, so compute the positions before the update.
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
            torch.cat([z_BAPS, key_BAKS], 2),
            torch.cat([z_BAPS, value_BAKS], 2),
            attn_mask=functional.pad(biased, (self.slots, 0)).to(query_BATS.dtype),
            dropout_p=attention.dropout if attention.training else 0.0,
            scale=1.0,  # the weights of T5 include the scale
        )
        added_BTH = attention.o(mixed_BATS.transpose(1, 2).flatten(2))
        return hidden_states + self.dropout(added_BTH), position_bias, None

    def _heads(self, states: Tensor) -> Tensor:
        """(B, T, A*S) to (B, A, T, S)."""
        return states.unflatten(-1, (self.SelfAttention.n_heads, -1)).transpose(1, 2)


def _masked(bias_ATK: Tensor, mask: Tensor | None, position_T: Tensor) -> Tensor:
    """The position bias, with minus infinity at masked positions. `mask` has any of the forms of transformers."""
    if mask is None:  # transformers passes None for a purely causal mask
        mask = torch.arange(bias_ATK.shape[-1], device=bias_ATK.device) <= position_T[:, None]
    if mask.dtype == torch.bool:
        return bias_ATK.masked_fill(~mask, -math.inf)
    return bias_ATK + mask


class NoCrossAttention(nn.Module):
    """Replacement of the cross-attention that adds nothing and has no parameters."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return hidden_states (B, T, H) unchanged."""
        return hidden_states, None, None


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, for any dtype of its weights and with or without autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs), float32."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(input.float(), self.weight.float(), bias)


class SafeInHalf(nn.Linear):
    """The last feed-forward projection of T5, `wo`, which computes in float32 if its weight is float16.

    In pretrained models its outputs exceed the largest float16 number, so transformers keeps its weight in float32. An
    engine that casts all weights silently undoes that. The residual stream is float32 after this layer, as in
    transformers.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_ff) to (..., H): float32 for a float16 weight, otherwise like `nn.Linear`."""
        if self.weight.dtype != torch.float16:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float())


def guard_half(t5: Any) -> None:
    """Make every `wo` of a stock T5 safe in float16, in place. Names and weights do not change."""
    for module in t5.modules():
        wo = getattr(module, "wo", None)
        if isinstance(wo, nn.Linear):
            # Only the class changes, so references to the layer, its weight and its hooks stay valid.
            wo.__class__ = SafeInHalf


def inject(t5: Any, settings: ModelConfig, generator: torch.Generator) -> None:
    """Add the inputs for z to the decoder of a stock T5, in place, and remove unused modules.

    `settings.injection` selects the inputs. W_proj is drawn from N(0, memory_std^2), by default with the variance
    1 / (number of its inputs), from `generator` only: W_n in the order of the layers, then the matrix of the embedding.
    Only `cross_attention` keeps a part of the stock cross-attention, and with several slots all of it. Injection `none`
    also removes the encoder, because it is unused and weight decay would change it.
    """
    config, decoder = t5.config, t5.decoder
    injections = settings.injection.split("+")
    inputs = settings.latent_dim + settings.memory_mlp
    std = settings.memory_std or 1.0 / math.sqrt(inputs)

    def memory(width: int) -> nn.Linear:
        return normal_linear(nn.Linear, inputs, width, std, generator)

    if "none" in injections:
        del t5.encoder
    for block in decoder.block:
        stock = block.layer[1]
        output = stock.EncDecAttention.o
        block.layer[1] = NoCrossAttention()
        if "cross_attention" in injections and settings.slots > 1:
            block.layer[1] = SlotCrossAttention(stock, memory(settings.slots * config.d_model), settings.slots)
        elif "cross_attention" in injections:
            block.layer[1] = LatentCrossAttention(memory(output.in_features), output, config.dropout_rate)
        if "self_attention" in injections:
            wide = memory(settings.slots * output.in_features)
            block.layer[0] = LatentSelfAttention(block.layer[0], wide, settings.slots)
    # Use hooks, because the stock decoder passes neither z to the self-attention nor its embeddings to a module.
    if "self_attention" in injections:
        decoder.register_forward_pre_hook(_pass_latent, with_kwargs=True)
    if "embedding" in injections:
        decoder.memory = memory(config.d_model)
        decoder.register_forward_pre_hook(_add_to_embeddings, with_kwargs=True)


def _pass_latent(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass z to each block: the stock stack passes unknown keyword arguments to all of its blocks."""
    return args, kwargs | {"latent": kwargs["encoder_hidden_states"]}


def _add_to_embeddings(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add z W to the embedding of each token, before the dropout of the stack, as in Optimus. z is cast here."""
    z_B1L = kwargs["encoder_hidden_states"].to(decoder.memory.weight.dtype)
    embedded_BTH = decoder.embed_tokens(kwargs["input_ids"])
    summed_BTH = embedded_BTH + decoder.memory(z_B1L).to(embedded_BTH.dtype)
    return args, kwargs | {"input_ids": None, "inputs_embeds": summed_BTH}


def normal_linear(
    kind: type[nn.Linear], inputs: int, outputs: int, std: float, generator: torch.Generator
) -> nn.Linear:
    """A linear layer without bias, float32 on the CPU, with a weight drawn from N(0, std^2) by `generator` only.

    The layer is created on the meta device, because torch's initial values would advance the global generator.
    """
    layer = kind(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator, dtype=torch.float32) * std)
    return layer
