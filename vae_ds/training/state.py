"""What changes during a run: the one record that every checkpoint carries beside weights and moments."""

from dataclasses import dataclass, field

from vae_ds.training.aggressive import Aggressive


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
    best: float | None = None  # lowest valid nelbo so far
    best_kept: float | None = None  # best score of a validation by `checkpoint.keep_best`
    window: dict[str, float] = field(default_factory=dict)  # sums since the last logged row

    def begin_phase(self, index: int) -> None:
        """Reset what belongs to one phase alone."""
        self.phase, self.place = index, [0, 0, 0]
        self.step, self.skipped_in_row = 0, 0
        self.beta, self.held_kl, self.aggressive, self.window = None, None, None, {}

    def __post_init__(self) -> None:
        if isinstance(self.aggressive, dict):  # read from a checkpoint's JSON
            self.aggressive = Aggressive(**self.aggressive)
