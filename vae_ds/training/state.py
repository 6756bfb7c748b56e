"""What changes during a run: the one record that every checkpoint carries beside weights and moments."""

from dataclasses import dataclass, field
from typing import Any, Self

from vae_ds.training.aggressive import Aggressive
from vae_ds.training.choice import Choice


@dataclass
class TrainState:
    """Where a run is. Everything else that a step reads is frozen, or is a weight or a moment."""

    phase: int = 0
    place: list[int] = field(default_factory=lambda: [0, 0, 0])  # of the next global batch: epoch, window, number
    step: int = 0  # applied optimizer steps in this phase
    bad_lines: int = 0  # lines of a stream that were skipped in all phases, with the window of `place` if it has begun
    skipped: int = 0
    skipped_in_row: int = 0
    beta: float | None = None  # the state of the schedule `target`
    aggressive: Aggressive | None = None  # the alternation of a phase with `aggressive`
    held_kl: list[float] | None = None  # global mean KL of each unit at the last step
    choice: Choice | None = None  # in the last phase with `export: best`: the validation that model/ contains
    best_kept: float | None = None  # best score of a validation by `checkpoint.keep_best`
    window: dict[str, float] = field(default_factory=dict)  # sums since the last logged row

    def begin_phase(self, index: int) -> None:
        """Reset what belongs to one phase alone."""
        self.phase, self.place = index, [0, 0, 0]
        self.step, self.skipped_in_row = 0, 0
        self.beta, self.held_kl, self.aggressive, self.window = None, None, None, {}
        self.choice = None

    def count_skipped(self, limit: int) -> None:
        """Count a skipped step. Raises RuntimeError for the one that makes `limit` in a row."""
        self.skipped += 1
        self.skipped_in_row += 1
        if self.skipped_in_row >= limit:
            raise RuntimeError(f"{limit} steps in a row had non-finite gradients and were skipped; try a lower lr")

    def __post_init__(self) -> None:
        if isinstance(self.aggressive, dict):  # read from a checkpoint's JSON
            self.aggressive = Aggressive(**self.aggressive)
        if isinstance(self.choice, dict):
            self.choice = Choice(**self.choice)

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Self:
        """The state in a checkpoint's JSON.

        Version 0.2 stored the lowest nelbo of all phases as `best` and no `choice`. It does not say which model that
        was, so the choice begins anew.
        """
        return cls(**{key: value for key, value in stored.items() if key != "best"})
