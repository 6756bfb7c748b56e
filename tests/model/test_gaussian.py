"""The Gaussian room against torch.distributions and closed forms; free bits against their definition."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from vae_ds.model import gaussian

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def posterior() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mu, logvar and z of 7 sentences and 5 units, float64."""
    draw = torch.Generator().manual_seed(3)
    mu_BL, logvar_BL, z_BL = torch.randn(3, 7, 5, generator=draw, dtype=torch.float64)
    return 2 * mu_BL, logvar_BL, z_BL


def test_densities_and_kl_agree_with_torch(posterior):
    mu_BL, logvar_BL, z_BL = posterior
    q, prior = Normal(mu_BL, torch.exp(0.5 * logvar_BL)), Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(gaussian.kl_per_dim(mu_BL, logvar_BL), kl_divergence(q, prior))
    torch.testing.assert_close(gaussian.log_density(z_BL, mu_BL, logvar_BL), q.log_prob(z_BL).sum(-1))
    torch.testing.assert_close(gaussian.log_prior(z_BL), prior.log_prob(z_BL).sum(-1))
    # The last axis has the units, whatever is before it: several samples of each sentence, too.
    z_KBL = torch.stack([z_BL, -z_BL, 3 * z_BL])
    torch.testing.assert_close(gaussian.log_density(z_KBL, mu_BL, logvar_BL), q.log_prob(z_KBL).sum(-1))
    torch.testing.assert_close(gaussian.log_prior(z_KBL), prior.log_prob(z_KBL).sum(-1))


def test_kl_is_never_negative_near_the_prior():
    logvar_BL = torch.linspace(-1e-4, 1e-4, 2001)[:, None]
    kl_BL = gaussian.kl_per_dim(torch.zeros_like(logvar_BL), logvar_BL)
    assert kl_BL.min() >= 0
    torch.testing.assert_close(kl_BL, logvar_BL.double().square().div(4).float(), atol=1e-11, rtol=1e-2)


def test_sample_has_the_posterior_s_moments_and_eps_zero_is_the_mean():
    mu_BL, logvar_BL = torch.tensor([[1.5, -2.0]]), torch.tensor([[-2.0, 0.7]])
    eps_BL = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    z_BL = gaussian.sample(mu_BL, logvar_BL, eps_BL)
    torch.testing.assert_close(z_BL.mean(0), mu_BL[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z_BL.var(0), logvar_BL[0].exp(), rtol=0.02, atol=0)
    assert torch.equal(gaussian.sample(mu_BL, logvar_BL, torch.zeros(1, 2)), mu_BL)
    # With the other sign, the moments are the same, but a resumed or repeated run has other samples.
    one_above_BL = gaussian.sample(torch.tensor([[3.0]]), torch.tensor([[2 * math.log(5.0)]]), torch.ones(1, 1))
    assert one_above_BL.item() == pytest.approx(3 + 5)


@pytest.mark.parametrize("chunk", [1, 3, 7, 2048])
def test_aggregate_is_torch_s_mixture_whatever_the_chunks(posterior, chunk):
    mu_ML, logvar_ML, _ = posterior
    z_NL = torch.randn(11, 5, generator=torch.Generator().manual_seed(1))
    mixture = MixtureSameFamily(
        Categorical(torch.ones(7, dtype=torch.float64)), Independent(Normal(mu_ML, torch.exp(0.5 * logvar_ML)), 1)
    )
    found_N = gaussian.log_aggregate(z_NL, mu_ML, logvar_ML, chunk=chunk)
    assert found_N.dtype == torch.float64
    torch.testing.assert_close(found_N, mixture.log_prob(z_NL.double()))


def test_aggregate_keeps_its_digits_at_small_variances_and_far_from_the_origin():
    draw = torch.Generator().manual_seed(5)
    # Each unit has its own place: a centre that all units share would leave them far from it.
    mu_ML = 500 * torch.linspace(-1, 1, 16) + torch.randn(400, 16, generator=draw)
    logvar_ML = torch.full((400, 16), -14.0)
    z_NL = gaussian.sample(mu_ML, logvar_ML, torch.randn(400, 16, generator=draw))
    # At this width the components do not overlap: log q(z) = log q(z | x) - ln M to far below a nat.
    expected_N = gaussian.log_density(z_NL.double(), mu_ML.double(), logvar_ML.double()) - math.log(400)
    torch.testing.assert_close(gaussian.log_aggregate(z_NL, mu_ML, logvar_ML), expected_N, atol=1e-6, rtol=0)


def test_aggregate_of_nothing_is_an_error_and_no_samples_are_none():
    assert gaussian.log_aggregate(torch.zeros(0, 2), torch.zeros(3, 2), torch.zeros(3, 2)).shape == (0,)
    with pytest.raises(ValueError, match="at least one"):
        gaussian.log_aggregate(torch.zeros(3, 2), torch.zeros(0, 2), torch.zeros(0, 2))


def test_means_and_variances_of_different_sentences_are_no_mixture():
    """Whole chunks fit together. Without an error, the components past the shorter of the two would be left out."""
    with pytest.raises(ValueError, match="shorter"):
        gaussian.log_aggregate(torch.zeros(3, 2), torch.zeros(6, 2), torch.zeros(4, 2), chunk=2)


def test_active_units_counts_variances_of_the_mean_above_the_threshold():
    draw = torch.Generator().manual_seed(4)
    spread_L = torch.tensor([1.0, 0.2, 0.05, 0.0])
    mu_ML = 3 + spread_L * torch.randn(5000, 4, generator=draw)
    assert gaussian.active_units(mu_ML) == 2
    assert gaussian.active_units(mu_ML, threshold=0.001) == 3
    # The variance over exactly these sentences, 1/4 here, and not an estimate for others, 1/2; above and not at it.
    of_two_ML = torch.tensor([[0.0], [1.0]])
    assert [gaussian.active_units(of_two_ML, threshold) for threshold in (0.24, 0.25, 0.26)] == [1, 0, 0]
    assert [gaussian.active_units(width * of_two_ML) for width in (0.195, 0.205)] == [0, 1], "the paper's 0.01"


KL_BL = torch.tensor([[0.5, 4.0, 3.5], [2.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("mode", "held_L", "expected_B", "gradient_BL"),
    [
        ("per_dim", None, [3 + 4 + 3.5, 9.0], [[0, 1, 1], [0, 0, 0]]),
        ("total", None, [8.0, 3.0], [[1, 1, 1], [1, 1, 1]]),
        ("per_dim_batch", None, [8.0, 3.0], [[1, 1, 1], [1, 1, 1]]),
        ("per_dim_batch", [1.25, 5.0, 3.0], [3 + 4 + 3, 3 + 1 + 3], [[0, 1, 0], [0, 1, 0]]),
        ("total_batch", None, [8.0, 3.0], [[1, 1, 1], [1, 1, 1]]),
        ("total_batch", [1.5, 1.5, 0.1], [8.0, 3.0], [[1, 1, 1], [1, 1, 1]]),
        ("total_batch", [1.5, 1.5, 0.0], [3.0, 3.0], [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_free_bits_values_and_gradients(mode, held_L, expected_B, gradient_BL):
    kl_BL = KL_BL.clone().requires_grad_()
    nats = 2.5 if mode == "total" else 3.0
    found_B = gaussian.thresholded_kl(kl_BL, mode, nats, None if held_L is None else torch.tensor(held_L))
    assert found_B.tolist() == expected_B
    found_B.sum().backward()
    assert kl_BL.grad.tolist() == gradient_BL


def test_free_bits_total_holds_a_sentence_below_the_floor_without_gradient():
    kl_BL = KL_BL.clone().requires_grad_()
    found_B = gaussian.thresholded_kl(kl_BL, "total", 5.0)
    found_B.sum().backward()
    assert found_B.tolist() == [8.0, 5.0]
    assert kl_BL.grad.tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("mode", ["per_dim", "total", "per_dim_batch", "total_batch"])
def test_lambda_zero_and_no_units_leave_the_raw_kl(mode):
    assert torch.equal(gaussian.thresholded_kl(KL_BL, mode, 0.0, torch.zeros(3)), KL_BL.sum(1))
    assert torch.equal(gaussian.thresholded_kl(torch.zeros(2, 0), mode, 3.0, torch.zeros(0)), torch.zeros(2))


def test_the_held_means_of_a_checkpoint_may_be_on_another_device():
    held_L, kl_BL = torch.ones(3), torch.zeros(2, 3, device="meta")
    assert gaussian.thresholded_kl(kl_BL, "per_dim_batch", 3.0, held_L).shape == (2,)


def test_paper_s_threshold_is_a_floor_of_96_nats():
    assert gaussian.thresholded_kl(torch.zeros(1, 32), "per_dim", 3.0).item() == 96


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="unknown free-bits mode 'per_batch'"):
        gaussian.thresholded_kl(KL_BL, "per_batch", 1.0)  # type: ignore[arg-type]
