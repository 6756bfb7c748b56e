"""Learned priors: the integral of each density, inverses, determinants, samples, precision, and gradients in a model.

A density that does not integrate to 1 would make every bound of a model with a learned prior too good, silently.
"""

import math

import pytest
import torch

from support.models import UNITS, batch, build
from vae_ds.config import ModelConfig
from vae_ds.model import gaussian
from vae_ds.model.prior import Coupling, MixturePrior, Prior, Whitening, make_prior

KINDS = ("gaussian", "mixture", "flow")


def disturbed(kind: str, units: int, spread: float = 0.3) -> Prior:
    """A prior with random weights, `spread` away from N(0, I)."""
    settings = ModelConfig(latent_dim=units, prior=kind, prior_components=3, prior_couplings=4, prior_width=16)
    prior = make_prior(settings, torch.Generator().manual_seed(0))
    assert prior is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in prior.parameters():
            weight += spread * torch.randn(weight.shape, generator=generator)
    return prior


def noise(rows: int, units: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, units, generator=generator), torch.rand(rows, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_a_density_integrates_to_one_on_a_grid_in_two_dimensions(kind: str) -> None:
    prior, step = disturbed(kind, 2), 0.05
    axis = torch.arange(-14.0, 14.0, step)
    grid_BL = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        integral = prior.log_prob(grid_BL).double().exp().sum().item() * step**2
    assert integral == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("units", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_distributed_as_the_density_says(kind: str, units: int) -> None:
    """E[p'(z) / p(z)] over samples of p is 1 for every density p', here one without heavier tails."""
    prior = disturbed(kind, units, 0.15)
    with torch.no_grad():
        z_BL = prior.sample(*noise(40_000, units))
        mean_L, std_L = z_BL.mean(0), 0.5 * z_BL.std(0)
        log_other_B = gaussian.log_density(z_BL, mean_L, 2 * std_L.log().expand_as(mean_L))
        ratio_B = (log_other_B - prior.log_prob(z_BL)).double().exp()
    error = ratio_B.std().item() / math.sqrt(len(ratio_B))
    assert error < 0.1
    assert abs(ratio_B.mean().item() - 1) < 4 * error + 1e-4


def test_a_mixture_chooses_its_components_by_their_weights() -> None:
    prior = disturbed("mixture", 2)
    assert isinstance(prior, MixturePrior)
    with torch.no_grad():
        prior.log_scale.fill_(-20.0)
        choice_B = torch.linspace(0, 1, 10_001)[:-1]
        z_BL = prior.sample(torch.zeros(len(choice_B), 2), choice_B)
        shares = [(z_BL - mean_L).norm(dim=1).lt(1e-6).float().mean().item() for mean_L in prior.mean]
    assert shares == pytest.approx(torch.softmax(prior.logits, 0).tolist(), abs=1e-3)


@pytest.mark.parametrize("part", ["whitening", "coupling-0", "coupling-1"])
def test_a_map_has_an_inverse_and_the_determinant_of_autograd(part: str) -> None:
    units, generator = 5, torch.Generator().manual_seed(1)
    layer = Whitening(units) if part == "whitening" else Coupling(units, 7, int(part[-1]), generator)
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.5 * torch.randn(weight.shape, generator=generator)
    z_BL = 2 * noise(6, units)[0]
    eps_BL, log_det = layer(z_BL)
    assert not torch.allclose(eps_BL, z_BL, atol=0.1)
    again_BL, other = layer(eps_BL, backwards=True)
    assert torch.allclose(again_BL, z_BL, atol=1e-4)
    assert torch.allclose(other, log_det, atol=1e-5)
    jacobians = [torch.autograd.functional.jacobian(lambda z_L: layer(z_L[None])[0][0], z_L) for z_L in z_BL]
    wanted_B = torch.stack([torch.linalg.slogdet(jacobian)[1] for jacobian in jacobians])
    assert torch.allclose(log_det.expand(6), wanted_B, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_density_is_float32_whatever_the_precision(kind: str) -> None:
    """In bf16 arithmetic a density of 32 units would be wrong by nats."""
    prior = disturbed(kind, 32).to(torch.bfloat16)
    z_BL, choice_B = noise(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        log_p_B, drawn_BL = prior.log_prob(z_BL), prior.sample(z_BL, choice_B)
    exact = disturbed(kind, 32).double()
    with torch.no_grad():
        for weight, rounded in zip(exact.parameters(), prior.parameters(), strict=True):
            weight.copy_(rounded)
    exact = exact.float()
    assert log_p_B.dtype == drawn_BL.dtype == torch.float32
    assert torch.allclose(log_p_B, exact.log_prob(z_BL), atol=1e-3, rtol=1e-5)


def test_a_gaussian_takes_the_moments_that_it_is_given() -> None:
    mean_L = torch.tensor([1.0, -2.0, 0.5])
    root_LL = torch.tensor([[1.0, 0, 0], [0.8, 0.5, 0], [-0.3, 0.2, 2.0]])
    whitening, covariance_LL = Whitening(3), root_LL @ root_LL.T
    whitening.set_moments(mean_L, covariance_LL)
    z_BL = noise(5, 3)[0]
    eps_BL, log_det_1 = whitening(z_BL)
    wanted_B = torch.distributions.MultivariateNormal(mean_L, covariance_LL).log_prob(z_BL)
    assert torch.allclose(gaussian.log_prior(eps_BL) + log_det_1, wanted_B, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_prior_changes_no_other_weight_of_a_model(kind: str) -> None:
    """Or two runs that differ in the prior alone would differ in their start, too."""
    plain, learned = dict(build().named_parameters()), dict(build(prior=kind).named_parameters())
    assert all(torch.equal(weight, learned[name]) for name, weight in plain.items())
    assert {name.split(".")[0] for name in learned.keys() - plain.keys()} == {"prior"}


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_a_learned_prior_begins_as_the_standard_normal(kind: str) -> None:
    model = build(prior=kind)
    z_BL, choice_B = noise(7, UNITS)
    assert torch.allclose(model.log_prior(z_BL), gaussian.log_prior(z_BL), atol=1e-5)
    assert torch.allclose(model.draw_codes(z_BL, choice_B), z_BL, atol=1e-6)


def test_the_pull_of_the_prior_scales_the_gradient_of_the_encoder_alone() -> None:
    """At beta 0, or below the threshold, the prior still learns and the encoder does not feel it."""

    def gradients(pull: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model = build(prior="flow")
        with torch.no_grad():
            model.prior.whitening.mean.fill_(0.5)
        terms = model(**batch(), prior_pull=pull)
        terms.log_p_B.sum().backward()
        assert torch.allclose(terms.log_p_B, model.log_prior(gaussian.sample(terms.mu_BL, terms.logvar_BL, EPS_BL)))
        return terms.log_p_B, model.bottleneck.mu.weight.grad, model.prior.whitening.mean.grad

    (whole_B, mu, mean), (half_B, half_mu, same) = gradients(1.0), gradients(0.5)
    assert torch.equal(whole_B, half_B)
    assert mu.abs().max() > 0
    assert torch.allclose(half_mu, 0.5 * mu, atol=1e-6)
    assert torch.equal(mean, same)
    assert not gradients(0.0)[1].any()


EPS_BL = batch()["eps_BL"]


def test_the_terms_of_a_learned_prior_average_to_its_kl() -> None:
    """log q - log p under N(0, I) as a learned prior: over many samples, the analytic KL."""
    model, data = build(prior="gaussian"), batch()
    with torch.no_grad():
        found = [
            model(**data | {"labels_BT": None, "eps_BL": torch.randn(4, UNITS, generator=generator)})
            for generator in [torch.Generator().manual_seed(2)]
            for _ in range(500)
        ]
    ratio_B = torch.stack([terms.log_q_B - terms.log_p_B for terms in found]).mean(0)
    assert torch.allclose(ratio_B, found[0].kl_BL.sum(1), atol=0.3)
    assert not found[0].rec_B.any(), "no pass of the decoder without labels"
