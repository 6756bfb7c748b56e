"""The loss of one micro batch, and the sums that a step reports (docs/method.md, The loss; Learned priors).

With a learned prior, the KL is a sample: log q(z|x) - log p(z). Its gradient has two factors: beta, or 0 below the
threshold, for what z depends on, and 1 for the weights of the prior. So the prior learns the density of the codes at
any beta.

Shapes: B sentences of a micro batch, L latent units. All quantities are in nats.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vae_ds.config import FreeBits
from vae_ds.model import PriorTerms, Terms, gaussian


@dataclass(frozen=True)
class StepSettings:
    """What the phase and its schedules say for one optimizer step, and the sentences of its global batch."""

    sentences: int
    free_bits: FreeBits
    beta: float
    lr: float
    half: str | None  # the half of the model that the step updates, None for all of it (aggressive.py)
    held_L: torch.Tensor | None  # global mean KL of each unit to N(0, I) at the last step
    held_nats: float | None = None  # the sum of held_L, on the host
    decodes: bool = True  # False: the phase fits the prior alone, and no pass of the decoder is needed

    @property
    def is_held(self) -> bool:
        """With a learned prior: whether the KL is below the threshold, so that the encoder does not feel it."""
        nats = self.free_bits.nats
        is_low = self.held_nats is not None and not self.held_nats > nats
        return self.free_bits.mode == "total_batch" and nats > 0 and is_low

    @property
    def prior_pull(self) -> float:
        """The factor of a learned prior's gradient for z; it has no effect on N(0, I)."""
        return 0.0 if self.is_held else self.beta


class Loss(NamedTuple):
    """`loss`: what is differentiated, summed over the sentences. `sums`: what the step reports, without gradient."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


def loss_of(terms: Terms | PriorTerms, weight_B: torch.Tensor, now: StepSettings) -> Loss:
    """The loss rec + beta * KL of a micro batch, in which a sentence counts `weight_B` times."""
    rec_B = weight_B * terms.rec_B
    kl_L = (weight_B[:, None] * terms.kl_BL.detach()).sum(0)
    if not isinstance(terms, PriorTerms):
        penalty_B = weight_B * gaussian.thresholded_kl(terms.kl_BL, now.free_bits.mode, now.free_bits.nats, now.held_L)
        loss_B = rec_B + now.beta * penalty_B
        sums = {"loss": loss_B, "rec": rec_B, "penalty": penalty_B}
        return Loss(loss_B.sum(), _totals(sums) | {"kl_L": kl_L})
    kl_B = weight_B * (terms.log_q_B - terms.log_p_B)
    penalty_B = weight_B * now.free_bits.nats if now.is_held else kl_B
    # log p(z) has its factor for z already: T5VAE.forward puts it there.
    felt_B = weight_B * (now.prior_pull * terms.log_q_B - terms.log_p_B)
    told_B = rec_B + now.beta * penalty_B if now.decodes else kl_B
    sums = {"loss": told_B, "rec": rec_B, "penalty": penalty_B, "kl_sampled": kl_B}
    return Loss((rec_B + felt_B).sum(), _totals(sums) | {"kl_L": kl_L})


def sizes_of_sums(units: int, has_prior: bool) -> dict[str, int]:
    """The number of values of each of the `sums`."""
    return {"loss": 1, "rec": 1, "penalty": 1, "kl_L": units} | ({"kl_sampled": 1} if has_prior else {})


def _totals(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value_B.detach().sum() for name, value_B in values.items()}
