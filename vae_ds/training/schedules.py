"""Schedules of the KL weight beta and of the learning rate: functions of the applied optimizer step.

A skipped step (non-finite gradients) is not applied and advances no schedule. Steps count from 0 in each phase: the
first update of a phase uses `at(0)`. Only the schedule `Target` has state: one number, which the caller carries from
step to step and stores in checkpoints.

A phase has a *final beta*: the beta of its last update, `at(total_steps - 1)`. A validation after `done` applied steps
is at the beta of the last of them, `at(done - 1)`: the one that its weights were trained with. `is_final` says whether
that is the final beta. So the validation that ends a phase always is, and a rise over N steps is over for a validation
after N + 1 steps, whose last update was the first with the final beta.
"""

import math
from dataclasses import dataclass

NEAR = 0.1  # relative distance from its target at which a KL counts as reached


@dataclass(frozen=True)
class Constant:
    """Beta is always `value`."""

    value: float

    def at(self, step: int, carried: float | None = None) -> float:
        return self.value

    def final(self) -> float | None:
        """The beta of the last update."""
        return self.value

    def is_final(self, done: int, kl_nats: float | None = None) -> bool:
        """Whether a validation after `done` >= 1 applied steps is at the final beta: from the start."""
        return True


@dataclass(frozen=True)
class Linear:
    """Beta rises from `start` to `max` over `over_steps` steps, then stays (Park & Lee 2021, equation 6).

    `total_steps` is the length of the phase. If the rise is longer, only the validation at the end is at the final
    beta: all others are at a lower one.
    """

    max: float
    over_steps: float
    total_steps: int
    start: float = 0.0

    def at(self, step: int, carried: float | None = None) -> float:
        return self.start + (self.max - self.start) * min(1.0, step / self.over_steps)

    def final(self) -> float | None:
        """The beta of the last update."""
        return self.at(self.total_steps - 1)

    def is_final(self, done: int, kl_nats: float | None = None) -> bool:
        """Whether a validation after `done` >= 1 applied steps is at the final beta."""
        return self.at(done - 1) == self.final()


@dataclass(frozen=True)
class Cyclical:
    """Cycles of equal length: zero, then a linear ramp to `max`, then hold (Fu et al. 2019, section 3.2)."""

    max: float
    total_steps: int
    cycles: int
    zero: float
    ramp: float

    def at(self, step: int, carried: float | None = None) -> float:
        length = self.total_steps / self.cycles
        place = min(step, self.total_steps - 1) % length / length
        if place < self.zero:
            return 0.0
        if self.ramp == 0.0:
            return self.max
        return self.max * min(1.0, (place - self.zero) / self.ramp)

    def final(self) -> float | None:
        """The beta of the last update."""
        return self.at(self.total_steps - 1)

    def is_final(self, done: int, kl_nats: float | None = None) -> bool:
        """Whether a validation after `done` >= 1 applied steps is at the final beta: in the hold part of each cycle."""
        return self.at(done - 1) == self.final()


@dataclass(frozen=True)
class Target:
    """Beta is controlled so that the raw KL reaches `kl` nats: it rises while the KL is higher, else it falls.

    Integral control on the relative error, which is at least -1, since a KL is not negative, and is clipped to at most
    1. Beta stays in [0, `max`]. It has no final beta: the KL has a final value instead, the target.
    """

    kl: float
    start: float
    rate: float
    max: float

    def at(self, step: int, carried: float | None = None) -> float:
        return self.start if carried is None else carried

    def final(self) -> float | None:
        """None: beta changes to the end."""
        return None

    def is_final(self, done: int, kl_nats: float | None = None) -> bool:
        """Whether a validation has reached the target: its KL is within NEAR of it, or the model has no code (None)."""
        return kl_nats is None or abs(kl_nats / self.kl - 1.0) <= NEAR

    def carry(self, beta: float, kl_nats: float) -> float:
        """Beta of the next step, from this step's beta and raw KL (nats a sentence, global batch mean)."""
        error = min(1.0, kl_nats / self.kl - 1.0)
        return min(self.max, max(0.0, beta + self.rate * error))


Beta = Constant | Linear | Cyclical | Target


@dataclass(frozen=True)
class LearningRate:
    """A linear warm-up to `peak`, then `constant`, `linear` or `cosine` decay to `final * peak` at `total_steps`."""

    schedule: str
    peak: float
    warmup_steps: int
    total_steps: int
    final: float

    def at(self, step: int) -> float:
        """The rate of update number `step` (from 0). It is above 0 at the first update of a warm-up, too."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        shape = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.peak * (self.final + (1.0 - self.final) * shape)
