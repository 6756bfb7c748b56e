"""What a phase is built from: a module with the phase's freezing, its weights, and the engine that takes both over.

No rank holds a copy of the weights: those of the base, of `model.weights` and of a checkpoint are memory-mapped files,
of which all ranks of a node share one copy in the page cache. The engine reads what it needs, element by element.
"""

from collections.abc import Collection, Mapping

import torch

from vae_ds.engine import PhaseEngine, PhaseState, Reader, Source
from vae_ds.model import T5VAE, exported_weights, model_dir, plain_name, stored_priors
from vae_ds.training import phases
from vae_ds.training.aggressive import half_of
from vae_ds.training.phases import PhasePlan
from vae_ds.training.preparation import Setup

Weights = Mapping[str, torch.Tensor]
"""Float32 CPU tensors by parameter name."""


class FirstWeights:
    """The weights that a phase begins with, for PhaseEngine: each parameter is read from a source of its own."""

    def __init__(self, sources: dict[str, Reader]) -> None:
        self._sources = sources

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of each parameter, without those that their source lacks."""
        known = {id(source): source.shapes for source in self._sources.values()}
        every = {name: known[id(source)].get(name) for name, source in self._sources.items()}
        return {name: shape for name, shape in every.items() if shape is not None}

    def copy_to(self, target: torch.Tensor, name: str, kind: str, offset: int) -> None:
        """Fill the 1-D `target` with the elements from `offset` on of a parameter."""
        self._sources[name].copy_to(target, name, kind, offset)

    def close(self) -> None:
        """Let go of files and tensors."""
        self._sources = {}


def build_model(setup: Setup, plan: PhasePlan, source: Source | None, is_start: bool) -> tuple[T5VAE, FirstWeights]:
    """A module for the engine, and the weights for it. `source` None stands for the weights that the run starts from.

    With `reset_decoder`, a phase starts (`is_start`) with the base's decoder again (Li et al. 2019).
    """
    model = T5VAE.mapped(setup.config.model, setup.config.seed)
    weights = first_weights(model, source, ["decoder"] if is_start and plan.settings.reset_decoder else ())
    phases.freeze(model, plan.settings.freeze, f"phases.{plan.index}.freeze")
    return model, weights


def first_weights(model: T5VAE, source: Source | None, of_base: Collection[str] = ()) -> FirstWeights:
    """The weights of `source`, and where it leaves some out, or is None, those that the run starts from.

    These are the base's, which a new `model` has, or those of the trained VAE `model.weights`. The groups `of_base`
    have the base's in any case.
    """
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    base: Reader = PhaseState(own, {})
    start = base
    if model.settings.weights is not None and (source is None or source.left_out):
        has = stored_priors(model_dir(model.settings.weights))
        kind = model.settings.prior if model.settings.prior in has else "normal"
        exported = exported_weights(model.settings.weights, kind)
        # An export has no adapters, and perhaps not this prior: those of the new model begin as they are.
        start = PhaseState({name: exported.get(plain_name(name), value) for name, value in own.items()}, {})

    def reader(name: str) -> Reader:
        if phases.group_of(name) in of_base:
            return base
        return start if source is None or name in source.left_out else source

    return FirstWeights({name: reader(name) for name in own})


def build_engine(setup: Setup, plan: PhasePlan, model: T5VAE, weights: FirstWeights) -> PhaseEngine:
    """The engine of a phase. Closes `weights`."""
    engine = PhaseEngine(
        model,
        optimizer=plan.settings.optimizer,
        ranks=setup.ranks,
        precision=setup.precision,
        ds_config=setup.ds_config,
        weights=weights,
        half_of=half_of if plan.settings.aggressive else None,
        is_new=phases.is_new,
    )
    weights.close()
    return engine
