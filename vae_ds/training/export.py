"""model/ of a run: what is exported when, and why. The rule is in choice.py.

Every method that moves weights is a collective. Ranks decide alike, because the metrics of a validation, and so the
choice, are the same on each; rank 0 alone uses the disk.
"""

from collections.abc import Mapping
from typing import Any

from vae_ds import distributed
from vae_ds.config import portable
from vae_ds.engine import PhaseEngine, whole
from vae_ds.errors import CheckpointError
from vae_ds.model import MAX_TOKENS, T5VAE, read_export
from vae_ds.sharing import RECIPE, write_card
from vae_ds.training import base_weights, choice
from vae_ds.training.build import Weights, first_weights
from vae_ds.training.choice import Choice
from vae_ds.training.handover import Start
from vae_ds.training.phases import PhasePlan
from vae_ds.training.preparation import Setup
from vae_ds.training.saver import write_on_main
from vae_ds.training.state import TrainState
from vae_ds.training.status import Status

ORIGIN = "origin"  # the key of `choice.facts` in model/config.json


class Exporter:
    """Writes model/ of a run, and says in its status what model/ contains.

    With `export: best`, model/ appears with the first validation that can be chosen, and each better one replaces it;
    with `export: last`, or if none can be chosen, at the end of the run. An export costs:

    - a gather of each weight, one at a time, without the moments, by all ranks; the last weights are read from their
      checkpoint instead, and what it leaves out (base_weights.py) from the base;
    - 8 bytes of host memory per parameter on rank 0, 24 GB for 3 billion: the weights, and the bytes of the file;
    - writing 4 bytes per parameter, while the other ranks wait.

    So it happens only if a validation is better than all before it, and once more at the end if there was none.
    """

    def __init__(self, setup: Setup, status: Status) -> None:
        self._setup, self._status = setup, status

    def begin(self, plan: PhasePlan) -> Choice | None:
        """The choice at the beginning of a phase; None if the validations of this phase do not compete for model/."""
        is_last = plan.index == len(self._setup.plans) - 1
        return Choice.begin(plan, len(self._setup.valid)) if is_last and self._setup.config.export == "best" else None

    def resume(self, plan: PhasePlan, saved: Choice | None) -> Choice | None:
        """The choice of a run that continues in a phase, with the one that its checkpoint stores. A collective."""
        begun = self.begin(plan)
        if begun is None:
            return None
        found = begun.resumed(saved, self._origin())
        if found.step is not None:
            self._tell(found)
        return found

    def validated(self, plan: PhasePlan, engine: PhaseEngine, state: TrainState, metrics: Mapping[str, Any]) -> None:
        """Export the weights if this validation is the best so far. A collective."""
        if state.choice is None:
            return
        before = state.choice.step, state.choice.nelbo
        is_best = state.choice.takes(plan, state.step, metrics)
        if is_best and not self._write(Start(gathered=engine.weights(on_main=True)), state.choice, must=False):
            # What could not be written is not chosen: the next one that is better than model/ is tried.
            state.choice.step, state.choice.nelbo = before
        if state.choice.step is not None:
            self._tell(state.choice)

    def gather(self, engine: PhaseEngine, state: TrainState, is_last: bool) -> Weights:
        """The weights at the end of a phase whose checkpoint could not be written. A collective.

        Whole on every rank, for the next phase. After the last phase, for `finish`, on rank 0 alone; none if model/ is
        chosen.
        """
        if is_last:
            return {} if _is_chosen(state) else engine.weights(on_main=True)
        return engine.weights()

    def finish(self, end: Start, state: TrainState) -> None:
        """Export the last weights, which rank 0 can read, unless a validation is chosen. A collective."""
        if not _is_chosen(state):
            self._write(end, state.choice, must=True)
        self._tell(state.choice)

    def _write(self, end: Start, chosen: Choice | None, must: bool) -> bool:
        """Write model/ on rank 0. Returns on every rank whether it was written (`write_on_main`). A collective."""
        setup = self._setup
        target = setup.run_dir / "model"

        def write() -> None:
            model = T5VAE.mapped(setup.config.model, setup.config.seed)
            try:
                if end.gathered is None:
                    weights = first_weights(model, end.source)
                    base_weights.check(weights, end, setup.config.model)
                    read = {name: whole(weights, name) for name in weights.shapes}
                else:
                    read = dict(end.gathered)
            except CheckpointError as error:
                raise OSError(str(error)) from None  # told to the other ranks, which wait
            facts = {ORIGIN: self._facts(chosen), MAX_TOKENS: setup.config.data.max_tokens}
            notes = facts | {RECIPE: portable(setup.config)}
            model.save_pretrained(target, setup.tokenizer, read, notes, complete=write_card)

        return write_on_main(target, write, setup.ranks, must)

    def _tell(self, chosen: Choice | None) -> None:
        self._status.exported(self._facts(chosen))

    def _facts(self, chosen: Choice | None) -> dict[str, Any]:
        end = self._setup.plans[-1]
        return choice.facts(chosen, end.first_step + end.steps)

    def _origin(self) -> dict[str, Any] | None:
        """What model/ says of itself, equal on every rank. None without model/, or for one of version 0.2."""
        found = None
        if self._setup.ranks.is_main:
            try:
                found = read_export(self._setup.run_dir / "model").get(ORIGIN)
            except CheckpointError:
                found = None
        return distributed.broadcast_object(found)


def _is_chosen(state: TrainState) -> bool:
    return state.choice is not None and state.choice.step is not None
