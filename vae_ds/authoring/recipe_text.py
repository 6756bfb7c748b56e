"""The text of a new recipe: YAML, with a comment above each setting that says where its value comes from.

Shapes: S sentences of the sample.
"""

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_ds import __version__
from vae_ds.authoring import rules
from vae_ds.config import CyclicalBeta, RunConfig
from vae_ds.data import Sample

WIDTH = 118
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
PRETRAINED_TOKENS = 512
# A YAML scalar that needs no quotes. Words such as `no` and `null` are values, and a number is not a name.
_PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|null|y|n)$)[A-Za-z][A-Za-z0-9_./-]*", re.IGNORECASE)
_ADAM_BYTES = 12  # of a checkpoint, per parameter: the weight and the two moments of Adam in float32


@dataclass(frozen=True)
class Findings:
    """What was found out about the base and the text, and the numbers that follow. Lengths are in tokens.

    parameters: those of the base; `body_parameters`: without its embeddings and output head; `vae_parameters`: those of
        the model that is trained.
    data: the section `data` without `max_tokens`.
    lengths_S: tokens of the sampled sentences, uncut, with the end-of-sentence token.
    chosen: the names of the wishes that are not left to a rule.
    """

    command: str
    base: str
    base_config: Any
    parameters: int
    body_parameters: int
    vae_parameters: int
    data: Mapping[str, Any]
    corpus: str
    streaming: bool
    sample: Sample
    lengths_S: NDArray[np.integer]
    unknown_share: float
    kept_share: float
    percentile: float
    max_tokens: int
    valid: int
    latent_dim: int
    kl_nats: float
    batch: int
    epochs: float
    steps: int
    lr: float
    deepspeed: str
    deepspeed_gb: float
    gpus: int
    gpu_gb: float
    chosen: frozenset[str]


def write(found: Findings, template: RunConfig) -> str:
    """The recipe. `template` gives the structure: the phase, beta, free bits, pooling and injection."""
    parts = [_head(found), _model(found, template), _data(found), _batch(found)]
    parts += [_phase(found, template), _during(found), _after(template)]
    return "\n".join("\n".join(part) for part in parts) + "\n"


def _head(found: Findings) -> list[str]:
    name = f"{PurePath(found.corpus).name.split('.')[0] or 'text'}-{PurePath(found.base).name}"
    return [
        *_comment(f"{found.base} on {found.corpus}. Written by vae_ds {__version__}:"),
        f"#   {_one_line(found.command)}",
        "#",
        *_comment("Each comment begins with the origin of the value below it:"),
        *_comment(
            "[measured] as in the recipe `recommended`, whose results this project measured (docs/results.md) with the "
            "tiny T5 that it ships. Two other bases were tried once each (docs/recipes.md)."
        ),
        *_comment("[rule] a rule of thumb, or a rule that comes from elsewhere. This project has not measured it."),
        *_comment("[data], [base] read from the text, or from the configuration of the base."),
        *_comment("[chosen] an option of the command, or a convention."),
        *_comment("Before a long run, compare a few learning rates, with `--set phases.0.optimizer.lr=...`."),
        f"name: {_value(re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.') or 'mine')}",
        "seed: 0",
    ]


def _model(found: Findings, template: RunConfig) -> list[str]:
    base, settings = found.base_config, template.model
    units = "chosen" if "latent_dim" in found.chosen else "measured"
    reason = (
        f"true from {rules.CHECKPOINTING_PARAMETERS / 1e6:,.0f} million parameters, or {rules.CHECKPOINTING_TOKENS} "
        f"tokens; here {found.vae_parameters / 1e6:,.0f} million and {found.max_tokens}. It saves memory and costs "
        "about one more forward pass"
    )
    return [
        "model:",
        *_comment(
            f"[base] {found.parameters:,} parameters, d_model {base.d_model}. The VAE has {found.vae_parameters:,}.", 2
        ),
        f"  base: {_value(found.base)}",
        *_comment(f"[{units}] `recommended` has {settings.latent_dim} units (--latent-dim).", 2),
        f"  latent_dim: {found.latent_dim}",
        *_comment("[measured] how the encoder states become a vector, and how z enters the decoder.", 2),
        f"  pooling: {settings.pooling}",
        f"  injection: {settings.injection}",
        *_comment(
            "[measured] z as several keys and values in each layer of the decoder, a network of z that makes them, and "
            "a prior that trains along (docs/priors.md).",
            2,
        ),
        f"  slots: {settings.slots}",
        f"  memory_mlp: {settings.memory_mlp}",
        f"  prior: {settings.prior}",
        *_comment(f"[base] null: the dropout of the base, {base.dropout_rate:g}.", 2),
        "  dropout: null",
        *_comment(f"[rule] {reason}.", 2),
        f"  gradient_checkpointing: {_value(rules.recomputes(found.vae_parameters, found.max_tokens))}",
    ]


def _data(found: Findings) -> list[str]:
    lengths, sample = found.lengths_S, found.sample
    listed = ", ".join(f"{percent:g} %: {rules.length_at(lengths, percent)}" for percent in PERCENTILES)
    needed = rules.length_at(lengths, found.percentile)
    of_all = f"{'' if sample.is_exact else 'about '}{sample.sentences:,}"
    told = (
        f"[data] tokens per sentence in a random sample of {len(lengths):,} of {of_all} training sentences: {listed}, "
        f"longest: {int(lengths.max())}. {found.percentile:g} % have at most {needed} tokens, rounded up to a multiple "
        f"of {rules.TOKEN_MULTIPLE}. This keeps {found.kept_share:.2%} of the sample whole; longer sentences are cut. "
        f"{found.unknown_share:.2%} of the tokens are unknown to the tokenizer."
    )
    if found.max_tokens > PRETRAINED_TOKENS:
        told += (
            f" T5 was pretrained on at most {PRETRAINED_TOKENS} tokens; longer texts cost memory, and may cost quality."
        )
    return [
        "data:",
        *(f"  {key}: {_value(value)}" for key, value in found.data.items()),
        *_comment(told, 2),
        f"  max_tokens: {found.max_tokens}",
    ]


def _batch(found: Findings) -> list[str]:
    if "batch" in found.chosen:
        per_step = f"[chosen] --batch; `recommended` has {rules.SMALLEST_BATCH}."
    else:
        per_step = (
            f"[rule] {rules.SMALLEST_BATCH} as in `recommended`, doubled up to {rules.LARGEST_BATCH} while the run "
            f"has more than {rules.LONGEST_RUN_STEPS:,} steps, and a multiple of the number of GPUs, {found.gpus}."
        )
    per_step += " The learning rate below does not depend on it."
    memory = (
        f"[rule] the first configuration of the table in ds_configs/README.md that leaves a third of {found.gpus} x "
        f"{found.gpu_gb:g} GB (--gpus, --gpu-memory) for activations: {found.vae_parameters / 1e6:,.0f} million "
        f"parameters take {found.deepspeed_gb:.1f} GB of each GPU in bf16."
    )
    if found.deepspeed_gb > rules.USED_SHARE * found.gpu_gb:
        memory += " That is more than two thirds: use larger GPUs."
    return [
        "batch:",
        *_comment(per_step, 2),
        f"  global: {found.batch}",
        *_comment("[chosen] bf16 on GPUs, fp32 on CPUs."),
        "precision: auto",
        *_comment(memory),
        f"deepspeed: {found.deepspeed}",
    ]


def _phase(found: Findings, template: RunConfig) -> list[str]:
    phase = template.phases[0]
    beta = phase.beta
    assert isinstance(beta, CyclicalBeta)
    anchor, tiny = phase.optimizer.lr, rules.ANCHOR_PARAMETERS
    if found.body_parameters == tiny:
        rate = "[measured] the rate of `recommended`, for a base of this size."
    else:
        rate = (
            f"[rule] not measured by this project for this base. {_number(anchor)} was chosen for the tiny T5 with its "
            f"{tiny / 1e6:.2f} million parameters outside of the embeddings. The rule divides it by the square root of "
            f"the relative size: this base has {found.body_parameters / 1e6:,.2f} million. t5-base gets 1.9e-4, and "
            "transformers' page on T5 gives 1e-4 to 3e-4 for most tasks. Sources: docs/recipes.md."
        )
    rate += f" Clipping at {phase.optimizer.clip:g} is that of `recommended`."
    kl = (
        f"[{'chosen' if 'kl_nats' in found.chosen else 'measured'}] a floor for the mean KL of a batch from N(0, I) "
        f"(--kl-nats). `recommended` has {phase.free_bits.nats:g} nats. Its KL from the learned prior was 0.5 to "
        "0.7 times as much (docs/results.md). How much z says depends on the text: move the floor by the `mi_train` of "
        "a first run."
    )
    warmup = (
        f"[measured] {phase.learning_rate.schedule}, with a warm-up of 2 % of the steps, as in `recommended`. "
        "[rule] At most 1,000 steps."
    )
    rise = f"{{schedule: {phase.learning_rate.schedule}, warmup_steps: {rules.warmup_steps(found.steps)}}}"
    return [
        "phases:",
        *_comment("[measured] one phase in which nothing is frozen. Beta is 0 in the first tenth of the steps.", 2),
        "  - name: full",
        *_comment(_length(found), 4),
        f"    steps: {found.steps}" if found.streaming else f"    epochs: {found.epochs:g}",
        f"    beta: {_flow(beta.model_dump())}",
        *_comment(kl, 4),
        f"    free_bits: {{mode: {phase.free_bits.mode}, nats: {found.kl_nats:g}}}",
        *_comment(rate, 4),
        f"    optimizer: {{lr: {_number(found.lr)}, clip: {phase.optimizer.clip:g}}}",
        *_comment(warmup, 4),
        f"    learning_rate: {rise}",
    ]


def _length(found: Findings) -> str:
    if "epochs" in found.chosen:
        chosen = "[chosen] --epochs"
    else:
        chosen = (
            f"[rule] one epoch, or more up to {rules.MOST_EPOCHS} for at least {rules.LEAST_STEPS:,} steps, those of "
            "`recommended` (--epochs)"
        )
    sentences = f"{found.sample.sentences:,} sentences"
    if found.streaming:
        origin = "counted" if found.sample.is_exact else "estimated from the sample"
        return (
            f"{chosen}; here {found.epochs:g} epochs of {sentences}, {origin}, at {found.batch} per step. A "
            "stream does not count its sentences, so the length is in steps."
        )
    return f"{chosen}; here {found.steps:,} steps of {found.batch} of {sentences}."


def _during(found: Findings) -> list[str]:
    every = rules.every_steps(found.steps)
    size_gb = _ADAM_BYTES * found.vae_parameters / 1e9
    return [
        "validation:",
        *_comment(f"[rule] ten in {found.steps:,} steps, at least one in 5,000 steps.", 2),
        f"  every_steps: {every}",
        *_comment(f"[data] valid has {found.valid:,} sentences; at most {rules.MOST_VALIDATED:,} are used.", 2),
        f"  sentences: {min(found.valid, rules.MOST_VALIDATED)}",
        "checkpoint:",
        *_comment(
            f"[rule] as often as a validation. One takes {size_gb:.2f} GB, {_ADAM_BYTES} bytes per parameter.",
            2,
        ),
        f"  every_steps: {every}",
        "  keep: 2",
        "logging:",
        *_comment(f"[rule] about 250 lines in {found.steps:,} steps, at least one in 100 steps.", 2),
        f"  every: {rules.logged_every(found.steps)}",
    ]


def _after(template: RunConfig) -> list[str]:
    settings = template.evaluation
    return [
        *_comment("[measured] importance samples for the likelihood of the first sentences of the split."),
        f"evaluation: {{iw_samples: {settings.iw_samples}, iw_sentences: {settings.iw_sentences}}}",
        *_comment(
            "[chosen] the best validation that uses z; `last` costs less for a very large base (docs/recipes.md)."
        ),
        "export: best",
    ]


def _comment(text: str, indent: int = 0) -> list[str]:
    start = " " * indent + "# "
    return textwrap.wrap(
        _one_line(text),
        WIDTH,
        initial_indent=start,
        subsequent_indent=start,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _one_line(text: str) -> str:
    """A name with a line break must not end a comment."""
    return " ".join(text.split())


def _number(value: float) -> str:
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def _flow(values: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_value(value)}" for key, value in values.items()) + "}"


def _value(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return _flow(value) if isinstance(value, Mapping) else json.dumps(value, ensure_ascii=False)
