"""Aggressive training: several encoder steps before each decoder step, as long as the encoder lags behind.

He et al. 2019, "Lagging Inference Networks and Posterior Collapse in Variational Autoencoders", algorithm 1. The
encoder takes steps until the mean loss of a stretch of them exceeds that of the previous stretch; then the decoder
takes one step. The alternation ends when the mutual information of the validation stops rising. Each step of either
half counts as a step of the phase, so the cost of a phase is its number of steps.
"""

from dataclasses import dataclass

from vae_ds.config import AggressiveConfig
from vae_ds.training.phases import group_of

ENCODER, DECODER = "encoder", "decoder"


@dataclass
class Aggressive:
    """The state of the alternation, stored in each checkpoint. Losses are in nats, summed over a stretch of steps."""

    is_on: bool = True
    turn: str = ENCODER
    taken: int = 0  # encoder steps since the decoder's last
    loss: float = 0.0
    tokens: float = 0.0
    before: float | None = None  # nats a token of the last stretch
    best_mi: float | None = None  # of the validations so far

    def half(self) -> str | None:
        """The half of the model that the next step updates; None is the whole model."""
        return self.turn if self.is_on else None

    def after_step(self, settings: AggressiveConfig, loss_nats: float, tokens: float) -> None:
        """Record an applied step, with its loss summed over the global batch, and decide whose turn is next."""
        if self.turn == DECODER:
            self.turn, self.taken, self.loss, self.tokens, self.before = ENCODER, 0, 0.0, 0.0, None
            return
        self.taken += 1
        self.loss += loss_nats
        self.tokens += tokens
        has_converged = self.taken >= settings.inner_steps
        if self.taken % settings.check_every == 0:
            mean = self.loss / self.tokens
            has_converged = has_converged or (self.before is not None and mean > self.before)
            self.loss, self.tokens, self.before = 0.0, 0.0, mean
        if has_converged:
            self.turn = DECODER

    def after_validation(self, mi: float | None) -> None:
        """End the alternation if the mutual information, in nats, is below the best so far."""
        if mi is None:
            return
        if self.best_mi is not None and mi < self.best_mi:
            self.is_on = False
        self.best_mi = mi if self.best_mi is None else max(mi, self.best_mi)


def half_of(name: str) -> str:
    """The half of a parameter of T5VAE: the encoder for q(z|x), the decoder for p(x|z) and the shared embeddings."""
    return ENCODER if group_of(name) in ("encoder", "bottleneck") else DECODER
