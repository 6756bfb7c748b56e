"""The loss of each token from the states of the decoder.

The logits are the largest tensor of a pass. Where memory matters more than time, they are never whole in memory.
Shapes: B sentences, T tokens, N = B T positions, H = d_model, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE: int = 1 << 25  # elements; 128 MiB in float32


def token_losses(t5: Any, states_BTH: Tensor, labels_BT: Tensor, in_parts: bool) -> Tensor:
    """- log p(x_t | x_<t, z) of each token: (B, T), float32, nats, 0 for the label -100.

    in_parts: at most LOGITS_AT_ONCE logits are in memory at a time. With a gradient they are computed twice. A model
    that ZeRO 3 divides computes them at once: each call of the head is a collective, and all ranks must make as many.
    """
    states_NH, labels_N = states_BTH.flatten(0, 1), labels_BT.flatten()
    size = len(labels_N)
    if in_parts and not hasattr(t5.lm_head.weight, "ds_id"):
        size = max(1, LOGITS_AT_ONCE // t5.config.vocab_size)
    parts = [(t5, *part) for part in zip(states_NH.split(size), labels_N.split(size), strict=True)]
    if torch.is_grad_enabled() and len(parts) > 1:
        nll = [checkpoint(_nll, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        nll = [_nll(*part) for part in parts]
    return torch.cat(nll).view_as(labels_BT)


def _nll(t5: Any, states_NH: Tensor, labels_N: Tensor) -> Tensor:
    # An mT5 never scales.
    if t5.config.model_type == "t5" and t5.config.scale_decoder_outputs:
        states_NH = states_NH * t5.model_dim**-0.5
    logits_NV = t5.lm_head(states_NH).float()
    return functional.cross_entropy(logits_NV, labels_N, ignore_index=-100, reduction="none")
