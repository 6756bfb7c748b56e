"""Mutual information estimates against Gaussian codes whose information is known, and standard errors against draws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from vae_ds import distributed
from vae_ds.evaluation import information
from vae_ds.evaluation.estimates import perplexity, with_errors
from vae_ds.evaluation.information import Posterior
from vae_ds.model import gaussian

ALONE = distributed.Ranks(0, 0, 1, torch.device("cpu"))
UNITS = 32


def nothing(count):
    return None


def code(sentences, nats, seed):
    """Posteriors whose aggregate is N(0, I) and whose mutual information is `nats`, the same in each unit."""
    variance = math.exp(-2 * nats / UNITS)  # information of a unit: -1/2 ln of the posterior's variance
    generator = torch.Generator().manual_seed(seed)
    mu_NL = torch.randn(sentences, UNITS, generator=generator, dtype=torch.float64) * math.sqrt(1 - variance)
    eps_NL = torch.randn(sentences, UNITS, generator=generator, dtype=torch.float64)
    return Posterior(mu_NL, torch.full_like(mu_NL, math.log(variance)), mu_NL + math.sqrt(variance) * eps_NL)


def estimate_of(posterior, train=None, **options):
    every = np.arange(len(posterior.mu_NL))
    if train is None:
        gains_S = information.within_split(posterior, every, ALONE, nothing)
    else:
        gains_S = information.against_training(posterior, every, train[:2], ALONE, nothing, **options)
    found = with_errors(mi=gains_S.numpy())
    return found["mi"], found["mi_se"]


def test_the_mixture_over_a_split_measures_its_size_and_a_larger_one_of_training_sentences_less_so():
    """A code of 12.48 nats: about 7.6 against the 2,325 sentences of a split, 8.4 against 6,000."""
    nats, split = 12.48, code(2325, 12.48, seed=0)
    within, _ = estimate_of(split)
    assert within == pytest.approx(7.58, abs=0.1)
    of_more, _ = estimate_of(code(6000, nats, seed=1))
    assert of_more == pytest.approx(8.40, abs=0.1)
    against, _ = estimate_of(split, code(20_000, nats, seed=2))
    assert within + 1.5 < against < math.log(20_001)
    assert against < nats


@pytest.mark.parametrize("nats", [0.5, 3.0])
def test_an_information_far_below_the_limit_is_found(nats):
    split = code(2000, nats, seed=0)
    against, se = estimate_of(split, code(10_000, nats, seed=1))
    assert against == pytest.approx(nats, abs=0.02 + 3 * se)


def test_information_of_a_linear_gaussian_model():
    """x ~ N(0, I), q(z | x) = N(Ax, S): I(x; z) = 1/2 log det(S + AA') - 1/2 log det S, exactly."""
    draw = torch.Generator().manual_seed(11)
    sentences, width, units = 6000, 4, 3
    a_LX = 0.6 * torch.randn(units, width, generator=draw, dtype=torch.float64)
    variance_L = torch.tensor([0.5, 1.0, 0.8], dtype=torch.float64)
    mu_NL = torch.randn(sentences, width, generator=draw, dtype=torch.float64) @ a_LX.T
    logvar_NL = variance_L.log().expand(sentences, units)
    z_NL = gaussian.sample(mu_NL, logvar_NL, torch.randn(sentences, units, generator=draw, dtype=torch.float64))
    exact = 0.5 * (torch.logdet(variance_L.diag() + a_LX @ a_LX.T) - variance_L.log().sum())
    marginal = MultivariateNormal(torch.zeros(units, dtype=torch.float64), variance_L.diag() + a_LX @ a_LX.T)
    gain_N = gaussian.log_density(z_NL, mu_NL, logvar_NL) - marginal.log_prob(z_NL)
    error = float(gain_N.std()) / math.sqrt(sentences)
    found, _ = estimate_of(Posterior(mu_NL, logvar_NL, z_NL))
    assert error < 0.02
    assert 0.3 < exact < 3
    assert abs(found - float(exact)) < 4 * error


def test_information_between_its_ends():
    draw = torch.Generator().manual_seed(2)
    eps_NL, mu_NL = torch.randn(2, 300, 4, generator=draw, dtype=torch.float64)
    zeros_NL = torch.zeros_like(eps_NL)
    assert estimate_of(Posterior(zeros_NL, zeros_NL, eps_NL))[0] == pytest.approx(0, abs=1e-12)
    mu_NL, logvar_NL = 10 * mu_NL, torch.full_like(mu_NL, -12.0)
    z_NL = gaussian.sample(mu_NL, logvar_NL, eps_NL)
    found, _ = estimate_of(Posterior(mu_NL, logvar_NL, z_NL))
    assert found <= math.log(300)
    assert found == pytest.approx(math.log(300), abs=1e-6)
    # Of one sentence it is 0. Its two densities differ in their rounding, which must not exceed the ceiling.
    one = [estimate_of(Posterior(mu_NL[i, None], logvar_NL[i, None], z_NL[i, None]))[0] for i in range(50)]
    assert -1e-6 < min(one) <= max(one) <= 0


def test_without_the_own_posterior_the_estimate_would_exceed_the_information():
    nats, split, train = 4.0, code(500, 4.0, seed=0), code(20, 4.0, seed=1)
    with_own, _ = estimate_of(split, train)
    assert with_own < math.log(21) < nats
    own_N = gaussian.log_density(split.z_NL, split.mu_NL, split.logvar_NL)
    without = with_errors(mi=(own_N - gaussian.log_aggregate(split.z_NL, *train[:2])).numpy())
    assert without["mi"] > nats + 5 * without["mi_se"]


def test_a_sentence_that_is_a_training_sentence_is_counted_once():
    split = code(50, 20.0, seed=0)  # so precise that each z is far from every other posterior
    component_N = np.arange(50) < 25
    gains = information.against_training(
        split, np.arange(50), (split.mu_NL[:25], split.logvar_NL[:25]), ALONE, nothing, component_N
    )
    torch.testing.assert_close(gains[:25], torch.full((25,), math.log(25), dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(gains[25:], torch.full((25,), math.log(26), dtype=torch.float64), atol=1e-6, rtol=0)
    assert gains[25:].max() <= math.log(26), "the limit, without the rounding above it"


def test_a_part_of_the_sentences_estimates_the_whole_within_its_error():
    split = code(3000, 5.0, seed=0)
    whole, _ = estimate_of(split)
    index_S = information.chosen(3000, 400, seed=7)
    assert len(np.unique(index_S)) == 400
    assert (np.diff(index_S) > 0).all()
    assert index_S[0] < 100 < 2900 < index_S[-1], "drawn from the whole split, which may be sorted"
    part = with_errors(mi=information.within_split(split, index_S, ALONE, nothing).numpy())
    assert abs(part["mi"] - whole) < 4 * part["mi_se"] < 0.5
    assert information.chosen(1000, 4, seed=7).tolist() == [131, 173, 315, 383], "mi compares over versions"
    assert np.array_equal(information.chosen(10, None, 0), np.arange(10))
    assert np.array_equal(information.chosen(10, 10, 0), np.arange(10))


def test_chunks_change_nothing(monkeypatch):
    split, train = code(100, 5.0, seed=0), code(70, 5.0, seed=1)
    whole = information.against_training(split, np.arange(100), train[:2], ALONE, nothing)
    monkeypatch.setattr(information, "CHUNK", 7)
    torch.testing.assert_close(
        information.against_training(split, np.arange(100), train[:2], ALONE, nothing), whole, rtol=1e-12, atol=1e-12
    )


def test_each_rank_compares_its_share_alone_and_counts_it(monkeypatch):
    """Each rank with all sentences would find the same mean, in the time of one rank."""
    monkeypatch.setattr(information, "CHUNK", 7)
    split, index_S = code(50, 5.0, seed=0), np.arange(3, 48)
    whole_S = information.within_split(split, index_S, ALONE, nothing)
    for rank in range(2):
        counted = []
        own = information.within_split(split, index_S, replace(ALONE, rank=rank, world=2), counted.append)
        # The last digits of a product of matrices depend on its other rows, on some processors.
        torch.testing.assert_close(own, whole_S[rank::2], rtol=0, atol=1e-12)
        assert counted == [7, 7, 7, len(own) - 21]


# Standard errors


def test_the_error_of_a_perplexity_is_what_repeated_splits_show():
    random = np.random.default_rng(0)

    def split():
        words_N = random.integers(2, 30, size=400)
        return words_N * 4.0 + random.normal(0, 8, size=400), words_N

    drawn = [perplexity("ppl", *split()) for _ in range(500)]
    spread = np.std([one["ppl"] for one in drawn], ddof=1)
    assert np.mean([one["ppl_se"] for one in drawn]) == pytest.approx(spread, rel=0.1)


def test_a_perplexity_of_two_sentences_by_hand():
    """6 nats over 4 words; the sentences are 1/2 nat above and below what their words cost on average."""
    found = perplexity("ppl", np.array([2.0, 4.0]), np.array([1, 3]))
    value = math.exp(6 / 4)
    assert found == {"ppl": pytest.approx(value), "ppl_se": pytest.approx(value * 0.5 / 2)}
    assert perplexity("ppl", np.array([2.0]), np.array([1])) == {"ppl": pytest.approx(math.exp(2)), "ppl_se": None}
    assert perplexity("ppl", None, np.array([1, 3])) == {"ppl": None, "ppl_se": None}
    # The largest float is about e^709.78.
    assert perplexity("ppl", np.array([709.0]), np.array([1]))["ppl"] == pytest.approx(math.exp(709))
    for nats, words in ((710.0, 1), (0.0, 0), (math.nan, 1)):
        assert perplexity("ppl", np.array([nats] * 2), np.array([words] * 2)) == {"ppl": math.inf, "ppl_se": None}


def test_the_error_of_a_mean_is_what_repeated_splits_show():
    random = np.random.default_rng(0)
    drawn = [with_errors(rec=random.gamma(3.0, 20.0, size=200)) for _ in range(500)]
    assert np.mean([one["rec_se"] for one in drawn]) == pytest.approx(np.std([one["rec"] for one in drawn]), rel=0.1)
    both = with_errors(rec=np.array([3.0, 5.0]), kl=None)
    assert both == {"rec": 4.0, "rec_se": pytest.approx(1.0), "kl": None, "kl_se": None}
