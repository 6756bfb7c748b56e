"""The optimizer steps of one phase, one at a time, for measurements: those of `train`, without its records."""

import time
from dataclasses import dataclass
from pathlib import Path

from vae_ds import distributed
from vae_ds.config import RunConfig
from vae_ds.runtime import StopFlag
from vae_ds.training.handover import Start
from vae_ds.training.preparation import prepare
from vae_ds.training.trainer import Trainer


@dataclass(frozen=True)
class Step:
    """What one optimizer step of all ranks took: target tokens, sentences, floating-point operations, and its parts.

    shares: the parts of the step (`PARTS` of training/speed.py), as shares of its time on this rank.
    """

    seconds: float
    sentences: int
    tokens: float
    operations: float
    shares: dict[str, float]


class Steps:
    """The steps of one phase of a recipe, from the start of the phase, with the weights that a run starts from."""

    def __init__(self, config: RunConfig, phase: int, run_dir: Path) -> None:
        """Builds the engine. Writes nothing but token ids in the cache. A collective. Raises UserError."""
        ranks = distributed.start()
        quiet = config.logging.model_copy(update={"tensorboard": False, "progress": False, "trackers": ()})
        setup = prepare(config.model_copy(update={"logging": quiet}), run_dir, ranks)
        self._plan = setup.plans[phase]
        self._trainer = Trainer(setup, False, StopFlag())
        self._engine, _ = self._trainer.build(self._plan, Start())
        self._sentences = config.batch.global_size
        self._batches = self._trainer.batches(self._plan, self._engine)

    def step(self) -> Step:
        """One optimizer step. A collective."""
        began_s = time.perf_counter()
        with self._trainer.speed.step():
            self._trainer.step(self._plan, self._engine, self._batches)
        seconds = time.perf_counter() - began_s
        counted = self._trainer.speed.counted()
        shares = {key: value for key, value in self._trainer.speed.row().items() if key.startswith("share_")}
        return Step(seconds, self._sentences, counted.tokens, counted.operations, shares)

    def close(self) -> None:
        """Free the engine. A collective."""
        self._batches.close()
        self._engine.close()
