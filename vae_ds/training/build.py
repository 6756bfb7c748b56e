"""What a phase is built from: a new float32 module with the phase's freezing, and the engine that takes it over."""

from collections.abc import Collection, Mapping

import torch

from vae_ds.engine import PhaseEngine
from vae_ds.model import T5VAE, plain_name
from vae_ds.training import phases
from vae_ds.training.aggressive import half_of
from vae_ds.training.phases import PhasePlan
from vae_ds.training.preparation import Setup

Weights = Mapping[str, torch.Tensor]
"""Float32 CPU tensors by parameter name."""


def build_model(setup: Setup, plan: PhasePlan, weights: Weights | None, is_start: bool) -> T5VAE:
    """A new float32 module on the CPU. `weights` None stands for the weights that the run starts from.

    These are the base's, or those of the trained VAE `model.weights`. With `reset_decoder`, a phase starts (`is_start`)
    with the base's decoder again (Li et al. 2019).
    """
    model = T5VAE.from_base(setup.config.model, setup.config.seed)
    fill(model, weights, ["decoder"] if is_start and plan.settings.reset_decoder else ())
    phases.freeze(model, plan.settings.freeze, f"phases.{plan.index}.freeze")
    return model


def fill(model: T5VAE, weights: Weights | None, keep: Collection[str] = ()) -> None:
    """Copy `weights` to a model that was built from its base, except the groups `keep`.

    Where the run starts has the weights that are missing: the base, or the trained VAE `model.weights`.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if phases.group_of(name) not in keep}
    with torch.no_grad():
        if model.settings.weights is not None and (weights is None or any(name not in weights for name in own)):
            start = dict(T5VAE.from_pretrained(model.settings.weights).named_parameters())
            for name, parameter in own.items():
                # An export has no adapters: those of the new model begin as they are.
                parameter.copy_(start.get(plain_name(name), parameter))
            del start
        for name, parameter in own.items():
            if weights is not None and name in weights:
                parameter.copy_(weights[name])


def build_engine(setup: Setup, plan: PhasePlan, model: T5VAE) -> PhaseEngine:
    """The engine of a phase."""
    return PhaseEngine(
        model,
        optimizer=plan.settings.optimizer,
        ranks=setup.ranks,
        precision=setup.precision,
        ds_config=setup.ds_config,
        half_of=half_of if plan.settings.aggressive else None,
        is_new=phases.is_new,
    )
