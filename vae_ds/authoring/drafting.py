"""Look at the base and at a sample of the text, derive the numbers, and write the recipe.

No weights are loaded. Shapes: S sentences of the sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_ds import config as configuration
from vae_ds.authoring import recipe_text, rules
from vae_ds.authoring.recipe_text import Findings
from vae_ds.config import ModelConfig, RunConfig
from vae_ds.data import Sample, corpora, from_texts, sample_train, steps_per_epoch
from vae_ds.errors import ConfigError, DataError
from vae_ds.model import (
    base_shapes,
    check_base,
    check_base_weights,
    check_latent_dim,
    least_sentences,
    load_tokenizer,
    skeleton,
)

SAMPLED = 20_000
# Longer than any sentence: the lengths of the sample are those of the uncut sentences.
UNLIMITED = 1 << 30
TEMPLATE = "recommended"


@dataclass(frozen=True)
class Wishes:
    """What the user asks for. `vae-ds recipes new --help` explains each; None: the default of the rule."""

    base: str
    data: str
    column: str | None = None
    settings: Sequence[str] = ()  # KEY=VALUE of the section `data`
    latent_dim: int | None = None
    kl_nats: float | None = None
    epochs: float | None = None
    percentile: float = 99.0
    batch: int | None = None
    streaming: bool = False
    gpus: int = 1
    gpu_gb: float = 24.0


def draft(wishes: Wishes, command: str = "vae-ds recipes new") -> str:
    """The text of a recipe for the base and the corpus, as YAML with comments.

    The corpus is prepared as for a training: a text corpus is read once, into the cache. The text of a stream is not,
    except for a sample. At most SAMPLED training sentences are tokenised.

    command: named in the first lines of the recipe.

    Raises ConfigError or DataError for a wrong base, source or setting.
    """
    template = configuration.load(RunConfig, TEMPLATE)
    model = _model(wishes, template)
    shapes = base_shapes(wishes.base)
    body = sum(prod(shape) for name, shape in shapes.items() if not name.startswith(("shared.", "lm_head.")))
    data_tree = _data(wishes)
    data = _built(model, data_tree).data
    tokenizer = load_tokenizer(wishes.base)
    corpora.check(data)
    corpus = corpora.load(data)
    valid = len(corpus.splits["valid"])
    if valid < 2:
        raise DataError(f"{wishes.data}: the valid split has {valid} sentences; a validation needs at least 2")
    sample = sample_train(data, corpus, SAMPLED)
    least = least_sentences(model.latent_dim)
    if sample.is_exact and sample.sentences < least:
        raise DataError(
            f"{wishes.data}: the training split has {sample.sentences} sentences; the prior of {model.latent_dim} "
            f"latent units needs {least}; use more text, or a smaller --latent-dim"
        )
    tokens = from_texts(sample.texts, tokenizer, UNLIMITED)
    batch = wishes.batch or rules.global_batch(round((wishes.epochs or 1) * sample.sentences), wishes.gpus)
    epochs, steps = _length(sample, batch, wishes)
    limit = rules.max_tokens(tokens.lengths_N, wishes.percentile)
    vae = _vae_parameters(model)
    ds_config, ds_gb = rules.deepspeed(vae, wishes.gpus, wishes.gpu_gb)
    kl_nats = wishes.kl_nats or template.phases[0].free_bits.nats
    found = Findings(
        command=command,
        base=wishes.base,
        base_config=check_base(wishes.base),
        parameters=sum(prod(shape) for shape in shapes.values()),
        body_parameters=body,
        vae_parameters=vae,
        data=data_tree,
        corpus=wishes.data,
        streaming=data.streaming,
        sample=sample,
        lengths_S=tokens.lengths_N,
        unknown_share=tokens.unknown / tokens.target_tokens,
        kept_share=_share_up_to(tokens.lengths_N, limit),
        percentile=wishes.percentile,
        max_tokens=limit,
        valid=valid,
        latent_dim=model.latent_dim,
        kl_nats=kl_nats,
        batch=batch,
        epochs=epochs,
        steps=steps,
        lr=rules.learning_rate(body, template.phases[0].optimizer.lr),
        deepspeed=ds_config,
        deepspeed_gb=ds_gb,
        gpus=wishes.gpus,
        gpu_gb=wishes.gpu_gb,
        chosen=frozenset(name for name, value in vars(wishes).items() if value is not None),
    )
    text = recipe_text.write(found, template)
    # A name with unusual characters must not make another recipe of it.
    configuration.build(RunConfig, configuration.parse_yaml(text, "the new recipe"), "the new recipe")
    return text


def _model(wishes: Wishes, template: RunConfig) -> ModelConfig:
    """The model of the recipe, after the base and the latent code were checked."""
    check_base(wishes.base)
    changed = {"base": wishes.base, "latent_dim": wishes.latent_dim or template.model.latent_dim}
    model = template.model.model_copy(update=changed)
    check_latent_dim(model)
    check_base_weights(wishes.base)
    return model


def _data(wishes: Wishes) -> dict[str, Any]:
    """The `data` section without `max_tokens`."""
    for text in wishes.settings:
        key = configuration.split_override(text)[0]
        if not key.startswith("data.") or key == "data.max_tokens":
            raise ConfigError(
                f"--set {text}: `recipes new` takes settings of the section `data`, such as data.labelled=true, but not"
                " data.max_tokens; change the others in the recipe that it writes"
            )
    tree = {"data": corpora.named(wishes.data, wishes.column, wishes.streaming)}
    data: dict[str, Any] = configuration.override(tree, wishes.settings)["data"]
    return data


def _built(model: ModelConfig, data: dict[str, Any]) -> RunConfig:
    phase = {"name": "full", "steps": 1}
    tree = {"model": model.model_dump(), "data": data, "phases": [phase]}
    return configuration.build(RunConfig, tree, "recipes new")


def _length(sample: Sample, batch: int, wishes: Wishes) -> tuple[float, int]:
    """Epochs and steps."""
    per_epoch = steps_per_epoch(sample.sentences, batch)
    epochs = wishes.epochs or rules.epochs(per_epoch)
    steps = round(epochs * per_epoch)
    if steps < 1:
        raise ConfigError(f"--epochs {epochs:g}: {epochs:g} epochs of {per_epoch} steps is less than one step")
    # The digits of an estimate beyond the third say nothing.
    return epochs, steps if sample.is_exact else int(float(f"{steps:.3g}"))


def _vae_parameters(model: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in skeleton(model).parameters())


def _share_up_to(lengths_S: NDArray[np.integer], limit: int) -> float:
    return float(np.mean(lengths_S <= limit))
