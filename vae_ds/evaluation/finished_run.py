"""Operations on a finished run: load its model, evaluate a split, export the model."""

import json
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from vae_ds import config as configuration
from vae_ds import distributed, latents
from vae_ds.config import EvaluationConfig, RunConfig, portable
from vae_ds.data import cache_dir, corpora, from_texts, tokenise
from vae_ds.errors import CheckpointError, ConfigError, DataError
from vae_ds.evaluation import mauve
from vae_ds.evaluation.identity import agreed_fingerprint, require_language_model, yardstick_values
from vae_ds.evaluation.metrics import Training, evaluate
from vae_ds.evaluation.text_metrics import text_metrics
from vae_ds.model import MAX_TOKENS, T5VAE, auto_code, exported_weights, load_tokenizer, read_export
from vae_ds.runtime import evaluations, run_dirs
from vae_ds.sharing import CARD, RECIPE, Examples, write_card

SPLITS = ("test", "valid", "train")  # the first one that was evaluated is in the model card
SAMPLES = 5  # in the model card


@dataclass(frozen=True)
class Place:
    """A run directory or an exported model: the directory of the model, and the configuration of the run if any."""

    model_dir: Path
    config: RunConfig | None


def locate(run: Path) -> Place:
    """Find the model of a RUN argument. Raises CheckpointError if there is none."""
    model_dir = run_dirs.model_of(run)
    is_run = run_dirs.is_run(run)
    return Place(model_dir, configuration.load(RunConfig, str(run / "config.yaml")) if is_run else None)


def load_model(run: Path, prior: str | None = None) -> tuple[T5VAE, Any]:
    """The exported model of a run in eval mode, and its tokenizer. `prior`: one of its priors, None for that in use."""
    place = locate(run)
    model = T5VAE.from_pretrained(place.model_dir, prior)
    model.eval()
    return model, load_tokenizer(str(place.model_dir))


def max_tokens(run: Path) -> int | None:
    """The maximum length of a text in the training of a run or an export, in tokens with the end-of-sentence token.

    None if it is unknown: an export of an older version of vae_ds, away from its run. Raises CheckpointError.
    """
    place = locate(run)
    found = read_export(place.model_dir).get(MAX_TOKENS)
    if found is None:
        return None if place.config is None else place.config.data.max_tokens
    if not isinstance(found, int) or found < 2:
        raise CheckpointError(f"{place.model_dir / 'config.json'}: {MAX_TOKENS} is {found!r}, not a number of tokens")
    return found


def notes(run: Path) -> dict[str, Any]:
    """What an export tells of its training besides `max_tokens`: the recipe, and which weights it has and why."""
    place = locate(run)
    stored = read_export(place.model_dir)
    recipe = {} if place.config is None else {RECIPE: portable(place.config)}
    return recipe | {key: stored[key] for key in (RECIPE, "origin") if key in stored}


def sentences(run: Path, split: str, number: int) -> list[str]:
    """The first `number` sentences of a split of the run."""
    config = config_of(run, None)
    corpora.check(config.data)
    corpus = corpora.load(config.data)
    if split not in corpus.splits:
        raise DataError(f"the {split} split is read as a stream (data.streaming); choose valid or test")
    return [str(text) for text in corpus.splits[split][:number]["text"]]


def evaluate_run(
    run: Path,
    split: str,
    settings: dict[str, int | str | None],
    recipe: str | None = None,
    yardstick: str | None = None,
    prior: str | None = None,
) -> dict[str, Any] | None:
    """Compute all metrics of docs/metrics.md on one split, over all ranks, and write them to RUN/eval-SPLIT.json.

    The values of each sentence are written beside it (`vae_ds.runtime.evaluations`). `yardstick` is a run of a plain
    language model that was evaluated on the same sentences, for `above_yardstick`, `lm_gain` and `forward_ppl`. `prior`
    is one of the model's priors, None the one in use.

    Returns the metrics on rank 0, None on the other ranks. Raises UserError if the run, its data or the yardstick's
    evaluation is missing, if the yardstick has a latent code, or if it was evaluated on other data.
    """
    place, config = locate(run), config_of(run, recipe)
    run_dirs.check_not_shipped(run)
    distributed.rank0_first(lambda: corpora.check(config.data))
    if yardstick is not None:
        require_language_model(Path(yardstick))
        evaluations.read_values(Path(yardstick), split)  # a missing or broken file is found before the data is read
    chosen = EvaluationConfig(
        **{**config.evaluation.model_dump(), **{k: v for k, v in settings.items() if v is not None}}
    )
    ranks = distributed.start()
    tokenizer = load_tokenizer(str(place.model_dir))
    corpus = distributed.rank0_first(lambda: corpora.load(config.data))
    cache = cache_dir(config.data.cache_dir)
    tokens = distributed.rank0_first(lambda: tokenise(corpus, split, tokenizer, config.data.max_tokens, cache))
    distributed.rank0_first(lambda: mauve.check(chosen, len(tokens)))
    fingerprint = agreed_fingerprint(tokens, tokenizer)
    nll_N = None if yardstick is None else yardstick_values(Path(yardstick), split, fingerprint, str(run))
    model, _ = load_model(run, prior)
    model.to(ranks.device)
    train = training_sentences(config, corpus, split, tokenizer, chosen.mi_train_sentences)
    found = evaluate(
        model,
        tokens,
        ranks,
        chosen,
        seed=config.seed,
        pad_id=tokenizer.pad_token_id,
        yardstick_N=nll_N,
        train=train,
    )
    language_model = None
    if yardstick is not None and chosen.samples:
        language_model = load_model(Path(yardstick))
        language_model[0].to(ranks.device)
    metrics = found.metrics | text_metrics(
        model,
        tokenizer,
        tokens,
        ranks,
        chosen,
        seed=config.seed,
        max_tokens=config.data.max_tokens,
        yardstick=language_model,
        train=None if train is None else train.tokens,
        features=None
        if chosen.mauve is None
        else mauve.features_of(chosen.mauve, config.model.base, tokenizer, config.data.max_tokens, ranks.device),
    )
    if not ranks.is_main:
        return None
    facts = {"model": str(place.model_dir), "split": split, "seed": config.seed, "yardstick": yardstick}
    if model.prior is not None:
        facts["prior"] = model.settings.prior
    metrics = {**facts, evaluations.FINGERPRINT: fingerprint, **metrics}
    evaluations.write(run, split, metrics, found.sentences)
    if split == "test" or not evaluations.metrics_file(run, "test").is_file():
        shown = _examples(model, tokenizer, config, metrics)
        write_card(place.model_dir, recipe=config, examples=shown, **_results(run, split))
    return metrics


def export(run: Path, to: Path, dtype: str | None = None) -> None:
    """Copy the model of a run to a new directory, which is complete when it gets its name.

    dtype: the dtype of the copied weights, such as `bfloat16`, which halves the file; None keeps that of the model. The
        conversion needs the memory of the converted weights.
    Raises ConfigError if that directory is not empty.
    """
    place = locate(run)
    if to.exists() and any(to.iterdir()):
        raise ConfigError(f"{to} is not empty; name a new directory")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as folder:
        fresh = Path(folder) / "fresh"
        left_out = () if dtype is None else ("model.safetensors",)
        shutil.copytree(place.model_dir, fresh, ignore=shutil.ignore_patterns(*left_out))
        if dtype is not None:
            kind: torch.dtype = getattr(torch, dtype)
            weights = {name: tensor.to(kind) for name, tensor in exported_weights(place.model_dir).items()}
            save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        # An export of an earlier version has no entries for transformers, and no recipe.
        stored = read_export(fresh)
        stored |= notes(run) | auto_code.entries(dtype or stored.get("dtype", "float32"))
        stored["t5"].pop("_name_or_path", None)
        limit = max_tokens(run)
        stored |= {} if limit is None else {MAX_TOKENS: limit}
        (fresh / "config.json").write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (fresh / auto_code.CODE).write_text(auto_code.source(), encoding="utf-8")
        if not (fresh / CARD).is_file():
            split = next((one for one in SPLITS if evaluations.metrics_file(run, one).is_file()), None)
            write_card(fresh, **({} if split is None else _results(run, split)))
        fresh.rename(to)


def _results(run: Path, split: str) -> dict[str, Any]:
    """The stored evaluation, and that of its yardstick, if it is still there, for the model card."""
    metrics = evaluations.read(run, split)
    yardstick = None
    if metrics.get("yardstick"):
        with suppress(CheckpointError):
            yardstick = evaluations.read(Path(metrics["yardstick"]), split)
    return {"evaluation": metrics, "language_model": yardstick}


def _examples(model: T5VAE, tokenizer: Any, config: RunConfig, metrics: dict[str, Any]) -> Examples:
    """Texts for the model card: of the prior, so that no sentence of the corpus gets there. Greedy, on this rank."""
    longest = config.data.max_tokens
    if model.bottleneck is None:
        return Examples(latents.sample(model, tokenizer, SAMPLES, max_new_tokens=longest, temperature=1.0))
    samples = latents.sample(model, tokenizer, SAMPLES, max_new_tokens=longest)
    unit = int(np.argmax(metrics["kl_per_dim"]))
    z_SL = latents.around(latents.prior_codes(model, 1)[0], unit, 3.0, 5)  # around the code of the first sample
    texts = latents.decode(model, tokenizer, z_SL, max_new_tokens=longest)
    return Examples(samples, unit, list(zip(z_SL[:, unit].tolist(), texts, strict=True)))


def config_of(run: Path, recipe: str | None) -> RunConfig:
    """The recipe of a run, or `recipe`. Raises ConfigError for an export alone."""
    if recipe is not None:
        return configuration.load(RunConfig, recipe)
    config = locate(run).config
    if config is None:
        raise ConfigError(f"{run} is an exported model, which has no data settings; select the data with --recipe")
    return config


def training_sentences(
    config: RunConfig, corpus: Any, split: str, tokenizer: Any, limit: int | None
) -> Training | None:
    """At most `limit` training sentences, drawn at random: of a stream, the first ones of its first windows.

    Only these are tokenised, so the cost does not depend on the size of the training split.
    """
    if not limit:
        return None
    if config.data.streaming:
        texts = _streamed(config, limit)
        return Training(from_texts(texts, tokenizer, config.data.max_tokens))
    rows = corpus.splits["train"]
    index_M = np.arange(len(rows))
    if limit < len(rows):
        index_M = np.sort(distributed.stream(config.seed, "mi-train").choice(len(rows), limit, replace=False))
    texts = [str(text) for text in rows.select(index_M)["text"]]
    return Training(from_texts(texts, tokenizer, config.data.max_tokens), index_M if split == "train" else None)


def _streamed(config: RunConfig, limit: int) -> list[str]:
    # The fingerprint is of no use here, and would read the whole file.
    lines = corpora.open_stream(config.data, fingerprint="")
    texts: list[str] = []
    for window in range(lines.windows):
        texts += lines.window(window, config.seed, 0, 0).sentences
        if len(texts) >= limit:
            break
    return texts[:limit]
