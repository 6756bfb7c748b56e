"""The metrics against closed forms and a plain loop, the same on one process and on two."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

from support import ROOT, tiny
from support.launch import launch
from vae_ds import distributed
from vae_ds.config.settings import EvaluationConfig, ModelConfig, OptimizerConfig
from vae_ds.data import progress
from vae_ds.data.batches import collate, from_texts
from vae_ds.errors import DataError
from vae_ds.evaluation import forecast
from vae_ds.evaluation import metrics as evaluation
from vae_ds.evaluation.metrics import Training, derangement, evaluate, importance_nll, log_weights
from vae_ds.evaluation.verdict import cost, verdict
from vae_ds.model import gaussian
from vae_ds.model.t5vae import T5VAE, load_tokenizer
from vae_ds.studies.metric_tables import print_metrics

ALONE = distributed.Ranks(0, 0, 1, torch.device("cpu"))
SEED = 3
LATENT = 6
# 17 sentences in batches of 4: two ranks need a filler, for the last batch and for the last sentence's samples.
# Words and subwords differ in number among the first sentences, those of the importance-weighted metrics, too.
TEXTS = [*tiny.ENGLISH[:2], "a ~ sentence with unknown % signs", *tiny.ENGLISH[2:15], tiny.ENGLISH[0]]
SETTINGS = EvaluationConfig(iw_samples=7, iw_sentences=5, batch=4)
KEYS = {
    *("sentences", "tokens", "words", "truncated", "unk", "rec", "kl", "nelbo", "paper_nelbo", "ppl", "ppl_subword"),
    *("kl_per_dim", "mi", "mi_ceiling", "au", "z_gain", "lm_gain", "iw_nll", "iw_ppl", "iw_sentences", "iw_samples"),
    *("mi_sentences", "mi_train", "mi_train_sentences", "above_yardstick", "nelbo_above_yardstick"),
    *("verdict", "verdict_reason", "cost"),
}
MEANS = {"rec", "kl", "nelbo", "paper_nelbo", "ppl", "ppl_subword", "mi", "mi_train", "z_gain", "iw_nll", "iw_ppl"}
BESIDE = {"lm_gain", "above_yardstick", "nelbo_above_yardstick"}
KEYS |= {f"{key}_se" for key in MEANS | BESIDE}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.make_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def tokens(base):
    return from_texts(TEXTS, load_tokenizer(base), 24)


def build(base, **settings):
    """A random model whose posteriors are neither the prior nor all the same."""
    model = T5VAE.from_base(ModelConfig(base=base, latent_dim=LATENT, mu_std=0.6, logvar_std=0.3, **settings))
    with torch.no_grad():  # max pooling leaves a mean that all sentences share: half of the units say little
        if model.bottleneck is not None:
            model.bottleneck.mu.weight[: LATENT // 2] *= 0.02
    return model


def measure(model, tokens, settings=SETTINGS, **options):
    return evaluate(model, tokens, ALONE, settings, seed=SEED, pad_id=0, **options).metrics


def yardstick_of(tokens):
    """Nats of each sentence under a language model that does not exist."""
    return 90.0 + np.arange(len(tokens)) ** 1.5


# The estimators


class LinearGaussian:
    """x | z ~ N(W z, s^2 I), z ~ N(0, I): p(x) is known, and with orthogonal columns so is a diagonal posterior."""

    def __init__(self, sentences: int) -> None:
        generator = torch.Generator().manual_seed(0)
        orthogonal = torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64))[0]
        self.w_XL = orthogonal * torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
        self.s = 0.7
        marginal = MultivariateNormal(
            torch.zeros(7, dtype=torch.float64), self.w_XL @ self.w_XL.T + self.s**2 * torch.eye(7, dtype=torch.float64)
        )
        z_SL = torch.randn(sentences, 3, generator=generator, dtype=torch.float64)
        self.x_SX = z_SL @ self.w_XL.T + self.s * torch.randn(sentences, 7, generator=generator, dtype=torch.float64)
        self.nll_S = -marginal.log_prob(self.x_SX)
        precision_L = 1 + (self.w_XL**2).sum(0) / self.s**2
        self.mu_SL = self.x_SX @ self.w_XL / self.s**2 / precision_L
        self.logvar_SL = -precision_L.log().expand_as(self.mu_SL)

    def estimate(self, mu_SL, logvar_SL, samples, seed=0):
        generator = torch.Generator().manual_seed(seed)
        eps_SKL = torch.randn(len(mu_SL), samples, 3, generator=generator, dtype=torch.float64)
        z_SKL = mu_SL[:, None] + torch.exp(logvar_SL / 2)[:, None] * eps_SKL
        rec_SK = -Independent(Normal(z_SKL @ self.w_XL.T, self.s), 1).log_prob(self.x_SX[:, None])
        log_p_SK = Independent(Normal(torch.zeros_like(z_SKL), 1.0), 1).log_prob(z_SKL)
        return importance_nll(log_weights(rec_SK, z_SKL, mu_SL[:, None], logvar_SL[:, None], log_p_SK))


@pytest.mark.parametrize("samples", [1, 2, 50])
def test_the_exact_posterior_gives_the_exact_likelihood_for_any_k(samples):
    world = LinearGaussian(20)
    for seed in range(3):
        estimate = world.estimate(world.mu_SL, world.logvar_SL, samples, seed)
        torch.testing.assert_close(estimate, world.nll_S, rtol=1e-10, atol=1e-10)


def test_a_wrong_posterior_gives_a_bound_that_tightens_with_k():
    world = LinearGaussian(200)
    mu_SL, logvar_SL = world.mu_SL + 0.3, world.logvar_SL + 0.5
    gaps = [float((world.estimate(mu_SL, logvar_SL, k) - world.nll_S).mean()) for k in (1, 5, 50)]
    assert gaps[0] > 2 * gaps[1] > 0
    assert abs(gaps[2]) < gaps[1] / 4
    # With one sample the bound is the negative ELBO, whose gap is the divergence to the true posterior.
    q, p = Normal(mu_SL, torch.exp(logvar_SL / 2)), Normal(world.mu_SL, torch.exp(world.logvar_SL / 2))
    divergence = torch.distributions.kl_divergence(q, p).sum(1).mean()
    many = torch.stack([world.estimate(mu_SL, logvar_SL, 1, seed) for seed in range(50)]).mean()
    assert float(many - world.nll_S.mean()) == pytest.approx(float(divergence), rel=0.05)
    torch.testing.assert_close(world.estimate(mu_SL, logvar_SL, 2_000), world.nll_S, rtol=0, atol=0.15)


def test_the_estimator_survives_likelihoods_of_long_sentences():
    log_weights_SK = torch.tensor([[-5000.0, -5000.0], [-5000.0, -6000.0]], dtype=torch.float64)
    expected = torch.tensor([5000.0, 5000.0 + math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(importance_nll(log_weights_SK), expected)


class Solvable(nn.Module):
    """The linear Gaussian in a model's place: sentence i of a token set is x_i, its posterior off by a shift."""

    def __init__(self, world, tokens, shift):
        super().__init__()
        self.world, self.shift = world, shift
        self.bottleneck, self.latent_dim = nn.Identity(), 3
        self.prior, self.log_prior = None, gaussian.log_prior
        self.t5 = SimpleNamespace(config=SimpleNamespace(vocab_size=100))
        self.row_of = {tuple(tokens[i]): i for i in range(len(tokens))}
        self.pairs = []

    def encode(self, ids_BT, mask_BT):
        rows = [self.row_of[tuple(ids_T[mask_T > 0].tolist())] for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]
        return self.world.mu_SL[rows] + self.shift, self.world.logvar_SL[rows] + self.shift

    def reconstruction(self, z_BL, labels_BT):
        self.pairs.append(len(labels_BT))
        x_BX = self.world.x_SX[[self.row_of[tuple(labels_T[labels_T >= 0].tolist())] for labels_T in labels_BT]]
        return -Independent(Normal(z_BL.double() @ self.world.w_XL.T, self.world.s), 1).log_prob(x_BX)


def test_500_samples_a_sentence_in_any_chunks_find_the_exact_likelihood(base, monkeypatch):
    texts = list(dict.fromkeys(tiny.ENGLISH))[:8]
    tokens = from_texts(texts, load_tokenizer(base), 64)
    world = LinearGaussian(len(texts))
    exact = float(world.nll_S.mean())

    def found(shift, samples, batch):
        model = Solvable(world, tokens, shift)
        settings = EvaluationConfig(iw_samples=samples, batch=batch)
        nll = measure(model, tokens, settings)["iw_nll"]
        assert max(model.pairs) <= batch
        return nll

    for samples, batch in ((1, 128), (500, 128)):
        assert found(0.0, samples, batch) == pytest.approx(exact, abs=1e-4)
    whole = found(0.2, 500, 4000)
    assert whole == pytest.approx(exact, abs=0.05)
    assert abs(whole - exact) > 1e-4  # else the next lines would hold without any samples
    for batch in (7, 500, 501):
        assert found(0.2, 500, batch) == pytest.approx(whole, abs=1e-4)
    monkeypatch.setattr(evaluation, "WINDOW", 3)
    assert found(0.2, 500, 128) == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("count", [2, 3, 10, 501])
def test_a_derangement_uses_each_sentence_once_and_none_for_itself(count):
    mate_N = derangement(count, 0)
    assert sorted(mate_N) == list(range(count))
    assert not (mate_N == np.arange(count)).any()
    assert np.array_equal(mate_N, derangement(count, 0))
    assert count < 10 or not np.array_equal(mate_N, derangement(count, 1))
    assert count != 10 or mate_N.tolist() == [6, 5, 3, 4, 8, 9, 2, 1, 7, 0], "z_gain compares over versions"


# The metrics


def targets_of(base, longest):
    """The ids to predict: those of the whole text with its end or, if they are too many, as many as are kept."""
    found = [load_tokenizer(base)(text)["input_ids"] for text in TEXTS]
    return [ids if len(ids) <= longest else ids[: longest - 1] for ids in found]


def loop(model, tokens, settings, training, targets, words):
    """Every metric, a sentence at a time, by torch.distributions and the stock loss; no batching, nothing shared."""
    posteriors, z_L_of, labels_of, rec_of = [], [], [], []

    def nll(z_L, labels_T):
        output = model.t5(encoder_outputs=(z_L.float()[None, None],), labels=labels_T[None])
        return float(output.loss.double()) * len(labels_T)

    with torch.no_grad():
        for i in range(len(tokens)):
            ids = torch.as_tensor(tokens[i])
            mu_1L, logvar_1L = model.encode(ids[None], torch.ones_like(ids)[None])
            q = Independent(Normal(mu_1L[0].double(), torch.exp(logvar_1L[0].double() / 2)), 1)
            eps = collate(tokens, np.array([i]), pad_id=0, latent_dim=LATENT, seed=SEED, keys=(), eval=True).eps_BL[0]
            posteriors.append(q)
            z_L_of.append(q.mean + q.stddev * eps)
            labels_of.append(torch.as_tensor(targets[i]))
            rec_of.append(nll(z_L_of[i], labels_of[i]))
        prior = Independent(Normal(torch.zeros(LATENT).double(), torch.ones(LATENT).double()), 1)
        kl = np.stack([torch.distributions.kl_divergence(q.base_dist, prior.base_dist).numpy() for q in posteriors])
        ratios = [
            float(posteriors[i].log_prob(z))
            - float(torch.logsumexp(torch.stack([q.log_prob(z) for q in posteriors]), 0))
            + math.log(len(tokens))
            for i, z in enumerate(z_L_of)
        ]
        trained = []
        for i in range(len(training)):
            ids = torch.as_tensor(training[i])
            mu_1L, logvar_1L = model.encode(ids[None], torch.ones_like(ids)[None])
            trained.append(Independent(Normal(mu_1L[0].double(), torch.exp(logvar_1L[0].double() / 2)), 1))
        against = [
            float(posteriors[i].log_prob(z))
            - float(torch.logsumexp(torch.stack([q.log_prob(z) for q in (posteriors[i], *trained)]), 0))
            + math.log(len(trained) + 1)
            for i, z in enumerate(z_L_of)
        ]
        mates = derangement(len(tokens), SEED)
        swapped = [nll(z_L_of[mates[i]], labels_of[i]) for i in range(len(tokens))]
        iw = []
        for i in range(settings.iw_sentences):
            noise = distributed.stream(SEED, "iw", i).standard_normal((settings.iw_samples, LATENT))
            q = posteriors[i]
            zs = [q.mean + q.stddev * torch.from_numpy(eps) for eps in noise]
            logs = [-nll(z, labels_of[i]) + float(prior.log_prob(z) - q.log_prob(z)) for z in zs]
            iw.append(-float(torch.logsumexp(torch.tensor(logs).double(), 0)) + math.log(settings.iw_samples))
    mu_NL = torch.stack([q.mean for q in posteriors])
    rec_N, kl_N, count = np.array(rec_of), kl.sum(1), settings.iw_sentences
    yardstick_N = yardstick_of(tokens)
    of_sentences = {
        "rec": rec_N,
        "kl": kl_N,
        "nelbo": rec_N + kl_N,
        "paper_nelbo": rec_N - kl_N,
        "z_gain": np.array(swapped) - rec_N,
        "mi": np.array(ratios),
        "mi_train": np.array(against),
        "iw_nll": np.array(iw),
        "lm_gain": yardstick_N - rec_N,
        "above_yardstick": np.array(iw) - yardstick_N[:count],
        "nelbo_above_yardstick": rec_N + kl_N - yardstick_N,
    }
    return {
        **{key: values.mean() for key, values in of_sentences.items()},
        **{f"{key}_se": values.std(ddof=1) / len(values) ** 0.5 for key, values in of_sentences.items()},
        "kl_per_dim": list(kl.mean(0)),
        "ppl": math.exp((sum(rec_of) + kl.sum()) / sum(words)),
        "ppl_subword": math.exp((sum(rec_of) + kl.sum()) / sum(map(len, labels_of))),
        "mi_ceiling": math.log(len(tokens)),
        "mi_sentences": len(tokens),
        "mi_train_sentences": len(training),
        "au": sum(float(mu_NL[:, unit].var(correction=0)) > 0.01 for unit in range(LATENT)),
        "iw_ppl": math.exp(sum(iw) / sum(words[:count])),
        "sentences": len(tokens),
        "tokens": sum(map(len, labels_of)),
        "words": sum(words),
        "iw_sentences": count,
        "iw_samples": settings.iw_samples,
    }


@pytest.mark.parametrize("longest", [64, 24])
def test_metrics_equal_a_plain_loop(base, longest):
    """Nothing is cut at 64 tokens. At 24, the loss of a cut sentence is that of its kept tokens, without an end."""
    whole = from_texts(TEXTS, load_tokenizer(base), longest)
    words = [len(text.split()) + 1 for text in TEXTS] if longest == 64 else whole.words_N.tolist()
    assert 0 < whole.truncated_N[:5].sum() < 5 or longest == 64, "else iw_nll has no cut sentence"
    model = build(base)
    model.train()  # dropout 0.1: evaluation must not see it
    model.t5.decoder.eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    training = from_texts(tiny.ENGLISH[20:43], load_tokenizer(base), 64)
    beside = {"yardstick_N": yardstick_of(whole), "train": Training(training)}
    found = measure(model, whole, **beside)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert found == measure(model, whole, **beside)
    first = slice(0, SETTINGS.iw_sentences)
    assert whole.words_N[first].sum() != whole.lengths_N[first].sum(), "else iw_ppl could count subwords"
    expected = loop(model.eval(), whole, SETTINGS, training, targets_of(base, longest), words)
    assert 0 < expected["au"] < LATENT  # else the threshold is not tested
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-4), key
    assert found["mi"] <= found["mi_ceiling"]
    assert found["mi_train"] <= math.log(len(training) + 1)
    assert set(found) == KEYS
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_cut_sentences_and_unknown_subwords_are_shares(base, tokens):
    found = measure(build(base), tokens, full=False)
    tokenizer = load_tokenizer(base)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert found["truncated"] == pytest.approx(np.mean([len(row) > 24 for row in ids]))
    assert 0 < found["truncated"] < 1
    kept = targets_of(base, 24)
    assert sum(map(len, kept)) == sum(min(len(row), 24) for row in ids) - sum(len(row) > 24 for row in ids)
    unknown = sum(row.count(tokenizer.unk_token_id) for row in kept)
    assert unknown > 0
    assert found["unk"] == pytest.approx(unknown / sum(map(len, kept)))
    assert found["tokens"] == sum(map(len, kept))


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_batch_size_changes_nothing(base, tokens, batch):
    model = build(base)
    expected = measure(model, tokens)
    found = measure(model, tokens, SETTINGS.model_copy(update={"batch": batch}))
    assert dict(logs(found)) == close_to(expected)


@pytest.mark.parametrize("limit", [1, 30, 77])
def test_the_limit_of_tokens_changes_nothing(base, tokens, limit):
    """Every forward pass of every metric is within the limit: the logits of one above it may not fit."""
    model = build(base)
    expected = measure(model, tokens, **beside(base, tokens))
    sizes = []

    def note(module, args, kwargs):
        sizes.append(tuple(kwargs["input_ids"].shape))

    for stack in (model.t5.encoder, model.t5.decoder):
        stack.register_forward_pre_hook(note, with_kwargs=True)
    found = measure(model, tokens, SETTINGS.model_copy(update={"tokens": limit}), **beside(base, tokens))
    assert dict(logs(found)) == close_to(expected, 1e-5)
    assert all(count == 1 or count * length <= limit for count, length in sizes)
    assert max(count for count, _ in sizes) == {1: 1, 30: 3, 77: SETTINGS.batch}[limit]


def test_a_long_evaluation_is_announced_with_what_it_is_for(base, tokens, capsys, monkeypatch):
    model = build(base)
    measure(model, tokens)
    assert "this evaluation" not in capsys.readouterr().err
    # A second per token: 17 sentences with their padding twice, and 5 sentences with 7 samples each.
    clock = iter([0.0, float(forecast_tokens(tokens))])
    monkeypatch.setattr(forecast, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    measure(model, tokens)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "this evaluation" in line]
    lengths = sorted(tokens.lengths_N.tolist(), reverse=True)
    own = sum(len(lengths[at : at + 4]) * lengths[at] for at in range(0, 17, 4))
    samples = 7 * int(tokens.lengths_N[:5].sum())
    assert line == (
        f"the forward passes of this evaluation take about {(2 * own + samples) / 60:.0f} minutes: {own / 60:.0f} "
        f"minutes for rec and kl, {own / 60:.0f} minutes for z_gain, {samples / 60:.0f} minutes for iw_nll with 7 "
        "samples for each of 5 sentences (--iw-samples, --iw-sentences)"
    )


def forecast_tokens(tokens):
    """The tokens of the second forward pass, the one that is timed: the first is slower than all others."""
    return 4 * sorted(tokens.lengths_N.tolist(), reverse=True)[4]


def test_no_forward_pass_holds_more_than_a_batch(base, tokens):
    model = build(base)
    sizes = []
    model.t5.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    encoded = []
    model.t5.encoder.register_forward_pre_hook(lambda module, args, kwargs: encoded.append(1), with_kwargs=True)
    measure(model, tokens, EvaluationConfig(iw_samples=50, batch=8))
    assert max(sizes) == 8
    assert sum(sizes) == 17 * (2 + 50)
    assert len(encoded) == 3  # 17 sentences in batches of 8: each is encoded once, whatever K is


def test_the_first_sentences_are_the_subset(base, tokens):
    model = build(base)
    part, whole = measure(model, tokens.first(5)), measure(model, tokens)
    assert whole["iw_nll"] == pytest.approx(part["iw_nll"], rel=1e-6)
    assert whole["iw_ppl"] == pytest.approx(part["iw_ppl"], rel=1e-6)
    assert measure(model, tokens, EvaluationConfig(iw_samples=2))["iw_sentences"] == len(tokens)
    assert measure(model, tokens, EvaluationConfig(iw_samples=2, iw_sentences=99))["iw_sentences"] == len(tokens)


def test_during_training_there_is_no_importance_sampling(base, tokens):
    model = build(base)
    # Training sentences would cost an encoder pass over all of them at each validation.
    full, quick = measure(model, tokens), measure(model, tokens, full=False, train=Training(tokens))
    left_out = {"iw_nll", "iw_ppl", "iw_sentences", "iw_samples", "iw_nll_se", "iw_ppl_se"}
    others = {"mi_train", "mi_train_sentences", *BESIDE}
    others |= {f"{key}_se" for key in others - {"mi_train_sentences"}}
    assert {key for key, value in quick.items() if value is None} == left_out | others
    assert {key: full[key] for key in KEYS - left_out} == {key: quick[key] for key in KEYS - left_out}


def test_the_values_of_the_sentences_are_those_of_the_means(base, tokens):
    found, values = evaluate(build(base), tokens, ALONE, SETTINGS, seed=SEED, pad_id=0)
    assert {name: len(part) for name, part in values.items()} == {"rec": 17, "kl": 17, "rec_swapped": 17, "iw_nll": 5}
    assert all(part.dtype == np.float64 for part in values.values())
    for name in ("rec", "kl", "iw_nll"):
        assert values[name].mean() == found[name]
    assert (values["rec_swapped"] - values["rec"]).mean() == found["z_gain"]


def test_a_validation_has_the_bound_alone_beside_its_yardstick(base, tokens):
    found = measure(build(base), tokens, full=False, yardstick_N=yardstick_of(tokens))
    assert (found["above_yardstick"], found["above_yardstick_se"]) == (None, None)
    assert found["nelbo_above_yardstick"] == pytest.approx(found["nelbo"] - yardstick_of(tokens).mean())


def test_information_of_a_part_of_the_sentences_and_of_training_sentences(base, tokens):
    model, count = build(base), len(tokens)
    settings = SETTINGS.model_copy(update={"mi_sentences": 6})
    part = measure(model, tokens, settings, full=False)
    assert (part["mi_sentences"], part["mi_ceiling"]) == (6, math.log(count))
    whole = measure(model, tokens, train=Training(tokens, np.arange(count)))
    assert part["mi"] != whole["mi"]
    # Of the training split itself: a sentence that is among the components is not added to them again. With all of
    # them, the mixture is that of the split.
    assert whole["mi_train"] == pytest.approx(whole["mi"], rel=1e-6)


def test_an_evaluation_counts_each_task_to_its_end_and_a_validation_shows_none(base, tokens, monkeypatch, capsys):
    """A bar that never fills looks like a hang. Those of a validation would be drawn into the bar of its training."""
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    model, training = build(base), Training(from_texts(tiny.ENGLISH[20:43], load_tokenizer(base), 24))
    capsys.readouterr()
    measure(model, tokens, full=False, train=training)
    assert capsys.readouterr().err == ""
    settings = SETTINGS.model_copy(update={"mi_sentences": 6})
    measure(model, tokens, settings, train=training)
    last = dict(line.rsplit(", ", 1)[0].split(": ") for line in capsys.readouterr().err.splitlines())
    assert last == {
        "Encoding and decoding": "17 of 17 sentences (100 %)",
        "Decoding the z of other sentences": "17 of 17 sentences (100 %)",
        "Importance-weighted likelihood": "35 of 35 samples (100 %)",
        "Mutual information": "6 of 6 sentences (100 %)",
        "Encoding training sentences": "23 of 23 sentences (100 %)",
        "Mutual information against them": "6 of 6 sentences (100 %)",
    }


def test_the_verdict_during_training_weighs_the_kl_as_the_loss_does(base, tokens):
    found = measure(build(base), tokens, full=False, beta=0.5)
    assert (found["verdict"], found["verdict_reason"]) == verdict(found, 0.5)
    assert verdict(found, 0.5) != verdict(found), "else beta could be left out"


def test_the_seed_decides_the_samples(base, tokens):
    model = build(base)
    first = measure(model, tokens)
    other = evaluate(model, tokens, ALONE, SETTINGS, seed=SEED + 1, pad_id=0).metrics
    for key in ("rec", "mi", "z_gain", "iw_nll"):
        assert first[key] != other[key]
    assert first["kl"] == other["kl"]


def test_a_decoder_that_ignores_z_has_no_gain(base, tokens):
    model = build(base)
    with torch.no_grad():
        memories = [weight for name, weight in model.named_parameters() if ".memory." in name]
        for weight in memories:
            weight.zero_()
    assert memories
    found = measure(model, tokens)
    assert found["z_gain"] == pytest.approx(0.0, abs=1e-9)
    assert found["kl"] > 1  # the KL alone does not tell
    assert found["verdict"] == verdict(found, beta=0.0).word == "unused KL"


def test_a_decoder_that_uses_z_gains(base, tokens):
    model = build(base, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    before = measure(model, tokens, full=False)
    for step in range(60):
        batch = collate(tokens, np.arange(len(tokens)), pad_id=0, latent_dim=LATENT, seed=0, keys=(step,))
        optimizer.zero_grad()
        model(**batch.arguments()).rec_B.mean().backward()
        optimizer.step()
    after = measure(model, tokens, full=False)
    assert after["rec"] < before["rec"] / 2
    assert after["z_gain"] > 5
    assert before["verdict"] == "unused KL"
    assert after["verdict"] == "uses z"
    assert f"{after['kl']:.2f}" in after["verdict_reason"]
    assert f"{after['z_gain']:.2f}" in after["verdict_reason"]


def test_what_a_verdict_looks_at(base, tokens):
    """Each threshold in turn, on a model's own numbers with one of them changed."""
    own = measure(build(base), tokens, full=False) | {"kl": 12.0, "mi": 2.0, "z_gain": 8.0}
    assert own["mi_ceiling"] > 2
    for changes, beta, word in (
        ({}, None, "uses z"),
        ({"kl": 0.99}, None, "collapsed"),
        ({"kl": math.nan}, None, "collapsed"),
        ({"mi": 0.99}, None, "unused KL"),
        ({"z_gain": 5.9}, None, "unused KL"),
        ({"z_gain": math.nan}, None, "unused KL"),
        ({"z_gain": 5.9}, 0.9, "uses z"),  # half of what is paid for is 5.4
        ({"z_gain": 5.9}, 7.0, "unused KL"),
        ({"z_gain": 1.1}, 0.0, "uses z"),
        ({"z_gain": 0.9}, 0.0, "unused KL"),
        ({"kl": 1.2, "z_gain": 0.9}, None, "unused KL"),
        ({"kl": 1.2, "z_gain": 1.1, "mi": 0.4, "mi_ceiling": math.log(2)}, None, "uses z"),
        ({"kl": 1.2, "z_gain": 1.1, "mi": 0.3, "mi_ceiling": math.log(2)}, None, "unused KL"),
        ({"kl": None}, None, "language model"),
    ):
        assert verdict(own | changes, beta).word == word, changes
    for missing in ("kl", "mi", "mi_ceiling", "au", "kl_per_dim", "z_gain"):
        assert verdict({key: value for key, value in own.items() if key != missing}) is None
        assert missing == "kl" or verdict(own | {missing: None}) is None


MEASURED = {"kl": 12.0, "mi": 2.0, "mi_ceiling": 7.6, "au": 3, "kl_per_dim": [3.0] * 4, "z_gain": 8.0}
Z_GAIN = "with the z of another sentence, rec is {} nats higher (z_gain), "


@pytest.mark.parametrize(
    ("changes", "beta", "reason"),
    [
        ({}, None, f"the decoder uses the code: {Z_GAIN.format('8.00')}at least 6.00, 50% of KL; PAID; UNITS"),
        ({}, 1.0, f"the decoder uses the code: {Z_GAIN.format('8.00')}at least 6.00, 50% of KL; PAID; UNITS"),
        ({}, 0.5, f"the decoder uses the code: {Z_GAIN.format('8.00')}at least 3.00, 50% of beta * KL; PAID; UNITS"),
        ({}, 0.0, f"the decoder uses the code: {Z_GAIN.format('8.00')}at least 1; PAID; UNITS"),
        (
            {"z_gain": 5.9},
            2.0,
            f"PAID, but the decoder hardly uses it: {Z_GAIN.format('5.90')}below 6.00, 50% of KL; UNITS",
        ),
        ({"mi": 0.5}, None, "PAID, but it does not identify the sentence: mi 0.50 nats, below 1; UNITS"),
        (
            {"mi": 0.3, "mi_ceiling": math.log(2)},
            None,
            "PAID, but it does not identify the sentence: mi 0.30 nats, below 0.35; UNITS",
        ),
        ({"kl": 0.5}, None, "the code is nearly the same for all sentences: KL 0.50 nats, below 1; UNITS"),
        # At a threshold, it is reached.
        (
            {"kl": 1.0, "z_gain": 1.0},
            None,
            f"the decoder uses the code: {Z_GAIN.format('1.00')}at least 1; the code costs KL 1.00 nats; UNITS",
        ),
        (
            {"kl": 2.0, "mi": 1.0, "z_gain": 1.0},
            None,
            f"the decoder uses the code: {Z_GAIN.format('1.00')}at least 1; the code costs KL 2.00 nats; UNITS",
        ),
        ({"kl": None}, None, "the model has no latent code"),
    ],
)
def test_the_reason_of_a_verdict_has_its_numbers_and_its_threshold(changes, beta, reason):
    expected = reason.replace("PAID", "the code costs KL 12.00 nats").replace("UNITS", "3 of 4 units active")
    assert verdict(MEASURED | changes, beta).reason == expected


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (
            {"above_yardstick": 1.7312, "above_yardstick_se": 0.12, "iw_sentences": 2000},
            "1.73 ± 0.12 nats per sentence worse than the yardstick on 2,000 sentences (iw_nll)",
        ),
        (
            {"above_yardstick": -0.5, "above_yardstick_se": 0.1, "iw_sentences": 200},
            "0.50 ± 0.10 nats per sentence better than the yardstick on 200 sentences (iw_nll)",
        ),
        (
            {"above_yardstick": 0.1, "above_yardstick_se": 0.06, "iw_sentences": 200},
            "not distinguishable: 0.10 ± 0.06 nats per sentence above the yardstick on 200 sentences (iw_nll)",
        ),
        (
            {"above_yardstick": -0.1, "above_yardstick_se": 0.06, "iw_sentences": 200},
            "not distinguishable: -0.10 ± 0.06 nats per sentence above the yardstick on 200 sentences (iw_nll)",
        ),
        # Two standard errors are stated, and a single sentence has none.
        (
            {"above_yardstick": -0.25, "above_yardstick_se": 0.125, "iw_sentences": 200},
            "0.25 ± 0.12 nats per sentence better than the yardstick on 200 sentences (iw_nll)",
        ),
        (
            {"above_yardstick": 0.1, "above_yardstick_se": None, "iw_sentences": 1},
            "0.10 nats per sentence worse than the yardstick on 1 sentences (iw_nll)",
        ),
        (
            {"nelbo_above_yardstick": 3.2, "nelbo_above_yardstick_se": 0.3},
            "at most 3.2 ± 0.3 nats per sentence above the yardstick (nelbo)",
        ),
        ({}, "unknown without a yardstick"),
        ({"kl": None}, None),
    ],
)
def test_the_cost_of_a_code_in_words(metrics, words):
    assert cost(metrics) == words
    assert metrics == {"kl": None} or cost(metrics | {"kl": 12.0}) == words


def test_a_model_may_use_its_code_and_predict_badly(base, tokens):
    """Two statements: `aggressive` on the grammar used its code and was 52 nats worse than the language model."""
    model = build(base)
    found = measure(model, tokens, yardstick_N=np.full(len(tokens), 5.0)) | {"kl": 3.4, "mi": 1.8, "z_gain": 4.6}
    assert verdict(found).word == "uses z"
    assert found["above_yardstick"] > 50
    assert re.fullmatch(r"\d+(\.\d)? ± \d+(\.\d)? nats per sentence worse than the yardstick .*", found["cost"])


def test_a_collapsed_posterior(base, tokens):
    model = build(base)
    with torch.no_grad():
        for weight in (model.bottleneck.mu.weight, model.bottleneck.logvar.weight):
            weight.zero_()
    found = measure(model, tokens)
    assert (found["kl"], found["au"]) == (0.0, 0)
    assert found["mi"] == pytest.approx(0.0, abs=1e-12)
    assert found["nelbo"] == found["rec"]
    assert found["kl_per_dim"] == [0.0] * LATENT
    assert found["verdict"] == "collapsed"


def test_a_plain_language_model_has_an_exact_likelihood_and_nulls(base, tokens):
    model = T5VAE.from_base(ModelConfig(base=base, injection="none"))
    passes = []
    model.t5.decoder.register_forward_hook(lambda *_: passes.append(1))
    found = measure(model, tokens, yardstick_N=yardstick_of(tokens), train=Training(tokens))
    assert len(passes) == 5, "17 sentences in batches of 4; samples of nothing would find the same, K times as slowly"
    null = {"kl", "paper_nelbo", "mi", "z_gain", "mi_train", *BESIDE}
    null |= {f"{key}_se" for key in null}
    null |= {"kl_per_dim", "mi_ceiling", "mi_sentences", "mi_train_sentences", "au", "iw_samples", "cost"}
    assert {key for key, value in found.items() if value is None} == null
    assert set(found) == KEYS
    with torch.no_grad():
        nll = [float(model.reconstruction(None, torch.as_tensor(ids)[None])) for ids in targets_of(base, 24)]
    assert found["rec"] == pytest.approx(np.mean(nll), rel=1e-6)
    assert found["nelbo"] == found["rec"]
    assert found["ppl"] == pytest.approx(math.exp(sum(nll) / tokens.words_N.sum()), rel=1e-5)
    assert found["ppl_subword"] == pytest.approx(math.exp(sum(nll) / sum(map(len, targets_of(base, 24)))), rel=1e-5)
    assert found["iw_nll"] == pytest.approx(np.mean(nll[:5]), rel=1e-6)
    assert found["iw_ppl"] == pytest.approx(math.exp(sum(nll[:5]) / tokens.words_N[:5].sum()), rel=1e-5)
    assert found["iw_sentences"] == 5
    assert found["verdict"] == "language model"


def test_one_sentence_has_no_mate_and_none_at_all_is_an_error(base, tokens):
    found = measure(build(base), tokens.first(1))
    assert (found["z_gain"], found["au"], found["mi_ceiling"], found["verdict"]) == (None, 0, 0.0, None)
    assert (found["rec_se"], found["ppl_se"], found["z_gain_se"], found["mi_se"]) == (None, None, None, None)
    assert found["mi"] == pytest.approx(0.0, abs=1e-12)
    assert measure(build(base), tokens.first(2), full=False)["z_gain"] is not None
    with pytest.raises(DataError, match="no sentences"):
        measure(build(base), tokens.first(0))


def test_sentences_without_a_whole_word_have_no_perplexity_per_word(base):
    """Text without spaces, all of it cut: no word is kept, and no end."""
    cut = from_texts(["ab" * 60] * 3, load_tokenizer(base), 16)
    found = measure(build(base), cut)
    assert (found["words"], found["ppl"], found["iw_ppl"]) == (0, math.inf, math.inf)
    assert found["tokens"] == 3 * 15
    assert math.isfinite(found["ppl_subword"])


def test_a_perplexity_past_the_largest_float_is_infinite(base):
    model = build(base)
    with torch.no_grad():
        model.t5.shared.weight.mul_(100)
    one_long_word = from_texts(["ab" * 60], load_tokenizer(base), 128)
    assert measure(model, one_long_word, full=False)["ppl"] == math.inf


RECIPE = """
model: {{base: {base}, latent_dim: 6, mu_std: 0.1}}
data: {{corpus: text, path: {text}, max_tokens: 40, cache_dir: {cache}}}
batch: {{global: 16}}
precision: fp32
phases:
  - {{name: only, steps: 30, beta: {{schedule: constant, value: 1000}}, optimizer: {{lr: 1.0e-2, clip: 10000}}}}
validation: {{every_steps: 15, sentences: 20}}
evaluation: {{iw_samples: 2, iw_sentences: 4, bleu_sentences: 0, samples: 0}}
"""


@pytest.mark.timeout(360)
def test_a_run_whose_kl_costs_too_much_collapses_and_says_so_everywhere(base, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = tiny.ENGLISH
    text = tiny.write_splits(tmp_path / "text", lines[:60], lines[60:80], lines[80:100])
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.format(base=base, text=text, cache=tmp_path / "cache"), encoding="utf-8")
    trained = launch(["-m", "vae_ds", "train", recipe, "--run-dir", run], processes=1)
    evaluated = launch(["-m", "vae_ds", "evaluate", run], processes=1)

    rows = [json.loads(row) for row in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    last = rows[-1]
    assert last["verdict"] == "collapsed"
    assert f"{last['kl']:.2f} nats, below 1" in last["verdict_reason"]
    (told,) = [line for line in trained.output.splitlines() if line.startswith("valid at step 30:")]
    assert told.endswith("  collapsed")
    shown = EventAccumulator(str(run)).Reload()
    (tag,) = [tag for tag in shown.Tags()["tensors"] if tag.startswith("valid/verdict")]
    texts = [b"".join(point.tensor_proto.string_val).decode() for point in shown.Tensors(tag)]
    assert [words.split("**")[1] for words in texts] == [row["verdict"] for row in rows]

    found = json.loads((run / "eval-test.json").read_text(encoding="utf-8"))
    assert found["verdict"] == "collapsed"
    assert found["kl"] < 0.5
    line = f"run: collapsed: {found['verdict_reason']}"
    assert line in evaluated.output
    assert "run: KL of each unit, the largest first:" in evaluated.output
    print_metrics([run])
    assert line in capsys.readouterr().out


# More than one process


@pytest.mark.timeout(560)
def test_two_processes_find_what_one_finds(base):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, base],
            env={
                **os.environ,
                **common,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            },
            stdout=subprocess.PIPE,  # read only at the end: a worker writes little
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=250)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0]
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert first == second  # the calls too: ZeRO 3 hangs on a rank that makes one fewer
    partitioned = first.pop("partitioned")
    expected = report(base, ALONE)
    for injection, alone in expected.items():
        assert dict(logs(first[injection]["metrics"])) == close_to(alone["metrics"])
        assert first[injection]["calls"] < alone["calls"]
    before, after = partitioned
    assert dict(logs(before)) == close_to(expected["cross_attention"]["metrics"])
    assert after["rec"] != before["rec"]


def close_to(metrics, tolerance=1e-6):
    """What float32 leaves equal when sentences are batched otherwise; perplexities by their logarithm."""
    exact = (str, type(None))
    return {
        key: value if isinstance(value, exact) else pytest.approx(value, rel=tolerance, abs=5e-6)
        for key, value in logs(metrics)
    }


def logs(metrics):
    return [(key, math.log(value) if value and "ppl" in key else value) for key, value in metrics.items()]


def beside(base, tokens):
    """19 training sentences in batches of 4: two ranks need a filler, which must not become a component."""
    training = Training(from_texts(tiny.ENGLISH[20:39], load_tokenizer(base), 24))
    return {"yardstick_N": yardstick_of(tokens), "train": training}


def report(base, ranks):
    """Metrics and forward calls of a model with and of one without a latent."""
    tokens = from_texts(TEXTS, load_tokenizer(base), 24)
    found = {}
    for injection in ("cross_attention", "none"):
        model = build(base, injection=injection)
        calls = []
        model.t5.decoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if model.bottleneck is not None:
            model.bottleneck.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        metrics = evaluate(model, tokens, ranks, SETTINGS, seed=SEED, pad_id=0, **beside(base, tokens)).metrics
        found[injection] = {"metrics": metrics, "calls": len(calls)}
    return found


def inside_engine(base, ranks):
    """Metrics within a ZeRO 3 engine, and once more after a step: an evaluation must leave it able to train."""
    from vae_ds.engine.phase_engine import PhaseEngine, resolve

    tokens = from_texts(TEXTS, load_tokenizer(base), 24)
    engine = PhaseEngine(
        build(base).train(),
        optimizer=OptimizerConfig(),
        ranks=ranks,
        precision="fp32",
        ds_config=resolve("zero3", "fp32"),
    )

    # The pairs of sentence and sample in a forward pass follow the lengths, which differ between the ranks.
    settings = SETTINGS.model_copy(update={"tokens": 77})

    def measured():
        return evaluate(engine.module, tokens, ranks, settings, seed=SEED, pad_id=0, **beside(base, tokens)).metrics

    before = measured()
    batch = collate(tokens, np.arange(4), pad_id=0, latent_dim=LATENT, seed=0, keys=())
    engine.backward(engine.forward(**batch.arguments()).rec_B.mean())
    assert engine.step(1e-3).applied
    return before, measured()


if __name__ == "__main__":
    this = distributed.start()
    line = json.dumps({**report(sys.argv[1], this), "partitioned": inside_engine(sys.argv[1], this)})
    sys.stderr.flush()
    os.write(1, f"\n{line}\n".encode())
    distributed.finish()
    os._exit(0)  # as DeepSpeed may abort while the interpreter ends
