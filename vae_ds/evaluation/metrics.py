"""The metrics of docs/metrics.md, over the whole split, by all ranks together.

Shapes: N sentences of the split, M of them in the importance-weighted subset, S of this rank, B in a batch,
K importance samples per sentence, P (sentence, sample) pairs in one forward pass, L latent units, T tokens.
All quantities are in nats. Values per sentence are gathered and summed in float64 in the order of the split. Therefore
they do not depend on the distribution of the sentences over the ranks, except for the rounding of one forward pass.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from vae_ds.config import EvaluationConfig
from vae_ds.data import Limits, Progress, TokenSet, collate, evaluation_batches, logit_tokens
from vae_ds.distributed import Ranks, gather_rows, stream
from vae_ds.errors import DataError
from vae_ds.evaluation import information
from vae_ds.evaluation.estimates import perplexity, with_errors
from vae_ds.evaluation.forecast import Forecast
from vae_ds.evaluation.importance import importance_nll, log_weights
from vae_ds.evaluation.information import Posterior
from vae_ds.evaluation.verdict import cost, verdict
from vae_ds.latents import inference
from vae_ds.model import T5VAE, gaussian

Metrics = dict[str, Any]

WINDOW = 1024  # sentences whose importance weights are in memory at the same time


@dataclass(frozen=True)
class Training:
    """Sentences of the training split, for `mi_train`.

    rows: their indices in the evaluated split, if this is the training split itself, else None.
    """

    tokens: TokenSet
    rows: np.ndarray | None = None


class Evaluation(NamedTuple):
    """The metrics of a split, ready for JSON, and the values of its sentences that they are means of.

    sentences: float64 arrays in nats by name (`vae_ds.runtime.evaluations`). All are (N,), except `iw_nll` (M,).
    """

    metrics: Metrics
    sentences: dict[str, np.ndarray]


def evaluate(
    model: T5VAE,
    tokens: TokenSet,
    ranks: Ranks,
    settings: EvaluationConfig,
    *,
    seed: int,
    pad_id: int,
    yardstick_N: np.ndarray | None = None,
    train: Training | None = None,
    full: bool = True,
    beta: float | None = None,
) -> Evaluation:
    """Compute the metrics of docs/metrics.md, except those of text quality.

    This is a collective operation. The result is a function of (weights, tokens, settings, seed), for any number of
    ranks. Global random generators and the modes of the modules do not change. All ranks make the same number of
    forward calls, as ZeRO 3 requires.

    yardstick_N: the negative log-likelihood of each sentence under a plain language model, in nats, for `lm_gain`,
        `above_yardstick` and `nelbo_above_yardstick`.
    train: training sentences, for `mi_train`.
    full: False skips the importance-weighted likelihood and `mi_train`, the most expensive metrics, during training.
    beta: the current weight of the KL, for the verdict during training. None means a finished model (`verdict`).

    A mean over sentences has its standard error in `<metric>_se`; None for a single sentence. Metrics that do not
    exist for the model, or were not requested, are None. A model with injection `none` has an exact likelihood: its
    `nelbo` is its `rec`, its `iw_samples` is None, and its `iw_nll` and `iw_ppl` are exact. They use the same first
    `iw_sentences` sentences as for another model, so that both can be compared. `unk` is a share of `tokens`,
    `truncated` of `sentences`. A perplexity above the largest float is infinite.
    Raises DataError if there are no sentences.
    """
    if not len(tokens):
        raise DataError("the split has no sentences to evaluate; choose another split")
    plain = model.bottleneck is None
    with inference(model):
        work = _Work(model, tokens, ranks, settings, seed, pad_id, is_shown=full)
        rec_N, posterior = work.own()
        values = {"rec": rec_N}
        if not plain:
            values |= posterior.kl()
            if len(tokens) > 1:
                values["rec_swapped"] = work.swapped(posterior)
        if full:
            count = min(settings.iw_sentences or len(tokens), len(tokens))
            values["iw_nll"] = rec_N[:count] if plain else work.importance_weighted(posterior, count)
        sentences = {name: part.cpu().numpy() for name, part in values.items()}
        metrics = _extent(tokens) | _likelihood(tokens, sentences) | _iw(tokens, sentences, settings)
        metrics |= work.latent(posterior) | work.information(posterior, train if full else None)
        metrics |= _beside_yardstick(sentences, yardstick_N)
    found = verdict(metrics, beta)
    metrics |= {"verdict": found and found.word, "verdict_reason": found and found.reason, "cost": cost(metrics)}
    return Evaluation(metrics, sentences)


def log_likelihoods(
    model: T5VAE,
    tokens: TokenSet,
    ranks: Ranks,
    settings: EvaluationConfig,
    *,
    seed: int,
    pad_id: int,
    first: int = 0,
    is_shown: bool = True,
) -> np.ndarray:
    """The importance-weighted estimate of log p(x) of each sentence, float64 (N,), nats: minus `iw_nll`.

    In expectation it is a lower bound, tighter for more `iw_samples`; without a latent code, it is exact. All sentences
    are used. `first`: number of the first sentence, if `tokens` are a part of more. This is a collective operation.
    """
    with inference(model):
        work = _Work(model, tokens, ranks, settings, seed, pad_id, is_shown, first)
        if model.bottleneck is None:
            return -work.own()[0].cpu().numpy()
        nll_N = work.importance_weighted(work.posterior(), len(tokens))
        if model.prior is not None:
            information.need_finite(nll_N)
        return -nll_N.cpu().numpy()


def derangement(count: int, seed: int) -> np.ndarray:
    """Assign another sentence to each of `count` >= 2 sentences: a uniformly drawn cycle, so each is used once."""
    order_N = stream(seed, "derangement").permutation(count)
    mate_N = np.empty(count, dtype=np.int64)
    mate_N[order_N] = np.roll(order_N, -1)
    return mate_N


class _Work:
    """The forward passes of this rank over its share of the split."""

    def __init__(
        self,
        model: T5VAE,
        tokens: TokenSet,
        ranks: Ranks,
        settings: EvaluationConfig,
        seed: int,
        pad_id: int,
        is_shown: bool,
        first: int = 0,
    ) -> None:
        self.model, self.tokens, self.ranks, self.settings, self.seed = model, tokens, ranks, settings, seed
        self.pad_id, self.is_shown, self.first = pad_id, is_shown, first
        self.limits = Limits(settings.batch, logit_tokens(settings.tokens, model.t5.config.vocab_size))
        self.shares = evaluation_batches(tokens.lengths_N, self.limits, ranks.rank, ranks.world)

    def own(self) -> tuple[torch.Tensor, Posterior]:
        """rec_N with one posterior sample per sentence, and the posteriors (width L = 0 for a plain language model)."""

        def rows(index_B: np.ndarray) -> tuple[torch.Tensor, ...]:
            batch = self._collate(index_B, sample=True)
            if self.model.bottleneck is None:
                nothing_B0 = torch.zeros(len(index_B), 0, device=self.ranks.device)
                return self.model.reconstruction(None, batch.labels_BT), nothing_B0, nothing_B0, nothing_B0
            mu_BL, logvar_BL = (part.double() for part in self.model.encode(*_inputs(batch)))
            z_BL = gaussian.sample(mu_BL, logvar_BL, batch.eps_BL.double())
            log_p = () if self.model.prior is None else (self.model.log_prior(z_BL),)
            return self.model.reconstruction(z_BL.float(), batch.labels_BT), mu_BL, logvar_BL, z_BL, *log_p

        rec_N, *parts_NX = self._over_split(rows, "Encoding and decoding", self._forecast())
        return rec_N, Posterior(*parts_NX)

    def posterior(self) -> Posterior:
        """The posteriors, without a pass of the decoder and without samples: z is the mean."""

        def rows(index_B: np.ndarray) -> tuple[torch.Tensor, ...]:
            return self.model.encode(*_inputs(self._collate(index_B)))

        mu_NL, logvar_NL = self._over_split(rows, "Encoding")
        return Posterior(mu_NL, logvar_NL, mu_NL)

    def swapped(self, posterior: Posterior) -> torch.Tensor:
        """rec_N with the z of another sentence."""
        mate_N = derangement(len(self.tokens), self.seed)

        def rows(index_B: np.ndarray) -> tuple[torch.Tensor, ...]:
            z_BL = posterior.z_NL[torch.as_tensor(mate_N[index_B], device=self.ranks.device)]
            return (self.model.reconstruction(z_BL.float(), self._collate(index_B).labels_BT),)

        (swapped_N,) = self._over_split(rows, "Decoding the z of other sentences")
        return swapped_N

    def latent(self, posterior: Posterior) -> Metrics:
        """KL of each unit and active units, over the whole split."""
        if self.model.bottleneck is None:
            return {"kl_per_dim": None, "au": None}
        kl_L = gaussian.kl_per_dim(posterior.mu_NL, posterior.logvar_NL).mean(dim=0)
        return {"kl_per_dim": kl_L.tolist(), "au": gaussian.active_units(posterior.mu_NL)}

    def information(self, posterior: Posterior, train: Training | None) -> Metrics:
        """The estimates of the mutual information, with their errors and the numbers that they depend on."""
        keys = ("mi", "mi_se", "mi_ceiling", "mi_sentences", "mi_train", "mi_train_se", "mi_train_sentences")
        metrics: Metrics = dict.fromkeys(keys)
        if self.model.bottleneck is None:
            return metrics
        count, ranks = len(self.tokens), self.ranks
        index_S = information.chosen(count, self.settings.mi_sentences, self.seed)
        own = len(index_S[ranks.rank :: ranks.world])
        metrics |= {"mi_ceiling": math.log(count), "mi_sentences": len(index_S)}
        with _progress("Mutual information", own, self.is_shown) as add:
            within_S = information.within_split(posterior, index_S, ranks, add)
        metrics |= with_errors(mi=within_S.cpu().numpy())
        if train is None or not len(train.tokens):
            return metrics
        component_N = None if train.rows is None else np.isin(np.arange(count), train.rows)
        share = -(-len(train.tokens) // ranks.world)
        with _progress("Encoding training sentences", share, self.is_shown) as add:
            pair = information.encode_all(self.model, train.tokens, ranks, self.limits, self.pad_id, add)
        with _progress("Mutual information against them", own, self.is_shown) as add:
            train_S = information.against_training(posterior, index_S, pair, ranks, add, component_N)
        return metrics | with_errors(mi_train=train_S.cpu().numpy()) | {"mi_train_sentences": len(train.tokens)}

    def importance_weighted(self, posterior: Posterior, count: int) -> torch.Tensor:
        """The importance-weighted estimate of -log p(x), nll_M, of the first `count` sentences.

        The (sentence, sample) pairs are processed in order of sentence length, at most `batch` pairs and `tokens`
        tokens per forward pass. Only the weights of one window of sentences are in memory, so memory is bounded for any
        K and M. The noise of a sentence is always drawn completely from its own stream, so it depends neither on the
        order nor on the rank.
        """
        shares = evaluation_batches(self.tokens.lengths_N[:count], Limits(1), self.ranks.rank, self.ranks.world)
        # The longest sentence of all ranks at the same place, so that all ranks make the same number of forward calls.
        longest_S = np.sort(self.tokens.lengths_N[:count])[::-1][:: self.ranks.world]
        index_S = np.concatenate([index_B for index_B, _ in shares])
        weight_S = np.concatenate([np.asarray(weight_B) for _, weight_B in shares])
        pairs = len(index_S) * self.settings.iw_samples
        with _progress("Importance-weighted likelihood", pairs, self.is_shown, "samples") as add:
            cuts = (slice(start, start + WINDOW) for start in range(0, len(index_S), WINDOW))
            parts = [self._window_nll(posterior, index_S[cut], longest_S[cut], add) for cut in cuts]
        return _in_order(index_S, weight_S, torch.cat(parts), count, self.ranks.world)

    def _window_nll(
        self, posterior: Posterior, index_W: np.ndarray, longest_W: np.ndarray, done: Callable[[int], Any]
    ) -> torch.Tensor:
        """nll_W of a window of W sentences, whose lengths are at most `longest_W` and fall."""
        K, device = self.settings.iw_samples, self.ranks.device
        log_weights_F = torch.empty(len(index_W) * K, dtype=torch.float64, device=device)
        start = 0
        while start < len(log_weights_F):
            count = self.limits.count(int(longest_W[start // K]), len(log_weights_F) - start)
            pair_P = np.arange(start, start + count)
            row_P = pair_P // K
            index_R = index_W[row_P[0] : row_P[-1] + 1]
            eps_PL = torch.as_tensor(self._importance_noise(index_R)[row_P - row_P[0], pair_P % K], device=device)
            sentence_P = torch.as_tensor(index_W[row_P], device=device)
            mu_PL, logvar_PL = posterior.mu_NL[sentence_P], posterior.logvar_NL[sentence_P]
            z_PL = gaussian.sample(mu_PL, logvar_PL, eps_PL)
            labels_PT = self._collate(index_R).labels_BT[torch.as_tensor(row_P - row_P[0], device=device)]
            rec_P = self.model.reconstruction(z_PL.float(), labels_PT)
            terms = rec_P, z_PL, mu_PL, logvar_PL, self.model.log_prior(z_PL)
            log_weights_F[start : start + count] = log_weights(*terms)
            done(count)
            start += count
        return importance_nll(log_weights_F.view(len(index_W), K))

    def _importance_noise(self, index_R: np.ndarray) -> np.ndarray:
        shape = self.settings.iw_samples, self.model.latent_dim
        return np.stack([stream(self.seed, "iw", self.first + int(index)).standard_normal(shape) for index in index_R])

    def _collate(self, index_B: np.ndarray, sample: bool = False) -> Any:
        batch = collate(
            self.tokens, index_B, pad_id=self.pad_id, latent_dim=self.model.latent_dim, seed=self.seed, keys=(),
            sample=sample, eval=True, first=self.first,
        )  # fmt: skip
        return batch.to(self.ranks.device)

    def _forecast(self) -> Forecast | None:
        """The work of this rank that `evaluate` will do. None during training, where it is small."""
        if not self.is_shown:
            return None
        own = sum(self._tokens_of(index_B) for index_B, _ in self.shares)
        if self.model.bottleneck is None:
            return Forecast(self.ranks, {"rec": own}, len(self.shares))
        settings, world = self.settings, self.ranks.world
        length_M = self.tokens.lengths_N[: settings.iw_sentences]
        samples = f"iw_nll with {settings.iw_samples:,} samples for each of {len(length_M):,} sentences"
        tasks: dict[str, float] = {"rec and kl": own, "z_gain": own}
        tasks[f"{samples} (--iw-samples, --iw-sentences)"] = settings.iw_samples * float(length_M.sum()) / world
        return Forecast(self.ranks, tasks, len(self.shares))

    def _tokens_of(self, index_B: np.ndarray) -> int:
        return len(index_B) * int(self.tokens.lengths_N[index_B].max())

    def _over_split(
        self, rows: Callable[[np.ndarray], tuple[torch.Tensor, ...]], task: str, forecast: Forecast | None = None
    ) -> list[torch.Tensor]:
        """Apply `rows` to the batches of this rank. Return the rows of all ranks in the order of the split, float64."""
        parts = []
        with _progress(task, sum(len(index_B) for index_B, _ in self.shares), self.is_shown) as add:
            for index_B, _ in self.shares:
                with nullcontext() if forecast is None else forecast.timed(self._tokens_of(index_B)):
                    parts.append(rows(index_B))
                add(len(index_B))
        index_S = np.concatenate([index_B for index_B, _ in self.shares])
        weight_S = np.concatenate([np.asarray(weight_B) for _, weight_B in self.shares])
        columns = [torch.cat(column).double() for column in zip(*parts, strict=True)]
        return [_in_order(index_S, weight_S, column_SX, len(self.tokens), self.ranks.world) for column_SX in columns]


@contextmanager
def _progress(task: str, total: int, is_shown: bool, unit: str = "sentences") -> Iterator[Callable[[int], Any]]:
    """A function that counts finished sentences. A validation shows none of them: its training shows its own."""
    if not is_shown:
        yield lambda count: None
        return
    with Progress(task, total, unit) as shown:
        yield shown.add


def _inputs(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.input_ids_BT, batch.attention_mask_BT


def _in_order(index_S: np.ndarray, weight_S: np.ndarray, rows_SX: torch.Tensor, count: int, world: int) -> torch.Tensor:
    """Rows of all ranks in the order of the split, without fillers (weight 0); float64. A collective operation.

    With a `world` of 1, the rows of this process alone, also if it is one of several ranks.
    """
    real_S = torch.as_tensor(weight_S > 0, device=rows_SX.device)
    index_N, rows_NX = torch.as_tensor(index_S, device=rows_SX.device)[real_S], rows_SX[real_S]
    if world > 1:
        index_N, rows_NX = gather_rows(index_N), gather_rows(rows_NX)
    order_N = index_N.argsort()
    if not torch.equal(index_N[order_N], torch.arange(count, device=index_N.device)):
        raise RuntimeError(f"{len(index_N)} rows for {count} sentences; each sentence must be on exactly one rank")
    return rows_NX[order_N]


def _extent(tokens: TokenSet) -> Metrics:
    """Sizes of the split."""
    subwords = tokens.target_tokens
    return {
        "sentences": len(tokens),
        "tokens": subwords,
        "words": int(np.sum(tokens.words_N)),
        "truncated": float(np.mean(tokens.truncated_N)),
        "unk": float(np.sum(tokens.unknown_N)) / subwords,
    }


def _likelihood(tokens: TokenSet, sentences: Mapping[str, np.ndarray]) -> Metrics:
    """rec, KL and the bound on the likelihood. Without a latent code, the KL is None, not 0."""
    rec_N, kl_N, swapped_N = sentences["rec"], sentences.get("kl"), sentences.get("rec_swapped")
    nelbo_N = rec_N if kl_N is None else rec_N + kl_N
    return (
        with_errors(
            rec=rec_N,
            kl=kl_N,
            **{name: sentences[name] for name in ("kl_normal",) if name in sentences},
            nelbo=nelbo_N,
            paper_nelbo=None if kl_N is None else rec_N - kl_N,
            z_gain=None if swapped_N is None else swapped_N - rec_N,
        )
        | perplexity("ppl", nelbo_N, tokens.words_N)
        | perplexity("ppl_subword", nelbo_N, tokens.target_lengths_N)
    )


def _iw(tokens: TokenSet, sentences: Mapping[str, np.ndarray], settings: EvaluationConfig) -> Metrics:
    """The importance-weighted bound, with the numbers of sentences and samples that it depends on."""
    nll_M = sentences.get("iw_nll")
    count = None if nll_M is None else len(nll_M)
    samples = None if nll_M is None or "kl" not in sentences else settings.iw_samples
    return (
        with_errors(iw_nll=nll_M)
        | perplexity("iw_ppl", nll_M, tokens.words_N[:count])
        | {"iw_sentences": count, "iw_samples": samples}
    )


def _beside_yardstick(sentences: Mapping[str, np.ndarray], yardstick_N: np.ndarray | None) -> Metrics:
    """Differences to a plain language model, paired by sentence. A language model itself has none."""
    if yardstick_N is None or "kl" not in sentences:
        return with_errors(lm_gain=None, above_yardstick=None, nelbo_above_yardstick=None)
    rec_N, iw_M = sentences["rec"], sentences.get("iw_nll")
    return with_errors(
        lm_gain=yardstick_N - rec_N,
        above_yardstick=None if iw_M is None else iw_M - yardstick_N[: len(iw_M)],
        nelbo_above_yardstick=rec_N + sentences["kl"] - yardstick_N,
    )
