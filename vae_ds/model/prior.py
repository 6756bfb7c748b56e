"""Learned priors p(z): a full Gaussian, a mixture of diagonal Gaussians, a flow of affine couplings (docs/method.md).

The prior N(0, I) has no weights and is no module: see `T5VAE.log_prior`. Every density is exact and float32, in nats,
for any dtype of the weights and with or without autocast.

A learned prior starts as N(0, I), or near it. It has no buffers: a model is also built without values.

Shapes: B codes, L latent units, C components of a mixture, D hidden units of a coupling.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vae_ds.config import ModelConfig
from vae_ds.model.gaussian import log_density, log_prior
from vae_ds.model.injection import Float32Linear

SENTENCES_PER_UNIT = 10
LARGEST_LOG_SCALE = 2.0  # a coupling multiplies by at most exp(2), so that a step cannot make a density infinite


class Prior(nn.Module):
    """A density of codes. Both directions are calls of the module: there, ZeRO 3 gathers the weights of a module."""

    def log_prob(self, z_BL: Tensor) -> Tensor:
        """log p(z), shape (B,), float32, in nats."""
        found: Tensor = self(z_BL)
        return found

    def sample(self, eps_BL: Tensor, choice_B: Tensor) -> Tensor:
        """Codes (B, L), float32: a function of eps ~ N(0, I) and of `choice_B`, uniform in [0, 1)."""
        found: Tensor = self(eps_BL, choice_B)
        return found

    @torch.no_grad()
    def start_at(self, mu_ML: Tensor, logvar_ML: Tensor, generator: torch.Generator) -> bool:
        """Start a fit at the mixture of M posteriors. Returns whether that is all: a Gaussian has a formula."""
        mean_L = mu_ML.mean(0)
        centred_ML = mu_ML - mean_L
        covariance_LL = centred_ML.T @ centred_ML / len(mu_ML) + torch.diag(logvar_ML.exp().mean(0))
        return self._start(mu_ML, mean_L, covariance_LL, generator)

    def _start(self, mu_ML: Tensor, mean_L: Tensor, covariance_LL: Tensor, generator: torch.Generator) -> bool:
        raise NotImplementedError

    def forward(self, values_BL: Tensor, choice_B: Tensor | None = None) -> Tensor:
        """`log_prob` of codes or, with `choice_B`, the `sample` of noise."""
        with torch.autocast(values_BL.device.type, enabled=False):
            return self._log_prob(values_BL.float()) if choice_B is None else self._draw(values_BL.float(), choice_B)

    def _log_prob(self, z_BL: Tensor) -> Tensor:
        raise NotImplementedError

    def _draw(self, eps_BL: Tensor, choice_B: Tensor) -> Tensor:
        raise NotImplementedError


class Whitening(nn.Module):
    """The map eps = D^-1 U (z - m) with U unit lower triangular and D diagonal: z is then N(m, S) with a full S.

    `lower` has the entries of U below its diagonal; the others are not used.
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(units))
        self.log_scale = nn.Parameter(torch.zeros(units))
        self.lower = nn.Parameter(torch.zeros(units, units))

    def forward(self, values_BL: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
        """z to eps, or `backwards` eps to z, (B, L), and the log determinant of the Jacobian of z to eps, (1,)."""
        mean_L, log_scale_L = self.mean.float(), self.log_scale.float()
        unit_LL = self.lower.float().tril(-1) + torch.eye(len(mean_L), device=mean_L.device)
        if backwards:
            scaled_BL = values_BL * log_scale_L.exp()
            solved_LB = torch.linalg.solve_triangular(unit_LL, scaled_BL.T, upper=False, unitriangular=True)
            return solved_LB.T + mean_L, -log_scale_L.sum(-1, keepdim=True)
        return (values_BL - mean_L) @ unit_LL.T * torch.exp(-log_scale_L), -log_scale_L.sum(-1, keepdim=True)

    @torch.no_grad()
    def set_moments(self, mean_L: Tensor, covariance_LL: Tensor) -> None:
        """Make z ~ N(mean, covariance). Raises torch.linalg.LinAlgError if the matrix is not positive definite."""
        root_LL = torch.linalg.cholesky(covariance_LL.double())
        scale_L = root_LL.diagonal()
        eye_LL = torch.eye(len(scale_L), dtype=torch.float64, device=scale_L.device)
        inverse_LL = torch.linalg.solve_triangular(root_LL, eye_LL, upper=False)
        self.mean.copy_(mean_L)
        self.log_scale.copy_(scale_L.log())
        self.lower.copy_((scale_L[:, None] * inverse_LL).tril(-1))


class Coupling(nn.Module):
    """An affine coupling (Dinh et al. 2017): every other unit is scaled and shifted by a function of the rest.

    The function is a network with two hidden layers. It starts as 0, so the coupling starts as the identity.
    """

    def __init__(self, units: int, width: int, parity: int, generator: torch.Generator) -> None:
        """`parity` 0 changes the units 1, 3, ..., and 1 changes the units 0, 2, ..."""
        super().__init__()
        self.parity = parity
        kept = len(range(parity, units, 2))
        self.first = _layer(kept, width, 1 / math.sqrt(kept), generator)
        self.second = _layer(width, width, 1 / math.sqrt(width), generator)
        self.last = _layer(width, 2 * (units - kept), 0.0, generator)

    def forward(self, values_BL: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
        """z to eps, or `backwards` eps to z, (B, L), and the log determinant of the Jacobian of z to eps, (B,)."""
        own = slice(1 - self.parity, None, 2)
        kept_BX = values_BL[:, self.parity :: 2]
        hidden_BD = functional.silu(self.second(functional.silu(self.first(kept_BX))))
        raw_BX, shift_BX = self.last(hidden_BD).chunk(2, dim=-1)
        log_scale_BX = LARGEST_LOG_SCALE * torch.tanh(raw_BX / LARGEST_LOG_SCALE)
        moved_BL = values_BL.clone()
        if backwards:
            moved_BL[:, own] = (values_BL[:, own] - shift_BX) * torch.exp(-log_scale_BX)
        else:
            moved_BL[:, own] = values_BL[:, own] * log_scale_BX.exp() + shift_BX
        return moved_BL, log_scale_BX.sum(-1)


class GaussianPrior(Prior):
    """N(m, S) with a full covariance matrix."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.whitening = Whitening(units)

    def _start(self, mu_ML: Tensor, mean_L: Tensor, covariance_LL: Tensor, generator: torch.Generator) -> bool:
        self.whitening.set_moments(mean_L, covariance_LL)
        return True

    def _log_prob(self, z_BL: Tensor) -> Tensor:
        eps_BL, log_det_1 = self.whitening(z_BL)
        return log_prior(eps_BL) + log_det_1

    def _draw(self, eps_BL: Tensor, choice_B: Tensor) -> Tensor:
        z_BL: Tensor = self.whitening(eps_BL, backwards=True)[0]
        return z_BL


class FlowPrior(Prior):
    """A RealNVP (Dinh et al. 2017): z is whitened, then a chain of couplings maps it to eps ~ N(0, I).

    A code of one unit has no other unit to condition on: its flow is a Gaussian.
    """

    def __init__(self, units: int, couplings: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.whitening = Whitening(units)
        count = couplings if units > 1 else 0
        self.couplings = nn.ModuleList(Coupling(units, width, number % 2, generator) for number in range(count))

    def _start(self, mu_ML: Tensor, mean_L: Tensor, covariance_LL: Tensor, generator: torch.Generator) -> bool:
        self.whitening.set_moments(mean_L, covariance_LL)
        return not self.couplings

    def _log_prob(self, z_BL: Tensor) -> Tensor:
        eps_BL, log_det = self.whitening(z_BL)
        for coupling in self.couplings:
            eps_BL, log_det_B = coupling(eps_BL)
            log_det = log_det + log_det_B
        return log_prior(eps_BL) + log_det

    def _draw(self, eps_BL: Tensor, choice_B: Tensor) -> Tensor:
        z_BL = eps_BL
        for coupling in reversed(self.couplings):
            z_BL, _ = coupling(z_BL, backwards=True)
        z_BL, _ = self.whitening(z_BL, backwards=True)
        return z_BL


class MixturePrior(Prior):
    """A mixture of C Gaussians with diagonal covariance matrices."""

    def __init__(self, units: int, components: int, generator: torch.Generator) -> None:
        """The means are drawn from N(0, 1/4): components that start equal would stay equal."""
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.mean = nn.Parameter(torch.randn(components, units, generator=generator) / 2)
        self.log_scale = nn.Parameter(torch.zeros(components, units))

    def _start(self, mu_ML: Tensor, mean_L: Tensor, covariance_LL: Tensor, generator: torch.Generator) -> bool:
        row_C = torch.randint(len(mu_ML), (len(self.mean),), generator=generator).to(mu_ML.device)
        self.mean.copy_(mu_ML[row_C])
        # So that the components together fill about the volume of one Gaussian.
        shrunk = math.log(len(self.mean)) / len(mean_L)
        self.log_scale.copy_((0.5 * covariance_LL.diagonal().log() - shrunk).expand_as(self.log_scale))
        return False

    def _log_prob(self, z_BL: Tensor) -> Tensor:
        logvar_CL = 2.0 * self.log_scale.float()
        log_density_BC = log_density(z_BL[:, None], self.mean.float(), logvar_CL)
        return torch.logsumexp(log_density_BC + functional.log_softmax(self.logits.float(), 0), 1)

    def _draw(self, eps_BL: Tensor, choice_B: Tensor) -> Tensor:
        ends_C = functional.softmax(self.logits.double(), 0).cumsum(0)
        # Rounding can leave the last end below a choice.
        component_B = torch.searchsorted(ends_C, choice_B.double(), right=True).clamp(max=len(ends_C) - 1)
        return self.mean.float()[component_B] + self.log_scale.float()[component_B].exp() * eps_BL


def make_prior(settings: ModelConfig, generator: torch.Generator) -> Prior | None:
    """The prior of a recipe, float32 on the CPU, drawn from `generator` only; None for N(0, I)."""
    units = settings.latent_dim
    if settings.prior == "gaussian":
        return GaussianPrior(units)
    if settings.prior == "mixture":
        return MixturePrior(units, settings.prior_components, generator)
    if settings.prior == "flow":
        return FlowPrior(units, settings.prior_couplings, settings.prior_width, generator)
    return None


def least_sentences(units: int) -> int:
    """The fewest training sentences that a prior is fitted to: with fewer, it describes them and no others."""
    return SENTENCES_PER_UNIT * units


def _layer(inputs: int, outputs: int, std: float, generator: torch.Generator) -> Float32Linear:
    """A linear layer with a bias of 0 and a weight drawn from N(0, std^2)."""
    # On the meta device, because torch's initial values would advance the global generator.
    layer = Float32Linear(inputs, outputs, device="meta")
    layer.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator) * std)
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer
