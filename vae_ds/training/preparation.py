"""The setup of a training, before any weight is loaded: checks, data, lengths of the phases."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vae_ds import config as configuration
from vae_ds import distributed, engine
from vae_ds.config import RunConfig, Settings
from vae_ds.data import (
    Limits,
    Source,
    Streamed,
    TokenSet,
    Whole,
    cache_dir,
    corpora,
    limits_of,
    steps_per_epoch,
    tokenise,
)
from vae_ds.distributed import Ranks
from vae_ds.errors import ConfigError, DataError
from vae_ds.evaluation import agreed_fingerprint, yardstick_values
from vae_ds.model import (
    check_base,
    check_base_weights,
    check_latent_dim,
    check_start,
    is_adapter,
    least_sentences,
    load_tokenizer,
    skeleton,
)
from vae_ds.runtime import records, run_dirs
from vae_ds.training import phases, trackers
from vae_ds.training.phases import PhasePlan


@dataclass(frozen=True)
class Setup:
    """Everything about a run that does not change, known before any weight is loaded."""

    config: RunConfig
    run_dir: Path
    ranks: Ranks
    precision: str
    ds_config: dict[str, Any]
    limits: Limits  # of a forward pass, as the recipe states them (memory.py: by the GPU's memory)
    tokenizer: Any
    train: Source
    train_tokens: TokenSet | None  # None: the text is read as a stream
    valid: TokenSet
    yardstick_N: np.ndarray | None  # nats of each validation sentence under `validation.yardstick`
    plans: list[PhasePlan]


def prepare(config: RunConfig, run_dir: Path, ranks: Ranks) -> Setup:
    """Check everything that can be checked, then prepare the data. Raises UserError. Loads no weights. A collective."""
    run_dirs.check_writable(run_dir)
    trackers.check(config.logging.trackers)
    distributed.rank0_first(lambda: corpora.check(config.data))
    check_model(config)
    precision = engine.precision_for(config.precision, ranks.device, config.deepspeed, tell=ranks.is_main)
    clips = {"gradient_clipping": [phase.optimizer.clip for phase in config.phases]}
    ds_config = engine.resolve(config.deepspeed, precision, ranks.device, stated=clips)
    limits = limits_of(config.batch, ranks.world, config.data.max_tokens)
    tokenizer = load_tokenizer(config.model.base)
    corpus = distributed.rank0_first(lambda: corpora.load(config.data))
    cache = cache_dir(config.data.cache_dir)

    def tokens_of(split: str) -> TokenSet:
        return distributed.rank0_first(lambda: tokenise(corpus, split, tokenizer, config.data.max_tokens, cache))

    if config.data.streaming:
        source: Source = Streamed(_stream(config, ranks), tokenizer, config.data.max_tokens)
        train_set, plans = None, phases.plan(config.phases, None)
    else:
        train_set = tokens_of("train")
        source = Whole(train_set)
        plans = phases.plan(config.phases, steps_per_epoch(len(train_set), config.batch.global_size))
    if train_set is not None and config.model.has_prior:
        least = least_sentences(config.model.latent_dim)
        if len(train_set) < least:
            raise DataError(
                f"the training split has {len(train_set)} sentences, too few for a prior of {config.model.latent_dim} "
                f"latent units; use at least {least}, or model.prior=normal"
            )
    valid_set = tokens_of("valid")
    yardstick_N = _yardstick(config, valid_set, tokenizer)
    valid_set = valid_set.first(config.validation.sentences)
    parts = (limits, tokenizer, source, train_set, valid_set, yardstick_N, plans)
    return Setup(config, run_dir, ranks, precision, ds_config, *parts)


def _yardstick(config: RunConfig, valid: TokenSet, tokenizer: Any) -> np.ndarray | None:
    """The values of `validation.yardstick` for the sentences of the validations, after its data was compared."""
    run = config.validation.yardstick
    if run is None:
        return None
    values_N = yardstick_values(Path(run), "valid", agreed_fingerprint(valid, tokenizer), config.name)
    return values_N[: config.validation.sentences]


def _stream(config: RunConfig, ranks: Ranks) -> corpora.LineStream:
    """The training file as a stream. Only rank 0 reads the file for its fingerprint. A collective."""
    found = distributed.rank0_first(lambda: corpora.open_stream(config.data).fingerprint if ranks.is_main else "")
    return corpora.open_stream(config.data, distributed.broadcast_object(found))


def check_model(config: RunConfig) -> None:
    """Check the base, the latent code, the start and the freezing of every phase, before any weight is loaded.

    A fault of the last phase must not end a run after its first. Raises UserError.
    """
    model = config.model
    check_base(model.base)
    check_latent_dim(model)
    check_base_weights(model.base)
    check_start(model)
    names = [name for name, _ in skeleton(model).named_parameters()]
    adapters = {name for name in names if is_adapter(name)}
    idle = adapters.copy()
    for index, phase in enumerate(config.phases):
        frozen = phases.frozen_names(names, phase.freeze, f"phases.{index}.freeze")
        idle &= frozen
        if model.has_prior:
            phases.check_prior(phase, index, set(names) - frozen)
    if adapters and idle == adapters:
        raise ConfigError(
            "model.lora: every phase freezes all adapters, so they would stay 0; change `freeze` or `model.lora.where`"
        )


def write_headers(run_dir: Path, config: Settings, ranks: Ranks) -> None:
    """Make the run directory with its complete recipe and its environment. A collective; rank 0 writes."""
    distributed.rank0_first(lambda: _write_headers(run_dir, config, ranks) if ranks.is_main else None)


def _write_headers(run_dir: Path, config: Settings, ranks: Ranks) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(configuration.dump(config), encoding="utf-8")
        records.write_environment(run_dir, ranks.world, ranks.device.type)
    except OSError as error:
        raise ConfigError(f"--run-dir {run_dir}: cannot be written ({error.strerror})") from None
