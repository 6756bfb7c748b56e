"""The metrics of the README: over the whole split, all ranks together.

Shapes: N sentences of the split, M of them in the importance-weighted subset, S of this rank, B in a batch,
K importance samples a sentence, P (sentence, sample) pairs in one forward pass, L latent units, T tokens.
Everything is in nats. Numbers a sentence are gathered and summed in float64 in the order of the split, so that
they do not depend on how sentences were shared among ranks, beyond the rounding of one forward pass.
"""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from vae_ds.config import EvaluationConfig
from vae_ds.data import TokenSet, collate, evaluation_batches
from vae_ds.distributed import Ranks, all_sum, gather_rows, stream
from vae_ds.errors import DataError
from vae_ds.evaluation.verdict import verdict
from vae_ds.latents import inference
from vae_ds.model import T5VAE, gaussian

Metrics = dict[str, Any]

WINDOW = 1024  # sentences whose importance weights are held at a time


class Posterior(NamedTuple):
    """What the encoder says of each sentence of the split, in its order; z is the one sample of each, in float64."""

    mu_NL: torch.Tensor
    logvar_NL: torch.Tensor
    z_NL: torch.Tensor


def evaluate(
    model: T5VAE,
    tokens: TokenSet,
    ranks: Ranks,
    settings: EvaluationConfig,
    *,
    seed: int,
    pad_id: int,
    yardstick: float | None = None,
    full: bool = True,
    beta: float | None = None,
) -> Metrics:
    """Every metric of the README on `tokens`, as plain numbers ready for JSON. A collective.

    A function of (weights, tokens, settings, seed), on any number of ranks; touches no global random generator and
    leaves each module in the mode that it had. All ranks make the same number of forward calls, as ZeRO 3 needs.

    yardstick: `rec` of an injection-`none` run on the same split; with it there is a `lm_gain`.
    full: False leaves out the importance-weighted likelihood, by far the most costly, for use during training.
    beta: the weight of the KL now, for a verdict during training; None judges a finished model (`verdict`).

    What a model does not have, or what was not asked for, is None. A model with injection `none` has an exact
    likelihood: its `nelbo` is its `rec`, and its `iw_nll` and `iw_ppl` are exact on the same first `iw_sentences`
    sentences as another model's (with `iw_samples` None), so that the two can be compared. `unk` and `truncated`
    are shares of `tokens` and of `sentences`. A perplexity past the largest float is infinite.
    Raises DataError if there are no sentences.
    """
    if not len(tokens):
        raise DataError("the split has no sentences to evaluate")
    plain = model.bottleneck is None
    with inference(model):
        work = _Work(model, tokens, ranks, settings, seed, pad_id)
        rec_N, posterior = work.own()
        metrics = _likelihood(tokens, rec_N, posterior)
        metrics |= _latent(posterior, ranks) if not plain else dict.fromkeys(("mi", "mi_ceiling", "au"))
        metrics["z_gain"] = None if plain or len(tokens) < 2 else work.z_gain(rec_N, posterior)
        metrics["lm_gain"] = None if plain or yardstick is None else yardstick - metrics["rec"]
        metrics |= dict.fromkeys(("iw_nll", "iw_ppl", "iw_sentences", "iw_samples"))
        if full:
            count = min(settings.iw_sentences or len(tokens), len(tokens))
            nll_M = rec_N[:count] if plain else work.importance_weighted(posterior, count)
            metrics["iw_nll"] = float(nll_M.mean())
            metrics["iw_ppl"] = perplexity(nll_M, tokens.words_N[:count])
            metrics["iw_sentences"] = count
            metrics["iw_samples"] = None if plain else settings.iw_samples
    found = verdict(metrics, beta)
    metrics |= {"verdict": found and found.word, "verdict_reason": found and found.reason}
    return metrics


def log_weights(rec_P: torch.Tensor, z_PL: torch.Tensor, mu_PL: torch.Tensor, logvar_PL: torch.Tensor) -> torch.Tensor:
    """log p(x|z) p(z) / q(z|x) of one sample each, float64, from rec = -log p(x|z) in nats (Burda et al. 2016)."""
    z, mu, logvar = z_PL.double(), mu_PL.double(), logvar_PL.double()
    return gaussian.log_prior(z) - gaussian.log_density(z, mu, logvar) - rec_P.double()


def importance_nll(log_weights_SK: torch.Tensor) -> torch.Tensor:
    """-log 1/K sum_k w_k for each sentence, nats: an upper bound on -log p(x) in expectation, tight as K grows."""
    return math.log(log_weights_SK.shape[1]) - torch.logsumexp(log_weights_SK, dim=1)


def derangement(count: int, seed: int) -> np.ndarray:
    """For each of `count` >= 2 sentences another one, each one used once: a uniformly drawn single cycle."""
    order_N = stream(seed, "derangement").permutation(count)
    mate_N = np.empty(count, dtype=np.int64)
    mate_N[order_N] = np.roll(order_N, -1)
    return mate_N


class _Work:
    """The forward passes over one split: what they share is this rank's part of it."""

    def __init__(
        self, model: T5VAE, tokens: TokenSet, ranks: Ranks, settings: EvaluationConfig, seed: int, pad_id: int
    ) -> None:
        self.model, self.tokens, self.ranks, self.settings, self.seed = model, tokens, ranks, settings, seed
        self.pad_id = pad_id
        self.shares = evaluation_batches(tokens.lengths_N, settings.batch, ranks.rank, ranks.world)

    def own(self) -> tuple[torch.Tensor, Posterior]:
        """rec_N, and the posteriors and samples (of width L = 0 for a model without a latent): one sample each."""

        def rows(index_B: np.ndarray) -> tuple[torch.Tensor, ...]:
            batch = self._collate(index_B, sample=True)
            if self.model.bottleneck is None:
                nothing_B0 = torch.zeros(len(index_B), 0, dtype=torch.float64, device=self.ranks.device)
                return self.model.reconstruction(None, batch.labels_BT), nothing_B0, nothing_B0, nothing_B0
            mu_BL, logvar_BL = (part.double() for part in self.model.encode(*_inputs(batch)))
            z_BL = gaussian.sample(mu_BL, logvar_BL, batch.eps_BL.double())
            return self.model.reconstruction(z_BL.float(), batch.labels_BT), mu_BL, logvar_BL, z_BL

        rec_N, mu_NL, logvar_NL, z_NL = self._over_split(rows)
        return rec_N, Posterior(mu_NL, logvar_NL, z_NL)

    def z_gain(self, rec_N: torch.Tensor, posterior: Posterior) -> float:
        """Mean rec with another sentence's z, minus mean rec with a sentence's own."""
        mate_N = derangement(len(self.tokens), self.seed)

        def rows(index_B: np.ndarray) -> tuple[torch.Tensor, ...]:
            z_BL = posterior.z_NL[torch.as_tensor(mate_N[index_B], device=self.ranks.device)]
            return (self.model.reconstruction(z_BL.float(), self._collate(index_B).labels_BT),)

        (swapped_N,) = self._over_split(rows)
        return float(swapped_N.mean() - rec_N.mean())

    def importance_weighted(self, posterior: Posterior, count: int) -> torch.Tensor:
        """The importance-weighted estimate of -log p(x), nll_M, of the first `count` sentences.

        The pairs of sentences and samples are walked in order of sentence length, `batch` pairs a forward pass, and
        the weights of a window of sentences are held at a time: memory is bounded whatever K and M are. A sentence's
        noise is drawn from its own stream, whole: neither the walk nor the rank can change it.
        """
        shares = evaluation_batches(self.tokens.lengths_N[:count], 1, self.ranks.rank, self.ranks.world)
        index_S = np.concatenate([index_B for index_B, _ in shares])
        weight_S = np.concatenate([np.asarray(weight_B) for _, weight_B in shares])
        pairs = len(index_S) * self.settings.iw_samples
        quiet = None if self.ranks.is_main else True  # None: shown only where there is a terminal
        with tqdm(total=pairs, desc="likelihood", disable=quiet, leave=False) as bar:
            starts = range(0, len(index_S), WINDOW)
            parts = [self._window_nll(posterior, index_S[start : start + WINDOW], bar.update) for start in starts]
        return _in_order(index_S, weight_S, torch.cat(parts), count)

    def _window_nll(self, posterior: Posterior, index_W: np.ndarray, done: Callable[[int], Any]) -> torch.Tensor:
        """nll_W of a window of W sentences."""
        K, device = self.settings.iw_samples, self.ranks.device
        log_weights_F = torch.empty(len(index_W) * K, dtype=torch.float64, device=device)
        for start in range(0, len(log_weights_F), self.settings.batch):
            pair_P = np.arange(start, min(start + self.settings.batch, len(log_weights_F)))
            row_P = pair_P // K
            index_R = index_W[row_P[0] : row_P[-1] + 1]
            eps_PL = torch.as_tensor(self._importance_noise(index_R)[row_P - row_P[0], pair_P % K], device=device)
            sentence_P = torch.as_tensor(index_W[row_P], device=device)
            mu_PL, logvar_PL = posterior.mu_NL[sentence_P], posterior.logvar_NL[sentence_P]
            z_PL = gaussian.sample(mu_PL, logvar_PL, eps_PL)
            labels_PT = self._collate(index_R).labels_BT[torch.as_tensor(row_P - row_P[0], device=device)]
            rec_P = self.model.reconstruction(z_PL.float(), labels_PT)
            log_weights_F[start : start + len(pair_P)] = log_weights(rec_P, z_PL, mu_PL, logvar_PL)
            done(len(pair_P))
        return importance_nll(log_weights_F.view(len(index_W), K))

    def _importance_noise(self, index_R: np.ndarray) -> np.ndarray:
        shape = self.settings.iw_samples, self.model.latent_dim
        return np.stack([stream(self.seed, "iw", int(index)).standard_normal(shape) for index in index_R])

    def _collate(self, index_B: np.ndarray, sample: bool = False) -> Any:
        batch = collate(
            self.tokens, index_B, pad_id=self.pad_id, latent_dim=self.model.latent_dim, seed=self.seed, keys=(),
            sample=sample, eval=True,
        )  # fmt: skip
        return batch.to(self.ranks.device)

    def _over_split(self, rows: Callable[[np.ndarray], tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        """`rows` of a batch's sentences, over this rank's batches; of all ranks, float64, in the split's order."""
        parts = [rows(index_B) for index_B, _ in self.shares]
        index_S = np.concatenate([index_B for index_B, _ in self.shares])
        weight_S = np.concatenate([np.asarray(weight_B) for _, weight_B in self.shares])
        columns = [torch.cat(column).double() for column in zip(*parts, strict=True)]
        return [_in_order(index_S, weight_S, column_SX, len(self.tokens)) for column_SX in columns]


def _inputs(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.input_ids_BT, batch.attention_mask_BT


def _in_order(index_S: np.ndarray, weight_S: np.ndarray, rows_SX: torch.Tensor, count: int) -> torch.Tensor:
    """Rows of all ranks in the split's order, fillers (weight 0) left out; float64. A collective."""
    real_S = torch.as_tensor(weight_S > 0, device=rows_SX.device)
    index_N = gather_rows(torch.as_tensor(index_S, device=rows_SX.device)[real_S])
    rows_NX = gather_rows(rows_SX[real_S])
    order_N = index_N.argsort()
    if not torch.equal(index_N[order_N], torch.arange(count, device=index_N.device)):
        raise RuntimeError(f"{len(index_N)} rows for {count} sentences: each belongs to exactly one rank")
    return rows_NX[order_N]


def _likelihood(tokens: TokenSet, rec_N: torch.Tensor, posterior: Posterior) -> Metrics:
    """Sizes of the split, and the bound on its likelihood. A model without a latent has no KL: null, not 0."""
    has_latent = posterior.mu_NL.shape[1] > 0
    kl_NL = gaussian.kl_per_dim(posterior.mu_NL, posterior.logvar_NL)
    nelbo_N = rec_N + kl_NL.sum(dim=1)
    rec, kl = float(rec_N.mean()), float(kl_NL.sum(dim=1).mean())
    subwords = int(np.sum(tokens.lengths_N))
    return {
        "sentences": len(tokens),
        "tokens": subwords,
        "words": int(np.sum(tokens.words_N)),
        "truncated": float(np.mean(tokens.truncated_N)),
        "unk": float(np.sum(tokens.unknown_N)) / subwords,
        "rec": rec,
        "kl": kl if has_latent else None,
        "nelbo": float(nelbo_N.mean()),
        "paper_nelbo": rec - kl if has_latent else None,
        "ppl": perplexity(nelbo_N, tokens.words_N),
        "ppl_subword": perplexity(nelbo_N, tokens.lengths_N),
        "kl_per_dim": kl_NL.mean(dim=0).tolist() if has_latent else None,
    }


def _latent(posterior: Posterior, ranks: Ranks) -> Metrics:
    """Mutual information, its ceiling, active units. Each rank takes every world-th sentence against all of them."""
    mine = slice(ranks.rank, None, ranks.world)
    mu, logvar, z = (part.double() for part in posterior)
    joint_n = gaussian.log_density(z[mine], mu[mine], logvar[mine])
    marginal_n = gaussian.log_aggregate(z[mine], mu, logvar)
    ceiling = math.log(len(mu))
    # No term passes the ceiling but by rounding, as in `gaussian.mutual_information`, which is not shared over ranks.
    information = all_sum((joint_n - marginal_n).clamp(max=ceiling).sum())
    return {
        "mi": float(information) / len(mu),
        "mi_ceiling": ceiling,
        "au": int(gaussian.active_units(mu)),
    }


def perplexity(nll_N: torch.Tensor, units_N: np.ndarray) -> float:
    """exp(total nats / total units), of N sentences; infinite where a float cannot hold it."""
    nats_a_unit = float(nll_N.sum()) / float(np.sum(units_N))
    return math.exp(nats_a_unit) if nats_a_unit < math.log(sys.float_info.max) else math.inf
