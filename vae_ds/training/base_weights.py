"""The weights of the base that no phase trains: with adapters, checkpoints leave them out (`model.held_names`).

A checkpoint has the SHA-256 of each of them instead, and whoever reads it has them from where the run starts: from the
base, or from the trained VAE `model.weights`. The ranks share the hashing, once per phase: at 1 GB/s, the 12 GB of 3
billion parameters take 12 seconds on one rank and 0.2 on 64.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping

from vae_ds import distributed
from vae_ds.config import ModelConfig
from vae_ds.engine import Reader, whole
from vae_ds.errors import CheckpointError
from vae_ds.model import held_names
from vae_ds.training.handover import Start
from vae_ds.training.preparation import Setup


def left_out(weights: Reader, setup: Setup, start: Start, before: dict[str, str]) -> dict[str, str]:
    """What the checkpoints of a phase leave out: the SHA-256 by name. A collective.

    The phase begins with `weights`, from `start`. `before` is the answer of the phase before. Raises CheckpointError,
    on every rank, if a weight that `start` leaves out has other values there.
    """
    if start.gathered is not None:
        return before
    # A checkpoint that has all weights says nothing of the base: it may have changed since.
    if start.stored is not None and not start.left_out:
        return {}
    # Such a phase has weights of the base where the phases before have those of the trained VAE.
    if setup.config.model.weights is not None and any(phase.reset_decoder for phase in setup.config.phases):
        return {}
    shapes = weights.shapes
    if not (held := held_names(shapes)):
        return {}
    # The largest first, so that the ranks have about equal shares.
    names = sorted(held, key=lambda name: (-math.prod(shapes[name]), name))
    mine = _checksums(weights, names[setup.ranks.rank :: setup.ranks.world])
    found = {name: told for one in distributed.gather_objects(mine) for name, told in one.items()}
    _compare(found, start, setup.config.model)
    return found


def check(weights: Reader, start: Start, settings: ModelConfig) -> None:
    """Raise CheckpointError if a weight that `start` leaves out has other values in `weights`. Not a collective."""
    _compare(_checksums(weights, start.left_out), start, settings)


def _compare(found: Mapping[str, str], start: Start, settings: ModelConfig) -> None:
    differing = [name for name, told in start.left_out.items() if found.get(name) != told]
    if differing:
        source = f"model.base {settings.base}" if settings.weights is None else f"model.weights {settings.weights}"
        raise CheckpointError(
            f"{source}: its weights have changed since {start.stored} was written, which does not have them "
            f"(`{differing[0]}` differs); put the earlier weights back there, or choose another --run-dir"
        )


def _checksums(weights: Reader, names: Iterable[str]) -> dict[str, str]:
    return {name: hashlib.sha256(whole(weights, name).numpy().data).hexdigest() for name in names}
