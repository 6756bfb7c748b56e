"""`vae-ds plan`: the memory of a rank, the ds_config and micro batch that fit, and the time of a run.

Nothing is trained and no weights are loaded. Bytes of weights and states are those of `budget`, activations are
measured by `model.cost`. A GB is 10^9 bytes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vae_ds.authoring import budget
from vae_ds.config import RunConfig
from vae_ds.data import corpora, from_texts, sample_train, steps_per_epoch
from vae_ds.engine import stated_precision
from vae_ds.errors import ConfigError
from vae_ds.model import count_operations, extents, footprint, load_tokenizer, skeleton
from vae_ds.training import phases

SAMPLED = 5000
# The rest is for the CUDA context, the kernels' workspaces and the fragments of the allocator; not measured.
USED_SHARE = 0.9
# A smaller micro batch leaves a GPU idle; not measured.
LEAST_MICRO = 8
GB = 1e9


@dataclass(frozen=True)
class PhaseNeeds:
    """A phase: its steps, trained and frozen parameters, and bytes of activations: first + (B - 1) * each."""

    name: str
    steps: int
    trained: int
    frozen: int
    first_bytes: int
    each_bytes: int
    logits_bytes: int  # of one sentence, part of `each_bytes`
    flops: float  # of all its steps, forward and backward

    def activations(self, micro: int) -> int:
        """Bytes of the activations of a micro batch, at the longest sentences that the recipe allows."""
        return self.first_bytes + (micro - 1) * self.each_bytes


@dataclass(frozen=True)
class Option:
    """A ds_config: bytes of weights and states of a rank, and the largest micro batch that fits beside them, or 0."""

    ds_config: str
    device_bytes: float
    host_bytes: float
    micro: int


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on so many GPUs. `chosen` is None if nothing fits."""

    gpus: int
    gpu_gb: float
    precision: str
    parameters: int
    global_batch: int
    max_tokens: int
    mean_tokens: float
    phases: tuple[PhaseNeeds, ...]
    options: tuple[Option, ...]
    chosen: Option | None
    hours: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def plan(config: RunConfig, gpus: int = 1, gpu_gb: float = 80.0, tflops: float | None = None) -> Plan:
    """The plan of a recipe on `gpus` GPUs with `gpu_gb` GB each.

    tflops: what one GPU computes, in 10^12 floating-point operations a second; None: no time is estimated.

    The corpus is prepared as for a training; at most SAMPLED of its sentences are tokenised.
    Raises ConfigError if the global batch is smaller than the number of GPUs, or for a wrong base or setting.
    """
    if config.batch.global_size < gpus:
        raise ConfigError(
            f"batch.global {config.batch.global_size} has fewer sentences than {gpus} GPUs; use at most "
            f"{config.batch.global_size} GPUs, or a larger batch.global"
        )
    precision = _precision(config)
    sentences, mean_tokens = _text(config)
    per_epoch = None if sentences is None else steps_per_epoch(sentences, config.batch.global_size)
    sizes = _sizes(config)
    every = tuple(
        _needs(config, sizes, phase, precision, mean_tokens) for phase in phases.plan(config.phases, per_epoch)
    )
    of_rank = -(-config.batch.global_size // gpus)
    options = tuple(_option(name, precision, every, gpus, gpu_gb, of_rank) for name in budget.ORDER)
    fitting = [option for option in options if option.micro]
    roomy = [option for option in fitting if option.micro >= min(LEAST_MICRO, of_rank)]
    chosen = roomy[0] if roomy else max(fitting, key=lambda option: option.micro, default=None)
    flops = sum(phase.flops for phase in every)
    return Plan(
        gpus=gpus,
        gpu_gb=gpu_gb,
        precision=precision,
        parameters=every[0].trained + every[0].frozen,
        global_batch=config.batch.global_size,
        max_tokens=config.data.max_tokens,
        mean_tokens=mean_tokens,
        phases=every,
        options=options,
        chosen=chosen,
        hours=None if tflops is None else flops / (tflops * 1e12 * gpus * 3600),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank in a training step of a phase; `states_bytes`: weights, gradients and states on the device."""

    phase: str
    parameters: int
    states_bytes: float
    host_bytes: float
    activations_bytes: float


def needs(config: RunConfig, precision: str, ranks: int, micro: int) -> list[Memory]:
    """What each phase needs with `micro` sentences of the greatest length per rank and forward pass.

    `precision` is resolved. Empty for a ds_config whose memory is not known, such as the user's own file.
    """
    name = _short(config.deepspeed)
    if not budget.is_known(name):
        return []
    sizes, found = _sizes(config), []
    for phase in config.phases:
        names = phases.frozen_names(sizes, phase.freeze)
        trained, frozen = _divided(sizes, names)
        states = budget.states(name, precision, trained, frozen, ranks)
        spent = footprint(config.model, micro, config.data.max_tokens, precision, names).peak_bytes
        found.append(Memory(phase.name, trained + frozen, states.device, states.host, spent))
    return found


def memory(config: RunConfig, precision: str, ranks: int, micro: int) -> list[str]:
    """`needs` for people, a line per phase."""
    return [
        f"memory of a rank in phase {one.phase}: {_bytes(one.states_bytes + one.activations_bytes)}, of it "
        f"{_bytes(one.states_bytes)} weights, gradients and states, {_bytes(one.activations_bytes)} activations"
        + (f"; and {_bytes(one.host_bytes)} of its host" if one.host_bytes else "")
        for one in needs(config, precision, ranks, micro)
    ]


def text(plan: Plan) -> str:
    """The plan for people."""
    lines = [
        f"{plan.parameters / 1e6:,.1f} M parameters, {plan.precision}, {plan.gpus} x {plan.gpu_gb:g} GB, "
        f"{plan.global_batch} sentences per step, at most {plan.max_tokens} tokens ({plan.mean_tokens:.1f} on average)",
        "",
        *_table(
            ["phase", "steps", "trained", "activations a sentence", "of it logits", "operations"],
            [
                [
                    phase.name,
                    f"{phase.steps:,}",
                    f"{phase.trained / 1e6:,.1f} M",
                    _bytes(phase.each_bytes),
                    _bytes(phase.logits_bytes),
                    f"{phase.flops / 1e15:,.3g} PFLOP",
                ]
                for phase in plan.phases
            ],
        ),
        "",
        *_table(
            ["ds_config", "weights and states", "in host memory", "largest micro batch", ""],
            [
                [
                    option.ds_config,
                    _bytes(option.device_bytes),
                    _bytes(option.host_bytes) if option.host_bytes else "",
                    str(option.micro) if option.micro else "does not fit",
                    "<- take this" if option is plan.chosen else "",
                ]
                for option in plan.options
            ],
        ),
        "",
        _advice(plan),
    ]
    if plan.hours is not None:
        shown = f"{plan.hours:.3g} hours" if plan.hours >= 1 else f"{60 * plan.hours:.2g} minutes"
        lines.append(f"time: about {shown} of computing; validations and checkpoints come on top")
    return "\n".join(lines)


def _advice(plan: Plan) -> str:
    if plan.chosen is None:
        return (
            "nothing fits: set model.gradient_checkpointing=true, lower data.max_tokens, or use more or larger GPUs; "
            "zero3_nvme keeps the states on a drive"
        )
    wanted = min(LEAST_MICRO, -(-plan.global_batch // plan.gpus))
    take = f"take deepspeed={plan.chosen.ds_config}"
    if plan.chosen.micro < wanted:
        return (
            f"{take}: no ds_config has room for a micro batch of {wanted}, and this one has the most room; "
            "model.gradient_checkpointing=true makes more"
        )
    return (
        f"{take}: the one with the least communication that has room for a micro batch of {wanted} in {USED_SHARE:.0%} "
        "of the memory"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    every = [head, *rows]
    widths = [max(len(row[place]) for row in every) for place in range(len(head))]
    return [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in columns).rstrip()
        for row in every
        for columns in [list(enumerate(zip(row, widths, strict=True)))]
    ]


def _bytes(number: float) -> str:
    return f"{number / GB:,.1f} GB" if number >= GB / 10 else f"{number / 1e6:,.1f} MB"


def _precision(config: RunConfig) -> str:
    if config.precision != "auto":
        return config.precision
    return stated_precision(config.deepspeed) or "bf16"


def _text(config: RunConfig) -> tuple[int | None, float]:
    """The number of training sentences, None for a stream, and the mean number of tokens of a sentence."""
    corpora.check(config.data)
    sample = sample_train(config.data, corpora.load(config.data), SAMPLED)
    tokens = from_texts(sample.texts, load_tokenizer(config.model.base), config.data.max_tokens)
    return (None if config.data.streaming else sample.sentences), float(np.mean(tokens.lengths_N))


def _needs(
    config: RunConfig, sizes: dict[str, int], phase: phases.PhasePlan, precision: str, mean_tokens: float
) -> PhaseNeeds:
    names, longest = phases.frozen_names(sizes, phase.settings.freeze), config.data.max_tokens
    one, two = (footprint(config.model, count, longest, precision, names) for count in (1, 2))
    mean = (1, max(1, round(mean_tokens)))
    flops = count_operations(skeleton(config.model), names, recomputed=True).of(extents(mean, mean))
    trained, frozen = _divided(sizes, names)
    return PhaseNeeds(
        name=phase.name,
        steps=phase.steps,
        trained=trained,
        frozen=frozen,
        first_bytes=one.peak_bytes,
        each_bytes=two.peak_bytes - one.peak_bytes,
        logits_bytes=two.logits_bytes - one.logits_bytes,
        flops=flops * config.batch.global_size * phase.steps,
    )


def _sizes(config: RunConfig) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in skeleton(config.model).named_parameters()}


def _divided(sizes: dict[str, int], frozen: set[str]) -> tuple[int, int]:
    """The numbers of trained and of frozen parameters."""
    count = sum(sizes[name] for name in frozen)
    return sum(sizes.values()) - count, count


def _option(name: str, precision: str, every: Sequence[PhaseNeeds], gpus: int, gpu_gb: float, of_rank: int) -> Option:
    states = [budget.states(name, precision, phase.trained, phase.frozen, gpus) for phase in every]
    micro = of_rank
    for phase, spent in zip(every, states, strict=True):
        free = USED_SHARE * gpu_gb * GB - spent.device - phase.first_bytes
        micro = min(micro, 1 + int(free // phase.each_bytes)) if free >= 0 else 0
    return Option(name, max(one.device for one in states), max(one.host for one in states), max(0, micro))


def _short(deepspeed: str) -> str:
    for precision in ("_fp32", "_bf16", "_fp16"):
        deepspeed = deepspeed.replace(precision, "")
    return deepspeed
