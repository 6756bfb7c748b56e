"""What `status.json` says of a training: its state, how far it is, what is left."""

import time
from pathlib import Path
from typing import Any

from vae_ds.distributed import Ranks
from vae_ds.runtime import records
from vae_ds.training.phases import PhasePlan
from vae_ds.training.state import TrainState

# Metrics of the last validation that a status repeats.
SHOWN_METRICS = ("nelbo", "rec", "kl", "mi", "au", "z_gain", "verdict", "cost")


class Status:
    """Writes `status.json` on rank 0; on other ranks it does nothing.

    The file has the phase by name and number, the step of the phase and of the run, the epoch, the seconds left, the
    last validation, what model/ contains, the newest checkpoint, and the skipped bad lines of a stream.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, plans: list[PhasePlan]) -> None:
        self._run_dir, self._ranks, self._plans = run_dir, ranks, plans
        self._epoch: float | None = None
        self._validation: dict[str, Any] | None = None
        self._export: dict[str, Any] | None = None
        self._began_s, self._began_step = time.monotonic(), 0

    def begin_phase(self, state: TrainState) -> None:
        """The pace, from which the seconds left follow, is measured from here on."""
        self._began_s, self._began_step = time.monotonic(), self._step(state)

    def validated(self, step: int, metrics: dict[str, Any]) -> None:
        """Remember the metrics of a validation at `step` of the run."""
        self._validation = {"step": step} | {key: metrics.get(key) for key in SHOWN_METRICS}

    def exported(self, facts: dict[str, Any]) -> None:
        """Remember what model/ contains and why: `choice.facts`."""
        self._export = facts

    def write(
        self,
        word: str,
        state: TrainState,
        *,
        reason: str | None = None,
        epoch: float | None = None,
        checkpoint: str | None = None,
        code: int | None = None,
    ) -> None:
        """Write the file. `word` is running, stopped, failed or done; `checkpoint` the name of the newest one.

        `code` is the exit code, None for the usual one of the state.
        """
        if not self._ranks.is_main:
            return
        self._epoch = self._epoch if epoch is None else epoch
        plan = self._plans[state.phase]
        records.write_status(
            self._run_dir,
            word,
            reason=reason,
            phase=plan.name,
            phase_number=plan.index + 1,
            phases=len(self._plans),
            phase_step=state.step,
            phase_steps=plan.steps,
            step=self._step(state),
            total_steps=self._total,
            epoch=self._epoch,
            seconds_left=self._seconds_left(state) if word == "running" else None,
            validation=self._validation,
            export=self._export,
            checkpoint=checkpoint,
            exit_code=code,
            bad_lines=state.bad_lines,
        )

    @property
    def _total(self) -> int:
        return sum(plan.steps for plan in self._plans)

    def _step(self, state: TrainState) -> int:
        return self._plans[state.phase].first_step + state.step

    def _seconds_left(self, state: TrainState) -> float | None:
        """By the mean pace since this process began the phase, validations and checkpoints included."""
        done = self._step(state) - self._began_step
        if done <= 0:
            return None
        return round((time.monotonic() - self._began_s) / done * (self._total - self._step(state)), 1)
