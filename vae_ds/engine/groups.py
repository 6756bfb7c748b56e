"""Parameter groups of AdamW: which weights decay, and which have a learning rate of their own; and the clipping.

A group exists only if it has a trainable parameter: ZeRO 1 and 2 fail on an empty group. The groups are not part of a
checkpoint, which stores weights and moments by name. A run can therefore resume with other groups.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from vae_ds.config import OptimizerConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to norms and biases, which decay would pull to 0 without a gain in simplicity.

    These are all vectors, and T5's relative position biases, which are tables. The vectors of a T5 are the scales of
    its layer norms; its norms and linear layers have no biases. The embeddings and all matrices decay.
    """
    return parameter.dim() > 1 and not name.endswith("relative_attention_bias.weight")


def adamw(
    trainable: Mapping[str, nn.Parameter],
    settings: OptimizerConfig,
    half_of: Callable[[str], str] | None = None,
    is_new: Callable[[str], bool] | None = None,
) -> torch.optim.AdamW:
    """AdamW for the parameters by name, whole and in float32. `set_rates` sets the learning rate of each step.

    `half_of` maps a name to its part of the model. `is_new` says whether `new_weights_lr_factor` applies to a name.
    """
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        half = half_of(name) if half_of else ""
        factor = settings.new_weights_lr_factor if is_new and is_new(name) else 1.0
        decay = settings.weight_decay if decays(name, parameter) else 0.0
        groups.setdefault((half, factor, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "half": half, "lr_factor": factor, "weight_decay": decay}
            for (half, factor, decay), members in groups.items()
        ],
        lr=0.0,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def set_rates(adam: Any, lr: float, half: str | None) -> None:
    """Set the rate of each group: `lr` times its factor, 0 outside of `half` (None: the whole model)."""
    for group in adam.param_groups:
        group["lr"] = lr * group["lr_factor"] if half in (None, group["half"]) else 0.0


def clip(parameters: Collection[nn.Parameter], largest_norm: float) -> float:
    """Clip the gradients of whole parameters to this norm, 0 for no limit. Returns the norm before.

    A norm that is not finite leaves them as they are.
    """
    total = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    norm = float(total)
    if 0 < largest_norm < norm < math.inf:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest_norm, total)
    return norm
