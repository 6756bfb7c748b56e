"""The bottleneck: from the states of the encoder to the posterior of z.

Shapes: B sentences, T tokens, H = d_model, L latent units.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vae_ds.config import ModelConfig
from vae_ds.model.injection import Float32Linear, normal_linear


class Bottleneck(nn.Module):
    """Maps pooled encoder states to the posterior: mu = h W_mu, logvar = h W_logvar, without biases."""

    def __init__(self, width: int, settings: ModelConfig, generator: torch.Generator) -> None:
        """`width` is H. Draws W_mu, then W_logvar, from `generator` only."""
        super().__init__()
        self.pooling = settings.pooling
        mu_std = settings.mu_std or 1.0 / math.sqrt(width)
        self.mu = normal_linear(Float32Linear, width, settings.latent_dim, mu_std, generator)
        self.logvar = normal_linear(Float32Linear, width, settings.latent_dim, settings.logvar_std, generator)

    def forward(self, states: Sequence[Tensor], mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Map the states of one or more layers, each (B, T, H), to mu and logvar, each (B, L), float32.

        Each layer is pooled over the real tokens (mask 1) only. The pooled vectors of several layers are averaged.
        """
        with torch.autocast(mask_BT.device.type, enabled=False):
            pooled_BH = torch.stack([self._pool(states_BTH.float(), mask_BT) for states_BTH in states]).mean(0)
        return self.mu(pooled_BH), self.logvar(pooled_BH)

    def _pool(self, states_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        padding_BT1 = mask_BT.eq(0).unsqueeze(-1)
        if self.pooling == "max":
            return states_BTH.masked_fill(padding_BT1, -math.inf).amax(1)
        return states_BTH.masked_fill(padding_BT1, 0.0).sum(1) / mask_BT.ne(0).sum(1, keepdim=True)
