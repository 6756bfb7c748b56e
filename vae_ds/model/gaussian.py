"""The diagonal Gaussian posterior: samples, KL, log densities, the aggregate posterior. All quantities are in nats.

Shapes: B sentences of a batch, L latent units, N samples, M mixture components (the sentences of a split).
"""

import math
from typing import Literal

import torch
from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)


def sample(mu_BL: Tensor, logvar_BL: Tensor, eps_BL: Tensor) -> Tensor:
    """z = mu + exp(logvar / 2) * eps, shape (B, L) (Kingma & Welling 2014). eps 0 gives the mean."""
    return mu_BL + torch.exp(0.5 * logvar_BL) * eps_BL


def kl_per_dim(mu_BL: Tensor, logvar_BL: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each unit, shape (B, L), in nats.

    `expm1` keeps the value accurate and non-negative if the posterior is close to the prior.
    """
    return 0.5 * (mu_BL.square() + torch.expm1(logvar_BL) - logvar_BL)


def log_density(z_BL: Tensor, mu_BL: Tensor, logvar_BL: Tensor) -> Tensor:
    """log q(z | x) summed over the units, shape (B,), in nats. The shapes broadcast; the last axis is L."""
    square_BL = (z_BL - mu_BL).square() * torch.exp(-logvar_BL)
    return -0.5 * (square_BL + logvar_BL + LOG_2PI).sum(-1)


def log_density_of_sample(logvar_BL: Tensor, eps_BL: Tensor) -> Tensor:
    """log q(z | x) of z = mu + exp(logvar / 2) * eps, summed over the units, shape (B,), in nats.

    In this form, mu has no gradient: it moves z and the density together, and the two terms would cancel by rounding.
    """
    return -0.5 * (eps_BL.square() + logvar_BL + LOG_2PI).sum(-1)


def log_prior(z_BL: Tensor) -> Tensor:
    """log N(z; 0, I) summed over the units, shape (B,), in nats."""
    return -0.5 * (z_BL.square() + LOG_2PI).sum(-1)


def log_aggregate(z_NL: Tensor, mu_ML: Tensor, logvar_ML: Tensor, chunk: int = 2048) -> Tensor:
    """log q(z_n) = log 1/M sum_m q(z_n | x_m), shape (N,), float64, in nats.

    The memory is that of a few `chunk` x `chunk` float64 matrices, for any N and M. The squares are expanded, so that
    two matrix products compute the result. In float64, centred at the mean of the components, the rounding error of
    this is about 1e-15 / variance nats.
    """
    if len(mu_ML) == 0:
        raise ValueError("an aggregate posterior needs at least one component")
    centre_L = mu_ML.double().mean(0)
    z_NL, mu_ML, logvar_ML = z_NL.double() - centre_L, mu_ML.double() - centre_L, logvar_ML.double()
    rows = [_log_sum(z_nL, mu_ML, logvar_ML, chunk) for z_nL in z_NL.split(chunk)]
    return torch.cat([*rows, z_NL.new_empty(0)]) - math.log(len(mu_ML))


def _log_sum(z_nL: Tensor, mu_ML: Tensor, logvar_ML: Tensor, chunk: int) -> Tensor:
    """log sum_m q(z_n | x_m) of one chunk of samples, shape (n,): a running log-sum-exp over chunks of components."""
    total_n = z_nL.new_full((len(z_nL),), -math.inf)
    for mu_mL, logvar_mL in zip(mu_ML.split(chunk), logvar_ML.split(chunk), strict=True):
        precision_mL = torch.exp(-logvar_mL)
        constant_m = (mu_mL.square() * precision_mL + logvar_mL + LOG_2PI).sum(-1)
        square_nm = z_nL.square() @ precision_mL.T - 2.0 * (z_nL @ (mu_mL * precision_mL).T)
        total_n = torch.logaddexp(total_n, torch.logsumexp(-0.5 * (square_nm + constant_m), dim=-1))
    return total_n


def active_units(mu_ML: Tensor, threshold: float = 0.01) -> int:
    """Number of units whose variance of mu over the M sentences is above `threshold` (Burda et al. 2016)."""
    return int((mu_ML.double().var(0, correction=0) > threshold).sum())


def thresholded_kl(
    kl_BL: Tensor,
    mode: Literal["per_dim", "per_dim_batch", "total", "total_batch"],
    nats: float,
    held_L: Tensor | None = None,
) -> Tensor:
    """The KL term of the loss with free bits, shape (B,), in nats (docs/method.md, KL threshold; paper, equation 2).

    `nats` is lambda; 0 turns the threshold off. `per_dim` takes max(lambda, kl) of each unit and sentence; `total`
    takes it of the sum over the units of each sentence. `per_dim_batch` uses `held_L`, the mean KL of each unit over
    the GLOBAL batch of the previous optimizer step. A unit counts with its KL if this mean is above lambda; otherwise
    it counts as lambda, without gradient. None (before the first step) counts the KL of all units. Therefore the result
    does not depend on micro batches or ranks. `total_batch` does the same with the sum over the units.
    """
    if nats == 0 or kl_BL.shape[-1] == 0:
        return kl_BL.sum(-1)
    if mode == "per_dim":
        return kl_BL.clamp(min=nats).sum(-1)
    if mode == "total":
        return kl_BL.sum(-1).clamp(min=nats)
    if mode == "per_dim_batch":
        if held_L is None:
            return kl_BL.sum(-1)
        return torch.where(held_L.to(kl_BL.device) > nats, kl_BL, nats).sum(-1)
    if mode == "total_batch":
        total_B = kl_BL.sum(-1)
        if held_L is None:
            return total_B
        return torch.where(held_L.to(kl_BL.device).sum() > nats, total_B, nats)
    raise ValueError(f"unknown free-bits mode {mode!r}; use per_dim, per_dim_batch, total or total_batch")
