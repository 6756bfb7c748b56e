"""Aggressive training: the encoder catches up before each step of the decoder, until it lags no more.

He et al. 2019, "Lagging Inference Networks and Posterior Collapse in Variational Autoencoders", algorithm 1: encoder
steps until the loss of a stretch of them is above that of the one before, then one step of the decoder; for good once
the mutual information of the validation stops rising. Every step of either counts as a step of the phase, so that the
phase costs what it says.
"""

from dataclasses import dataclass

from vae_ds.config import AggressiveConfig
from vae_ds.training.phases import group_of

ENCODER, DECODER = "encoder", "decoder"


@dataclass
class Aggressive:
    """Where the alternation stands; goes into each checkpoint. Losses are in nats, summed over a stretch's tokens."""

    is_on: bool = True
    turn: str = ENCODER
    taken: int = 0  # encoder steps since the decoder's last
    loss: float = 0.0
    tokens: float = 0.0
    before: float | None = None  # nats a token of the last stretch
    best_mi: float | None = None  # of the validations so far

    def half(self) -> str | None:
        """Which half of the model the next step updates; None: all of it."""
        return self.turn if self.is_on else None

    def after_step(self, settings: AggressiveConfig, loss_nats: float, tokens: float) -> None:
        """An applied step, with its loss summed over the global batch: whose turn is next."""
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
        """End it once the mutual information, in nats, is below the best so far."""
        if mi is None:
            return
        if self.best_mi is not None and mi < self.best_mi:
            self.is_on = False
        self.best_mi = mi if self.best_mi is None else max(mi, self.best_mi)


def half_of(name: str) -> str:
    """The half of a parameter of T5VAE: q(z|x) is the encoder's, p(x|z) the decoder's with the shared embeddings."""
    return ENCODER if group_of(name) in ("encoder", "bottleneck") else DECODER
