"""The importance-weighted bound on the likelihood (Burda et al. 2016).

Shapes: S sentences, K samples of each, P (sentence, sample) pairs, L latent units. All quantities are in nats.
"""

import math

import torch

from vae_ds.model import gaussian


def log_weights(
    rec_P: torch.Tensor, z_PL: torch.Tensor, mu_PL: torch.Tensor, logvar_PL: torch.Tensor, log_p_P: torch.Tensor
) -> torch.Tensor:
    """log p(x|z) p(z) / q(z|x) of each sample, float64, from rec = -log p(x|z) and log p(z) (Burda et al. 2016)."""
    return log_p_P.double() - gaussian.log_density(z_PL.double(), mu_PL.double(), logvar_PL.double()) - rec_P.double()


def importance_nll(log_weights_SK: torch.Tensor) -> torch.Tensor:
    """-log 1/K sum_k w_k of each sentence, nats: in expectation an upper bound on -log p(x), tighter for larger K."""
    return math.log(log_weights_SK.shape[1]) - torch.logsumexp(log_weights_SK, dim=1)
