"""Schedules of the KL weight beta and of the learning rate: functions of the applied optimizer step.

A skipped step (non-finite gradients) is not applied and advances no schedule. Steps count from 0 in each phase: the
first update of a phase uses `at(0)`. Only the schedule `Target` has state: one number, which the caller carries from
step to step and stores in checkpoints.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """Beta is always `value`."""

    value: float

    def at(self, step: int, carried: float | None = None) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """Beta rises from `start` to `max` over `over_steps` steps, then stays (Park & Lee 2021, equation 6)."""

    max: float
    over_steps: float
    start: float = 0.0

    def at(self, step: int, carried: float | None = None) -> float:
        return self.start + (self.max - self.start) * min(1.0, step / self.over_steps)


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


@dataclass(frozen=True)
class Target:
    """Beta is controlled so that the raw KL reaches `kl` nats: it rises while the KL is higher, else it falls.

    Integral control on the relative error, which is clipped to [-1, 1]. Beta stays in [0, `max`].
    """

    kl: float
    start: float
    rate: float
    max: float

    def at(self, step: int, carried: float | None = None) -> float:
        return self.start if carried is None else carried

    def carry(self, beta: float, kl_nats: float) -> float:
        """Beta of the next step, from this step's beta and raw KL (nats a sentence, global batch mean)."""
        error = min(1.0, max(-1.0, kl_nats / self.kl - 1.0))
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
