"""Metrics of the texts that a model writes: reconstructions against their sources, and samples of the prior.

The texts are made in groups of a fixed size, which are divided among the ranks. A group does not depend on the number
of ranks, so neither does a metric. Each metric states what counts as a word. The ranks make different numbers of
forward calls. Therefore each rank needs the whole model, not one partitioned by ZeRO 3: the ranks run different numbers
of groups, and `generate` only equalises the steps within a call.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from vae_ds import latents
from vae_ds.config import EvaluationConfig
from vae_ds.data import Limits, Progress, TokenSet, collate, evaluation_batches, from_texts, logit_tokens
from vae_ds.distributed import Ranks, broadcast_object, gather_objects, rank0_first, stream
from vae_ds.evaluation.estimates import perplexity, with_errors
from vae_ds.evaluation.mauve import Features, mauve
from vae_ds.evaluation.metrics import Metrics
from vae_ds.model import T5VAE

Value = TypeVar("Value")
Ngrams = Counter[tuple[str, ...]]
LanguageModel = tuple[T5VAE, Any]
"""A model with injection `none`, and its tokenizer."""

GROUP = 16
ORDERS = (1, 2, 3, 4)  # n-gram orders of BLEU
PERPLEXITIES = ("forward_ppl", "forward_ppl_train", "reverse_ppl")
RESAMPLES = 1000  # of the bootstrap of BLEU
NORMAL_95 = 1.96  # half of the width of a 95 % interval, in standard errors


def text_metrics(
    model: T5VAE,
    tokenizer: Any,
    tokens: TokenSet,
    ranks: Ranks,
    settings: EvaluationConfig,
    *,
    seed: int,
    max_tokens: int,
    yardstick: LanguageModel | None = None,
    train: TokenSet | None = None,
    features: Features | None = None,
) -> Metrics:
    """Compute these metrics on `tokens`, a split tokenised with `tokenizer`, as plain numbers ready for JSON.

    - `bleu`: corpus BLEU of sacrebleu, 0 to 100, of greedy reconstructions from the posterior mean. The references are
      the first `bleu_sentences` sentences, cut to `max_tokens`. `bleu_signature` records how it was computed.
    - Of `samples` texts of the model, from codes of the prior, tokens drawn at `sample_temperature` (None: greedy):
      `self_bleu`: mean sentence BLEU of each text against all others, 0 to 100; high if the texts are alike.
      `distinct_1` to `distinct_4`: share of different n-grams among all n-grams, in the words of BLEU (13a).
      `forward_ppl`: perplexity per word of the texts under the yardstick, with its tokenizer; None without yardstick.
      `forward_ppl_train`: the same of as many texts from codes of sentences of `train`, drawn from their posteriors.
      `reverse_ppl`: perplexity per word of all of `tokens` under a trigram model of the texts (`Trigram`).
      `mauve`: of the texts against sentences of `tokens`, by `features` (`vae_ds.evaluation.mauve`); `mauve_train`:
      of sentences of `train`. None without features.
      These metrics depend on the number of samples, which is in the result: compare only equal numbers.

    `<metric>_se` is the standard error of `bleu` (bootstrap over the sentences), `self_bleu` and the perplexities. It
    covers the sentences or samples of this evaluation. That of `reverse_ppl` holds for the given samples.

    If not stated otherwise, words are those of `ppl`: whitespace words and one for the end of a sentence that has one.
    A sample that reached `max_tokens` has no end, neither for the trigram model nor for the yardstick; its last word is
    counted, although it may be incomplete. Metrics that are turned off, or do not exist for the model, are None. This
    is a collective operation.
    """
    found: Metrics = dict.fromkeys(("bleu", "bleu_se", "bleu_sentences", "bleu_signature"))
    found |= dict.fromkeys(("samples", "sample_temperature", *(f"distinct_{n}" for n in ORDERS)))
    found |= {key: None for name in ("self_bleu", *PERPLEXITIES) for key in (name, f"{name}_se")}
    found |= dict.fromkeys(("mauve", "mauve_sd", "mauve_train", "mauve_train_sd", "mauve_texts", "mauve_features"))
    sentences = min(settings.bleu_sentences or 0, len(tokens))
    if sentences and model.bottleneck is not None:
        kept = [_kept(tokens, tokenizer, index) for index in range(sentences)]
        found |= bleu(_reconstructions(model, tokenizer, kept, ranks, max_tokens), kept)
    if settings.samples:
        samples = _samples(model, tokenizer, settings, ranks, seed, max_tokens)
        texts, complete = [made.text for made in samples], [made.is_complete for made in samples]
        grams = [ngrams(text) for text in texts]
        found |= {"samples": len(texts), "sample_temperature": settings.sample_temperature}
        found |= {f"distinct_{n}": distinct(grams, n) for n in ORDERS}
        found |= self_bleu(grams, ranks)
        if features is not None:
            found |= _mauve(texts, tokens, train, tokenizer, features, ranks, seed) | {"mauve_features": settings.mauve}
        found |= _reverse(from_texts(texts, tokenizer, max_tokens, complete), tokens, len(tokenizer), ranks)
        if yardstick is not None:
            found |= _forward("forward_ppl", samples, yardstick, ranks, settings, max_tokens)
        if yardstick is not None and train is not None and model.bottleneck is not None:
            samples = _samples(model, tokenizer, settings, ranks, seed, max_tokens, train)
            found |= _forward("forward_ppl_train", samples, yardstick, ranks, settings, max_tokens)
    return found


class Trigram:
    """A trigram model over token ids with Witten-Bell interpolation (1991), down to a uniform distribution.

    p(w | h) = (c(h w) + t(h) p(w | h')) / (c(h) + t(h)), where c is the count, t(h) the number of different successors
    of h, and h' is h without its oldest token. The recursion ends with the uniform distribution over the whole
    vocabulary. It gives a probability to tokens that no sample contains, so models of different samples are comparable.
    """

    def __init__(self, sentences: Iterable[Sequence[int]], vocabulary: int) -> None:
        """`sentences` are ids below `vocabulary`, each with its end-of-sentence token if it has one."""
        self.vocabulary = vocabulary
        self._after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ids in sentences:
            for history, token in _histories(ids):
                for start in range(3):
                    self._after[history[start:]][token] += 1
        self._totals = {history: counts.total() for history, counts in self._after.items()}

    def probability(self, token: int, history: tuple[int, ...]) -> float:
        """Probability of `token` after up to two ids; -1 means before the sentence. Sums to 1 over the vocabulary."""
        value = 1.0 / self.vocabulary
        for start in range(len(history), -1, -1):
            counts = self._after.get(history[start:])
            if counts is not None:
                kinds = len(counts)
                value = (counts.get(token, 0) + kinds * value) / (self._totals[history[start:]] + kinds)
        return value

    def nll(self, ids: Sequence[int]) -> float:
        """-log p of one sentence, nats."""
        return -sum(math.log(self.probability(token, history)) for history, token in _histories(ids))


def _histories(ids: Sequence[int]) -> Iterable[tuple[tuple[int, int], int]]:
    padded = [-1, -1, *map(int, ids)]
    return (((padded[at - 2], padded[at - 1]), padded[at]) for at in range(2, len(padded)))


def distinct(grams: Sequence[Ngrams], order: int) -> float | None:
    """Share of different n-grams of one order among all in the texts (Li et al. 2016); None if there are no n-grams."""
    total: Ngrams = Counter()
    for counts in grams:
        total.update({gram: count for gram, count in counts.items() if len(gram) == order})
    return len(total) / total.total() if total else None


def self_bleu(grams: Sequence[Ngrams], ranks: Ranks) -> Metrics:
    """`self_bleu`: mean BLEU of each text against all others (Zhu et al. 2018), 0 to 100, with its standard error.

    None for fewer than two texts. The error treats the values of the texts as independent. Each value equals
    `sacrebleu.sentence_bleu(text, others)`, but the n-grams are counted once per text instead of once per pair. This is
    a collective operation.
    """
    from sacrebleu.metrics.bleu import BLEU

    if len(grams) < 2:
        return {"self_bleu": None, "self_bleu_se": None}
    sizes = [sum(count for gram, count in counts.items() if len(gram) == 1) for counts in grams]
    # The largest count in a reference clips a match. Keep the two largest, to be able to exclude the text itself.
    largest: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for row, counts in enumerate(grams):
        for gram, count in counts.items():
            most, holder, second = largest.get(gram, (0, -1, 0))
            largest[gram] = (count, row, most) if count > most else (most, holder, max(second, count))

    def score(row: int) -> float:
        correct, total = [0] * len(ORDERS), [0] * len(ORDERS)
        for gram, count in grams[row].items():
            most, holder, second = largest[gram]
            correct[len(gram) - 1] += min(count, second if holder == row else most)
            total[len(gram) - 1] += count
        others = (size for other, size in enumerate(sizes) if other != row)
        closest = min(others, key=lambda size: (abs(size - sizes[row]), size))
        return float(BLEU.compute_bleu(correct, total, sizes[row], closest, "exp", effective_order=True).score)

    scores = _in_groups(len(grams), ranks, lambda rows: [score(row) for row in rows], "Self-BLEU")
    return with_errors(self_bleu=np.array(scores))


def diversity(texts: Sequence[str]) -> Metrics:
    """`distinct_1` to `distinct_4` and `self_bleu` of texts, as in `text_metrics`, on one process."""
    grams = [ngrams(text) for text in texts]
    alone = Ranks(0, 0, 1, torch.device("cpu"))
    return {f"distinct_{n}": distinct(grams, n) for n in ORDERS} | self_bleu(grams, alone)


def ngrams(text: str) -> Ngrams:
    """The n-grams of a text up to the order of BLEU, in the words of sacrebleu (13a)."""
    from sacrebleu.metrics.helpers import extract_all_word_ngrams
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    counts, _ = extract_all_word_ngrams(Tokenizer13a()(text.rstrip()), min(ORDERS), max(ORDERS))
    return Counter(counts)


def _kept(tokens: TokenSet, tokenizer: Any, index: int) -> str:
    """The text of a sentence, or of its kept tokens if it was cut."""
    if not tokens.truncated_N[index]:
        return tokens.text(index)
    return str(tokenizer.decode(tokens[index], skip_special_tokens=True))


def _reconstructions(model: T5VAE, tokenizer: Any, texts: Sequence[str], ranks: Ranks, max_tokens: int) -> list[str]:
    # A reference has at most `max_tokens` - 1 tokens besides its end, and the decoder does not learn to end a cut one.
    how: dict[str, Any] = {"max_tokens": max_tokens, "max_new_tokens": max_tokens - 1}

    def work(rows: range) -> list[str]:
        return latents.reconstruct(model, tokenizer, [texts[row] for row in rows], **how)

    return _in_groups(len(texts), ranks, work, "Reconstructing")


def bleu(made: Sequence[str], sources: Sequence[str]) -> Metrics:
    """`bleu`: corpus BLEU of sacrebleu, 0 to 100, with the standard error of a bootstrap, its number and signature."""
    from sacrebleu.metrics.bleu import BLEU

    # `force` suppresses the warning about tokenised text; some corpora are already tokenised.
    metric = BLEU(force=True)
    found = metric.corpus_score(list(made), [list(sources)], n_bootstrap=RESAMPLES if len(made) > 1 else 1)
    # sacrebleu gives half of the width of the 95 % interval, only in this attribute and in its printed form.
    half = float(found._ci)
    return {
        "bleu": float(found.score),
        "bleu_se": half / NORMAL_95 if half >= 0 else None,
        "bleu_sentences": len(made),
        "bleu_signature": str(metric.get_signature()),
    }


def _samples(
    model: T5VAE,
    tokenizer: Any,
    settings: EvaluationConfig,
    ranks: Ranks,
    seed: int,
    max_tokens: int,
    train: TokenSet | None = None,
) -> list[latents.Written]:
    """Texts from codes of the prior or, with `train`, from a sample of the posterior of random sentences of it."""
    count = settings.samples or 0
    how = {"max_new_tokens": max_tokens, "temperature": settings.sample_temperature}
    index_N = np.empty(0, dtype=np.int64)
    if train is not None:
        index_N = stream(seed, "text-metrics", "train").choice(len(train), count, replace=count > len(train))

    def work(rows: range) -> list[latents.Written]:
        own = int(stream(seed, "text-metrics", rows.start).integers(2**31))
        if train is None:
            return latents.sample_with_ends(model, tokenizer, len(rows), own, **how)
        kept = [_kept(train, tokenizer, int(index)) for index in index_N[rows.start : rows.stop]]
        z_NL = latents.encode(model, tokenizer, kept, sampled=True, seed=own, max_tokens=max_tokens)
        return latents.decode_with_ends(model, tokenizer, z_NL, seed=own, **how)

    return _in_groups(count, ranks, work, "Sampling")


def _mauve(
    texts: Sequence[str],
    tokens: TokenSet,
    train: TokenSet | None,
    tokenizer: Any,
    features: Features,
    ranks: Ranks,
    seed: int,
) -> Metrics:
    """MAUVE by rank 0, which the other ranks wait for. The sentences of the corpus are random ones, equally many."""

    def drawn(kind: str, split: TokenSet) -> list[str]:
        index_N = stream(seed, "mauve", kind).permutation(len(split))[: len(texts)]
        return [_kept(split, tokenizer, int(index)) for index in index_N]

    def work() -> Metrics:
        if not ranks.is_main:
            return {}
        return mauve(texts, drawn("split", tokens), None if train is None else drawn("train", train), features)

    return broadcast_object(rank0_first(work))


def _forward(
    name: str,
    samples: Sequence[latents.Written],
    yardstick: LanguageModel,
    ranks: Ranks,
    settings: EvaluationConfig,
    max_tokens: int,
) -> Metrics:
    model, tokenizer = yardstick
    texts, complete = zip(*samples, strict=True)
    tokens = from_texts(texts, tokenizer, max_tokens, complete)

    limits = Limits(GROUP, logit_tokens(settings.tokens, model.t5.config.vocab_size))

    def work(rows: range) -> list[float]:
        nll_B = np.empty(len(rows))
        with latents.inference(model):
            for index_B, _ in evaluation_batches(tokens.lengths_N[rows.start : rows.stop], limits, 0, 1):
                batch = collate(
                    tokens, rows.start + index_B, pad_id=tokenizer.pad_token_id, latent_dim=0, seed=0, keys=(),
                    eval=True,
                ).to(ranks.device)  # fmt: skip
                nll_B[index_B] = model.reconstruction(None, batch.labels_BT).cpu()
        return [float(nll) for nll in nll_B]

    nll = _in_groups(len(texts), ranks, work, "Perplexity under the yardstick")
    return perplexity(name, np.array(nll), tokens.words_N)


def _reverse(samples: TokenSet, tokens: TokenSet, vocabulary: int, ranks: Ranks) -> Metrics:
    model = Trigram((samples.target(row).tolist() for row in range(len(samples))), vocabulary)
    nll = _in_groups(
        len(tokens),
        ranks,
        lambda rows: [model.nll(tokens.target(row).tolist()) for row in rows],
        "Perplexity under a trigram model",
    )
    return perplexity("reverse_ppl", np.array(nll), tokens.words_N)


def _in_groups(count: int, ranks: Ranks, work: Callable[[range], list[Value]], task: str) -> list[Value]:
    """Apply `work` to the rows 0 to `count` in groups of GROUP, divided among the ranks. Return all values in order.

    Shows the progress of `task`.
    """
    groups = [range(start, min(start + GROUP, count)) for start in range(0, count, GROUP)]
    own = groups[ranks.rank :: ranks.world]
    made = []
    with Progress(task, sum(map(len, own)), "texts") as shown:
        for rows in own:
            made.append(work(rows))
            shown.add(len(rows))
    gathered = gather_objects(made)
    return [value for number in range(len(groups)) for value in gathered[number % ranks.world][number // ranks.world]]
