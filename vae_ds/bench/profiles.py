"""Shapes of the published T5s and lengths of the sentences of known corpora: what a measurement of speed needs of both.

The weights of a shape are random and the words of a sentence are drawn at random, so nothing is downloaded. Speed and
memory depend on shapes and lengths only.
"""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import T5Config, T5ForConditionalGeneration

from vae_ds import distributed
from vae_ds.errors import ConfigError
from vae_ds.model import load_tokenizer

VOCABULARY = 32_128
"""Rows of the embedding of a published T5."""


@dataclass(frozen=True)
class Shape:
    """The shape of a T5. Both stacks have `num_layers` layers. The names are those of T5Config."""

    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int


SHAPES = {
    "tiny": Shape(128, 32, 512, 4, 2),
    "t5-small": Shape(512, 64, 2048, 8, 6),
    "t5-base": Shape(768, 64, 3072, 12, 12),
    "t5-large": Shape(1024, 64, 4096, 16, 24),
}
"""Shapes by name: those of the published T5s, and a small one for tests."""


@dataclass(frozen=True)
class Profile:
    """The lengths of the sentences of a corpus, in T5's subwords with the end-of-sentence token.

    mean_tokens: mean before the cut at `max_tokens`.
    spread: standard deviation divided by the mean.
    max_tokens: `data.max_tokens` of the recipe for this corpus.
    """

    mean_tokens: float
    spread: float
    max_tokens: int


PROFILES = {
    "ptb": Profile(27.45, 0.5, 128),
    "snli": Profile(14.67, 0.4, 128),
    "yahoo": Profile(114.0, 0.55, 256),
}
"""Profiles by the name of the recipe.

The means follow from the printed rows of Park & Lee 2021: 26.45, 13.67 and 113.0 subwords per sentence
(docs/published-code.md), and the end-of-sentence token. The spreads are assumptions: no paper prints them.
"""


def lengths(profile: str, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Lengths of `count` sentences, int64 (count,): from a log-normal distribution, cut at 2 and `max_tokens`.

    A function of its arguments only. Raises ConfigError if there is no such profile.
    """
    if profile not in PROFILES:
        raise ConfigError(f"there is no length profile {profile}; the profiles are {', '.join(PROFILES)}")
    told = PROFILES[profile]
    # Mean and deviation of the logarithm, from those of the length.
    sigma = np.sqrt(np.log1p(told.spread**2))
    drawn = distributed.stream(seed, "lengths", profile).lognormal(
        np.log(told.mean_tokens) - sigma**2 / 2, sigma, count
    )
    return np.clip(np.rint(drawn), 2, told.max_tokens).astype(np.int64)


def texts(profile: str, count: int, seed: int = 0) -> list[str]:
    """`count` sentences of random English words with the lengths of `lengths`, for the tokenizer of `random_base`."""
    words = _words()
    random = distributed.stream(seed, "words", profile)
    return [" ".join(words[random.integers(len(words), size=size - 1)]) for size in lengths(profile, count, seed)]


def longest_texts(tokens: int, count: int, seed: int = 0) -> list[str]:
    """`count` sentences of random English words, each with `tokens` subwords."""
    words, random = _words(), distributed.stream(seed, "longest")
    return [" ".join(words[random.integers(len(words), size=tokens - 1)]) for _ in range(count)]


@functools.cache
def _words() -> NDArray[np.str_]:
    """The words that the tokenizer of the shipped T5 keeps whole: each has one subword in any sentence."""
    tokenizer = load_tokenizer("tiny")
    whole = [piece[1:] for piece in tokenizer.get_vocab() if piece[0] == "▁" and piece[1:].isalpha()]
    return np.array(sorted(word for word in whole if len(tokenizer(word)["input_ids"]) == 2))


def random_base(folder: Path, size: str) -> Path:
    """Write a base with random weights, of one of SHAPES, and the tokenizer of the shipped T5. Returns `folder`.

    Raises ConfigError if there is no such shape.
    """
    if size not in SHAPES:
        raise ConfigError(f"there is no shape {size}; the shapes are {', '.join(SHAPES)}")
    shape: dict[str, Any] = asdict(SHAPES[size])
    config = T5Config(**shape, vocab_size=VOCABULARY)
    config.decoder_start_token_id = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return folder
