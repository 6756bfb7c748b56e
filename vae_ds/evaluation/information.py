"""The mutual information of sentence and code, estimated from below against two mixtures of posteriors.

An estimate cannot exceed the logarithm of the number of its mixture's components. Therefore the mixture over a small
split (`mi`) measures the size of the split; the mixture over the training sentences (`mi_train`) has a higher limit.

Shapes: N sentences of the split, S of them in the estimate, C of a chunk, M training sentences, L latent units. All
quantities are float64 and in nats.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from vae_ds.data import Limits, TokenSet, collate, evaluation_batches
from vae_ds.distributed import Ranks, gather_rows, stream
from vae_ds.errors import CheckpointError
from vae_ds.model import T5VAE, gaussian

CHUNK = 2048  # sentences between two lines of progress, the size of the chunks of `log_aggregate`

Add = Callable[[int], Any]


class Posterior(NamedTuple):
    """The posterior of each sentence, in order, and one sample z of each. All are float64.

    log_p_N: log p(z) under a learned prior, in nats; None for N(0, I).
    """

    mu_NL: torch.Tensor
    logvar_NL: torch.Tensor
    z_NL: torch.Tensor
    log_p_N: torch.Tensor | None = None

    def kl(self) -> dict[str, torch.Tensor]:
        """`kl` of each sentence, (N,): analytic to N(0, I). Under a learned prior it is that of the sample z.

        Then `kl_normal` is the analytic one. Raises CheckpointError if a density is not finite.
        """
        normal_N = gaussian.kl_per_dim(self.mu_NL, self.logvar_NL).sum(dim=1)
        if self.log_p_N is None:
            return {"kl": normal_N}
        need_finite(self.log_p_N)
        kl_N = gaussian.log_density(self.z_NL, self.mu_NL, self.logvar_NL) - self.log_p_N
        return {"kl": kl_N, "kl_normal": normal_N}


def need_finite(log_p_N: torch.Tensor) -> None:
    """Raise CheckpointError unless the density of every code under a learned prior is finite."""
    wrong = int((~log_p_N.isfinite()).sum())
    if wrong:
        raise CheckpointError(
            f"the learned prior has no finite density for {wrong:,} of {len(log_p_N):,} codes; fit it again at a lower "
            "learning rate (vae-ds prior), or use the prior `normal`"
        )


def chosen(count: int, limit: int | None, seed: int) -> np.ndarray:
    """The sentences of an estimate that is a mean over at most `limit`: sorted indices, drawn without replacement."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(stream(seed, "mi-sentences").choice(count, limit, replace=False))


def within_split(posterior: Posterior, index_S: np.ndarray, ranks: Ranks, add: Add) -> torch.Tensor:
    """log q(z|x) - log q(z) of the sentences `index_S`, (S,); q(z) is the mixture over all N sentences of the split.

    Its mean is the mutual information under q (Hoffman & Johnson 2016). A value exceeds ln N only by rounding, which
    is removed. A collective: each rank compares every world-th sentence of `index_S` with all N.
    """

    def log_mixture(z_CL: torch.Tensor, own_C: torch.Tensor, index_C: np.ndarray) -> torch.Tensor:
        return gaussian.log_aggregate(z_CL, posterior.mu_NL, posterior.logvar_NL)

    return _gains(posterior, index_S, ranks, log_mixture, add).clamp(max=math.log(len(posterior.mu_NL)))


def against_training(
    posterior: Posterior,
    index_S: np.ndarray,
    train: tuple[torch.Tensor, torch.Tensor],
    ranks: Ranks,
    add: Add,
    component_N: np.ndarray | None = None,
) -> torch.Tensor:
    """log q(z|x) - log q(z) of the sentences `index_S`, (S,); q(z) is the mixture over training posteriors.

    train: mu_ML and logvar_ML of M training sentences. The mixture also has the sentence's own posterior: without it
    the mean could exceed the mutual information (docs/metrics.md). A value is at most ln(M + 1).
    component_N: whether a sentence of the split is among the M, which happens if the split is the training split. Such
    a sentence is not added again. A collective like `within_split`.
    """
    mu_ML, logvar_ML = train
    parts = len(mu_ML)

    def log_mixture(z_CL: torch.Tensor, own_C: torch.Tensor, index_C: np.ndarray) -> torch.Tensor:
        sum_C = gaussian.log_aggregate(z_CL, mu_ML, logvar_ML) + math.log(parts)
        with_own_C = torch.logaddexp(sum_C, own_C) - math.log(parts + 1)
        if component_N is None:
            return with_own_C
        is_component_C = torch.as_tensor(component_N[index_C], device=z_CL.device)
        return torch.where(is_component_C, sum_C - math.log(parts), with_own_C)

    return _gains(posterior, index_S, ranks, log_mixture, add).clamp(max=math.log(parts + 1))


def _gains(
    posterior: Posterior,
    index_S: np.ndarray,
    ranks: Ranks,
    log_mixture: Callable[[torch.Tensor, torch.Tensor, np.ndarray], torch.Tensor],
    add: Add,
) -> torch.Tensor:
    """log q(z|x) - log_mixture(z) of the sentences `index_S` on all ranks, (S,), in their order. A collective."""
    own = np.arange(ranks.rank, len(index_S), ranks.world)
    parts = [posterior.z_NL.new_empty(0)]
    for start in range(0, len(own), CHUNK):
        index_C = index_S[own[start : start + CHUNK]]
        row_C = torch.as_tensor(index_C, device=posterior.z_NL.device)
        z_CL = posterior.z_NL[row_C]
        own_C = gaussian.log_density(z_CL, posterior.mu_NL[row_C], posterior.logvar_NL[row_C])
        parts.append(own_C - log_mixture(z_CL, own_C, index_C))
        add(len(index_C))
    place_S = gather_rows(torch.as_tensor(own, device=posterior.z_NL.device))
    return gather_rows(torch.cat(parts))[place_S.argsort()]


def encode_all(
    model: T5VAE, tokens: TokenSet, ranks: Ranks, limits: Limits, pad_id: int, add: Add
) -> tuple[torch.Tensor, torch.Tensor]:
    """mu_ML and logvar_ML of all sentences of `tokens`, float64, on every rank, in any order. No decoder pass.

    A collective; all ranks make the same number of forward calls. The result takes 16 M L bytes on each rank.
    """
    parts = []
    for index_B, weight_B in evaluation_batches(tokens.lengths_N, limits, ranks.rank, ranks.world):
        found = collate(
            tokens, index_B, pad_id=pad_id, latent_dim=model.latent_dim, seed=0, keys=(), sample=False, eval=True
        ).to(ranks.device)
        pair = model.encode(found.input_ids_BT, found.attention_mask_BT)
        real_B = torch.as_tensor(np.asarray(weight_B) > 0, device=ranks.device)
        parts.append(torch.stack([part.double()[real_B] for part in pair], dim=1))
        add(len(index_B))
    mu_ML, logvar_ML = gather_rows(torch.cat(parts)).unbind(1)
    return mu_ML, logvar_ML
