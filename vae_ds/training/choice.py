"""Which weights become model/ with `export: best`.

They are those of the validation with the lowest nelbo, among the validations of the last phase that are at its final
beta (schedules.py) and whose verdict is `uses z`. Otherwise a collapsed model would win, whose nelbo is often the
lowest, or a model of a warm-up, which is trained without the KL. Without such a validation they are the last weights. A
plain language model has no z: there the lowest nelbo at the final beta wins.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from vae_ds.training.phases import PhasePlan

USED, PLAIN = "uses z", "language model"  # the verdicts (evaluation/verdict.py) that can be chosen


@dataclass
class Choice:
    """The choice so far. Each checkpoint stores it. It is the same on every rank, as the metrics of a validation are.

    Only validations of one `phase` (from 0), at one `beta` (None: a schedule without a final one) and on one number of
    `sentences` are compared.
    """

    phase: int
    beta: float | None
    sentences: int
    step: int | None = None  # of the run, of the validation that is in model/; None: there is none yet
    nelbo: float | None = None  # its nelbo, nats per sentence
    verdicts: dict[str, int] = field(default_factory=dict)  # validations at the final beta, by verdict

    @classmethod
    def begin(cls, plan: PhasePlan, sentences: int) -> Self:
        """The choice before the first validation of the last phase. `sentences` is the size of the validation."""
        return cls(plan.index, plan.beta.final(), sentences)

    def resumed(self, saved: "Choice | None", origin: Mapping[str, Any] | None) -> "Choice":
        """The choice of a run that continues; `self` is the one at the beginning of its last phase.

        `saved` is of the checkpoint. It is dropped if its validations do not compare with those to come: the run is
        longer and the last phase is another one, or the final beta is, or the number of sentences has changed. A final
        beta that a longer phase has too stays comparable.

        `origin` (see `facts`) says what model/ contains, and so decides what the choice is. A run that was killed after
        an export and before the next checkpoint has a model/ that is newer than `saved`. Without model/, or with one
        that does not compare, the choice begins anew.
        """
        if saved is None or not self._compares_with(asdict(saved)):
            return self
        if origin is None or not self._compares_with(origin):
            return self if saved.step is not None else saved
        return replace(saved, step=origin["step"] if origin["nelbo"] is not None else None, nelbo=origin["nelbo"])

    def takes(self, plan: PhasePlan, done: int, metrics: Mapping[str, Any]) -> bool:
        """Whether a validation after `done` applied steps of the phase is the best so far; the choice is then it."""
        if not plan.beta.is_final(done, metrics.get("kl")):
            return False
        word, nelbo = metrics.get("verdict") or "without a verdict", metrics["nelbo"]
        if not math.isfinite(nelbo):
            word = "without a finite nelbo"
        self.verdicts[word] = self.verdicts.get(word, 0) + 1
        if word not in (USED, PLAIN) or (self.nelbo is not None and nelbo >= self.nelbo):
            return False
        self.step, self.nelbo = plan.first_step + done, nelbo
        return True

    def reason(self) -> str:
        """What model/ is, and why, in one sentence."""
        if self.step is None or self.nelbo is None:
            place = "near the target KL" if self.beta is None else "at the final beta"
            found = ", ".join(f"{count} {word}" for word, count in self.verdicts.items())
            if not found:
                return f"model/ has the last weights: no validation {place} was compared"
            return f"model/ has the last weights: no validation {place} used z ({found})"
        rivals = self.verdicts.get(USED, 0) + self.verdicts.get(PLAIN, 0)
        that = "" if PLAIN in self.verdicts else " that use z" if rivals > 1 else " that uses z"
        rank = f"the best of {rivals}{that}" if rivals > 1 else f"the only one{that}"
        return f"model/ is the validation of step {self.step:,} (nelbo {self.nelbo:.2f}, {rank})"

    def _compares_with(self, other: Mapping[str, Any]) -> bool:
        return all(other.get(key) == getattr(self, key) for key in ("phase", "beta", "sentences"))


def facts(choice: Choice | None, last_step: int) -> dict[str, Any]:
    """What `status.json` and model/config.json say of model/: its `step` of the run, its `nelbo`, and the `reason`.

    `choice` is None with `export: last`. `nelbo` is None if model/ has the last weights, those of `last_step`.
    """
    if choice is None:
        return {"step": last_step, "nelbo": None, "reason": "model/ has the last weights, as `export: last` asks"}
    told = asdict(choice) | {"reason": choice.reason()}
    return told if choice.step is not None else told | {"step": last_step}
