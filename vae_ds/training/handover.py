"""What a phase starts from, and how one phase hands its weights to the next: by the checkpoint that it ends with.

Its shards are memory-mapped: all ranks of a node read one copy in the page cache. The order of collectives keeps the
files: the next checkpoint, whose end deletes older ones, begins after every rank has built its engine from them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vae_ds.engine import PhaseState, Source
from vae_ds.training.build import Weights
from vae_ds.training.saver import Saver
from vae_ds.training.shards import Stored


@dataclass
class Start:
    """What a phase starts from; without `stored` and `gathered`, the weights that the run starts from.

    Attributes:
        stored: a checkpoint, of the end of the phase before or of the phase itself.
        resumes: `stored` is of the phase itself, so its moments count, too.
        gathered: the weights of the phase before in memory, if its checkpoint could not be written.
    """

    stored: Stored | None = None
    resumes: bool = False
    gathered: Weights | None = None

    @property
    def source(self) -> Source | None:
        """The weights, to be read element by element; None stands for the weights that the run starts from."""
        return self.stored if self.gathered is None else PhaseState(dict(self.gathered), {})

    @property
    def left_out(self) -> dict[str, str]:
        """The weights that `stored` does not have, each with its SHA-256 (base_weights.py)."""
        return {} if self.stored is None else self.stored.left_out

    def close(self) -> None:
        """Let go of files and tensors. Whoever still has this object keeps nothing alive during the phase."""
        if self.stored is not None:
            self.stored.close()
        self.stored = self.gathered = None


def hand_over(saver: Saver, step: int, gather: Callable[[], Weights], must: bool) -> Start:
    """Finish the checkpoint of `step`, the end of a phase. Returns the start of the next phase. A collective.

    If it could not be written, the weights are those that `gather` returns; with `must`, StorageError is raised.
    """
    saver.finish(must)
    stored = saver.stored(step)
    return Start(stored) if stored is not None else Start(gathered=gather())
