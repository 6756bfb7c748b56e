"""The phase manager: length, freezing and schedules of each phase. Independent of DeepSpeed.

A run is a list of phases (docs/method.md). `plan` converts the epochs and fractions of a recipe into applied optimizer
steps, once the size of the data is known. `freeze` and `train_mode` convert groups and patterns into `requires_grad`
and eval mode.
"""

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from vae_ds.config import ConstantBeta, CyclicalBeta, LearningRateConfig, LinearBeta, OptimizerConfig, PhaseConfig
from vae_ds.errors import ConfigError
from vae_ds.model import held_names, is_adapter
from vae_ds.training import schedules

GROUPS = ("encoder", "decoder", "embeddings", "memory", "bottleneck", "prior")
REACH_CODES = ("encoder", "embeddings", "bottleneck")  # the groups that z is a function of


@dataclass(frozen=True)
class PhasePlan:
    """A phase whose lengths are in applied optimizer steps."""

    index: int
    settings: PhaseConfig
    first_step: int
    steps: int
    steps_per_epoch: int | None
    beta: schedules.Beta
    learning_rate: schedules.LearningRate

    @property
    def name(self) -> str:
        return self.settings.name


def plan(phases: Sequence[PhaseConfig], steps_per_epoch: int | None) -> list[PhasePlan]:
    """The plans of all phases, one after the other.

    `steps_per_epoch` comes from the real data and the real global batch; it is None for a stream, whose sentences are
    not counted. Raises ConfigError if a phase has no step, or a length in epochs of a stream.
    """
    plans: list[PhasePlan] = []
    first = 0
    for index, phase in enumerate(phases):
        if steps_per_epoch is None:
            _need_steps(phase, index)
        steps = phase.steps if phase.steps is not None else round(float(phase.epochs or 0) * (steps_per_epoch or 0))
        if steps < 1:
            raise ConfigError(
                f"phases.{index}.epochs: {phase.epochs:g} epochs of {steps_per_epoch} steps is less than one step"
            )
        beta = _beta(phase, steps, steps_per_epoch)
        rate = learning_rate(phase.optimizer, phase.learning_rate, steps)
        plans.append(PhasePlan(index, phase, first, steps, steps_per_epoch, beta, rate))
        first += steps
    return plans


def learning_rate(optimizer: OptimizerConfig, settings: LearningRateConfig, steps: int) -> schedules.LearningRate:
    """The learning-rate schedule of `steps` applied steps."""
    return schedules.LearningRate(settings.schedule, optimizer.lr, settings.warmup_steps, steps, settings.final)


def _need_steps(phase: PhaseConfig, index: int) -> None:
    """Raise ConfigError for a length in epochs."""
    for key, value in (("epochs", phase.epochs), ("beta.over_epochs", getattr(phase.beta, "over_epochs", None))):
        if value is not None:
            raise ConfigError(f"phases.{index}.{key}: data.streaming does not count the sentences; set steps")


def _beta(phase: PhaseConfig, steps: int, steps_per_epoch: int | None) -> schedules.Beta:
    beta = phase.beta
    if isinstance(beta, ConstantBeta):
        return schedules.Constant(beta.value)
    if isinstance(beta, CyclicalBeta):
        return schedules.Cyclical(beta.max, steps, beta.cycles, beta.zero, beta.ramp)
    if isinstance(beta, LinearBeta):
        if beta.over_steps is not None:
            length: float = beta.over_steps
        elif beta.over_epochs is not None:
            length = beta.over_epochs * (steps_per_epoch or 0)
        else:
            length = float(beta.over_fraction or 0) * steps
        return schedules.Linear(beta.max, length, steps, beta.start)
    return schedules.Target(beta.kl, beta.start, beta.rate, beta.max)


def number_of(phase: str, names: Sequence[str]) -> int:
    """The index of a phase given by its name or its number from 1. Raises ConfigError."""
    if phase in names:
        return names.index(phase)
    if phase.isdecimal() and 1 <= int(phase) <= len(names):
        return int(phase) - 1
    raise ConfigError(f"no phase {phase!r}; the recipe has {', '.join(names)}")


def group_of(name: str) -> str:
    """The freezing group of a parameter of T5VAE, by its name. Each parameter is in exactly one group."""
    if name.startswith("bottleneck."):
        return "bottleneck"
    if name.startswith("prior."):
        return "prior"
    if ".memory." in name or name.startswith("memory_mlp."):
        return "memory"
    if name.startswith("t5.shared."):
        return "embeddings"
    if name.startswith("t5.encoder."):
        return "encoder"
    if name.startswith(("t5.decoder.", "t5.lm_head.")):
        return "decoder"
    raise ValueError(f"parameter {name} belongs to no group")


def is_new(name: str) -> bool:
    """Whether a parameter of T5VAE is one of the new weights, which the pretrained T5 does not have."""
    return group_of(name) in ("bottleneck", "memory", "prior")


def decodes(trained: Iterable[str]) -> bool:
    """Whether a phase that trains these parameters needs the decoder: not to fit a prior to codes that stay."""
    return any(group_of(name) != "prior" for name in trained)


def check_prior(phase: PhaseConfig, index: int, trained: Collection[str]) -> None:
    """Check a phase of a model with a learned prior that trains these parameters. Raises ConfigError."""
    where = f"phases.{index}"
    moves = any(group_of(name) in REACH_CODES for name in trained)
    bits = phase.free_bits
    if moves and bits.nats > 0 and bits.mode != "total_batch":
        raise ConfigError(
            f"{where}.free_bits.mode is {bits.mode}, which has no KL per unit with a learned prior; use total_batch, "
            "model.prior=normal, or freeze encoder, embeddings and bottleneck"
        )
    is_felt = any(group_of(name) == "prior" for name in trained) or phase.beta != ConstantBeta(
        schedule="constant", value=0.0
    )
    if not phase.sample_posterior and is_felt:
        raise ConfigError(
            f"{where}.sample_posterior is false, but the KL to a learned prior is that of samples; set it to true, or "
            "freeze `prior` and keep beta at 0"
        )
    if phase.denoise > 0 and not decodes(trained):
        raise ConfigError(
            f"{where}.denoise is {phase.denoise:g}, but the phase fits the prior alone, to codes of whole sentences; "
            "set it to 0"
        )


def frozen_names(names: Iterable[str], patterns: Sequence[str], where: str = "freeze") -> set[str]:
    """The parameters that `patterns` freeze: groups, or shell patterns of parameter names.

    In a model with adapters, the weights that these leave as they are (`held_names`) are always among them.
    Raises ConfigError for a pattern that matches nothing, or if nothing is left to train. `prior` may match nothing:
    N(0, I) has no parameters, and model.prior changes without the phases.
    """
    every = list(names)
    frozen = held_names(every)
    for pattern in patterns:
        matched = {
            name
            for name in every
            if (group_of(name) == pattern if pattern in GROUPS else fnmatch.fnmatch(name, pattern))
        }
        if not matched and pattern != "prior":
            raise ConfigError(f"{where}: `{pattern}` matches no parameter; groups are {', '.join(GROUPS)}")
        frozen |= matched
    if len(frozen) == len(every):
        raise ConfigError(f"{where}: {', '.join(patterns)} leaves nothing to train")
    return frozen


def freeze(model: nn.Module, patterns: Sequence[str], where: str = "freeze") -> set[str]:
    """Set `requires_grad` of every parameter for a phase, before its engine is built. Returns the frozen names."""
    frozen = frozen_names([name for name, _ in model.named_parameters()], patterns, where)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return frozen


def sizes(model: nn.Module) -> str:
    """The number of parameters that train, beside that of all, as words. Before an engine divides them."""
    every = list(model.parameters())
    trained = sum(parameter.numel() for parameter in every if parameter.requires_grad)
    return f"trains {trained:,} of {sum(parameter.numel() for parameter in every):,} parameters"


def train_mode(model: nn.Module) -> None:
    """Set training mode, but eval mode for frozen modules, so that they run without dropout (docs/method.md).

    A module without parameters, such as Dropout, follows the nearest module above it that has parameters. The memory
    projection does not count: a frozen decoder with a trainable memory inside runs without dropout. A block that its
    adapters train is not frozen: all of its dropout is active.
    """
    every = model.named_parameters(remove_duplicate=False)
    trained = {name for name, parameter in every if parameter.requires_grad}
    _set_mode(model, "", True, trained | _adapted(model, trained))


def _set_mode(module: nn.Module, prefix: str, inherited: bool, trained: set[str]) -> None:
    own = [f"{prefix}{name}" for name, _ in module.named_parameters()]
    # A T5 stack lists the shared embeddings among its parameters, but its dropout must not follow them.
    told = [name in trained for name in own if ".memory." not in f".{name}" and ".embed_tokens." not in name]
    active = any(told) if told else any(name in trained for name in own) if own else inherited
    module.training = active
    for name, child in module.named_children():
        _set_mode(child, f"{prefix}{name}.", active, trained)


def _adapted(model: nn.Module, trained: set[str]) -> set[str]:
    """The held weights of the blocks, and of the stacks outside of them, with an adapter among `trained`."""
    blocks = {_block_of(name) for name in trained if is_adapter(name)}
    blocks |= {f"t5.{group_of(name)}" for name in trained if is_adapter(name)}
    return {name for name in held_names(name for name, _ in model.named_parameters()) if _block_of(name) in blocks}


def _block_of(name: str) -> str:
    """`t5.encoder.block.3` for a parameter of this block, `t5.encoder` for one outside of the blocks."""
    parts = name.split(".")
    return ".".join(parts[:4] if "block" in parts else parts[:2])
