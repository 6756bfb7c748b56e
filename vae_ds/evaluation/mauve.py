"""MAUVE (Pillutla et al. 2021): how close the distribution of written texts is to that of the corpus, 0 to 1.

The texts become feature vectors, both sets together are divided into clusters, and the two histograms over the clusters
are compared along a curve of divergences. The package mauve-text computes it. A value depends on the features and on
the number of texts: values compare only if both are equal.

Shapes: N texts, H features.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vae_ds import latents
from vae_ds.config import EvaluationConfig, ModelConfig
from vae_ds.data import Limits, collate, evaluation_batches, from_texts
from vae_ds.errors import ConfigError, DataError
from vae_ds.evaluation.metrics import Metrics
from vae_ds.model import T5VAE
from vae_ds.runtime import require

Features = Callable[[Sequence[str]], NDArray[np.float32]]
"""From N texts to vectors (N, H)."""

BASE = "base"
LEAST = 2000  # texts; with fewer, the histograms say little (the package's own advice is 5,000)
CLUSTERINGS = 5
SENTENCES, TOKENS = 128, 1 << 14  # at most, of one forward pass
KINDS = ("gpt2", "bert")  # a part of the names of models that the package loads
MOST_TOKENS = 1024  # of a text, for a model that is not a T5


def check(settings: EvaluationConfig, sentences: int) -> None:
    """Raise ConfigError or DataError if MAUVE is asked for and cannot be computed on so many sentences.

    Called before the metrics that take hours: the model of the features must be at hand.
    """
    if settings.mauve is None:
        return
    require("mauve", "mauve-text", "mauve", "evaluation.mauve")
    if (settings.samples or 0) < LEAST:
        raise ConfigError(
            f"evaluation.mauve: needs {LEAST:,} samples or more, evaluation.samples is {settings.samples or 0}; "
            f"add --samples {LEAST}"
        )
    if sentences < LEAST:
        raise DataError(f"evaluation.mauve: needs {LEAST:,} sentences or more; the split has {sentences:,}")
    if settings.mauve != BASE:
        from transformers import AutoConfig, AutoTokenizer

        try:
            AutoConfig.from_pretrained(settings.mauve)
            AutoTokenizer.from_pretrained(settings.mauve)
            if not any(kind in settings.mauve for kind in KINDS):
                raise ValueError(f"mauve-text knows only names with {' or '.join(KINDS)}")
        except (OSError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"evaluation.mauve: {settings.mauve} is neither `{BASE}` nor a GPT-2 or BERT that can be loaded: {line}"
            ) from None


def features_of(name: str, base: str, tokenizer: Any, max_tokens: int, device: torch.device) -> Features:
    """The features that `evaluation.mauve` names.

    `base`: the mean of the encoder's last states of the pretrained base of the model. Any other name or path is that of
    a GPT-2 or BERT, of which the last state of the last token is taken, as the package does: `gpt2-large` gives the
    features of most published values.
    """
    if name == BASE:
        loaded = functools.cache(_encoder)
        return lambda texts: _pooled(loaded(base, device), tokenizer, texts, max_tokens)

    def of(texts: Sequence[str]) -> NDArray[np.float32]:
        from mauve.compute_mauve import get_features_from_input

        number = -1 if device.type == "cpu" else device.index
        found: NDArray[np.float32] = get_features_from_input(
            None, None, texts, name, MOST_TOKENS, number, "", SENTENCES
        )
        return found

    return of


def pooled_base(
    base: str, tokenizer: Any, texts: Sequence[str], max_tokens: int, device: torch.device
) -> NDArray[np.float32]:
    """The mean of the encoder's last states of the pretrained base over the tokens of each text, float32 (N, H).

    Raises ConfigError if the base is not at hand.
    """
    return _pooled(_encoder(base, device), tokenizer, texts, max_tokens)


def _encoder(base: str, device: torch.device) -> Any:
    return T5VAE.from_base(ModelConfig(base=base, latent_dim=1)).t5.encoder.to(device)


def _pooled(encoder: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int) -> NDArray[np.float32]:
    tokens = from_texts(texts, tokenizer, max_tokens)
    pooled_NH = np.zeros((len(texts), encoder.config.d_model), np.float32)
    with latents.inference(encoder):
        for index_B, _ in evaluation_batches(tokens.lengths_N, Limits(SENTENCES, TOKENS), 0, 1):
            batch = collate(
                tokens, index_B, pad_id=tokenizer.pad_token_id, latent_dim=1, seed=0, keys=(), sample=False, eval=True
            ).to(encoder.device)
            mask_BT = batch.attention_mask_BT
            states_BTH = encoder(input_ids=batch.input_ids_BT, attention_mask=mask_BT).last_hidden_state.float()
            sums_BH = (states_BTH * mask_BT[:, :, None]).sum(1)
            pooled_NH[index_B] = (sums_BH / mask_BT.sum(1, keepdim=True)).cpu().numpy()
    return pooled_NH


def mauve(written: Sequence[str], corpus: Sequence[str], train: Sequence[str] | None, features: Features) -> Metrics:
    """`mauve` of written texts against sentences of the split, and `mauve_train` of training sentences against them.

    `mauve_train` is about what texts as good as the corpus reach at this number of texts. Each is the mean over
    CLUSTERINGS clusterings; `<metric>_sd` is the standard deviation over them. `mauve_texts`: the number of texts of
    each kind, the smaller of those of `written` and `corpus`. With fewer sentences of `train`, there is no
    `mauve_train`.
    """
    count = min(len(written), len(corpus))
    corpus_NH = features(corpus[:count])
    found: Metrics = {"mauve_texts": count, "mauve_train": None, "mauve_train_sd": None}
    found |= _score("mauve", corpus_NH, features(written[:count]))
    if train is not None and len(train) >= count:
        found |= _score("mauve_train", corpus_NH, features(train[:count]))
    return found


def _score(name: str, corpus_NH: NDArray[np.float32], other_NH: NDArray[np.float32]) -> Metrics:
    from mauve import compute_mauve

    values = [
        float(compute_mauve(p_features=corpus_NH, q_features=other_NH, seed=seed).mauve) for seed in range(CLUSTERINGS)
    ]
    return {name: float(np.mean(values)), f"{name}_sd": float(np.std(values, ddof=1))}
