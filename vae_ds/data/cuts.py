"""Cut a global batch, or a split, into batches of similar lengths that fit into memory, one list for each rank.

Shapes: N sentences of a split, G sentences of a global batch, B sentences of a batch of one rank.

The size of a batch is its number of tokens: its sentences times its longest sentence, so padding counts. The encoder
and the decoder each get so many positions. All ranks know all lengths. Therefore each of them finds the cut of all
ranks by itself, and the ranks agree on the number of batches without a collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_ds.config import BatchConfig
from vae_ds.errors import ConfigError

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.float32]
Piece = tuple[NDArray[np.int64], Floats]
"""The sentences of a batch and their weights: index_B, weight_B. A weight is 1, or 0 for a filler."""

SENTENCES = 64  # `auto` without a GPU: so many sentences of the maximum length
LOGITS = 1 << 29  # of a forward pass in an evaluation: 2 GiB of float32


@dataclass(frozen=True)
class Limits:
    """What a forward pass of one rank may hold: sentences, and tokens with padding. None: no limit."""

    sentences: int | None = None
    tokens: int | None = None

    def count(self, longest: int, of: int) -> int:
        """How many of `of` sentences of `longest` tokens fit: at least 1."""
        by_tokens = of if self.tokens is None else self.tokens // max(1, longest)
        return max(1, min(of, by_tokens, of if self.sentences is None else self.sentences))

    def __str__(self) -> str:
        words = [f"{limit:,} {name}" for name, limit in vars(self).items() if limit is not None]
        return " and ".join(words) or "a rank's whole share"


def limits_of(batch: BatchConfig, world: int, max_tokens: int, sentences: int = SENTENCES) -> Limits:
    """The limits that a recipe states. If both are `auto`, so many tokens as `sentences` of the maximum length have.

    Raises ConfigError if the global batch has fewer sentences than there are ranks.
    """
    if batch.global_size < world:
        raise ConfigError(
            f"batch.global {batch.global_size} has fewer sentences than there are ranks ({world}); set batch.global to "
            f"{world} or more, or start at most {batch.global_size} ranks"
        )
    micro = None if batch.micro == "auto" else batch.micro
    tokens = None if batch.tokens == "auto" else batch.tokens
    if micro is None and tokens is None:
        tokens = sentences * max_tokens
    return Limits(micro, tokens)


def logit_tokens(tokens: int | str, vocabulary: int) -> int:
    """The tokens of a forward pass in an evaluation; `auto` bounds the logits, which are the largest tensor there."""
    return max(1, LOGITS // vocabulary) if tokens == "auto" else int(tokens)


def share(index_G: Ints, lengths_N: Ints, rank: int, world: int, limits: Limits) -> list[Piece]:
    """Micro batches of one rank. Each sentence of the global batch has weight 1 in exactly one of them, on one rank.

    All ranks get the same number of micro batches, the smallest one within the limits, and none is empty. A sentence
    longer than the limit is a micro batch of its own. The limits are lowered as far as this number permits, so that
    the micro batches are alike. If sentences do not suffice for all ranks, a rank gets a filler of weight 0: only in a
    batch that does not divide over the ranks, if no micro batch may have more than one sentence.

    The sentences are sorted by length, longest first, so that a batch that does not fit into memory fails at once. At
    each micro step the ranks take adjacent pieces of about as many tokens, so that they compute for about as long.
    """
    order_G = index_G[np.argsort(-lengths_N[index_G], kind="stable")].astype(np.int64)
    lengths = lengths_N[order_G].tolist()
    starts = _starts(lengths, world, _lowered(lengths, world, limits))
    total = len(lengths)
    lacking = world - (total - starts[-1])
    if lacking > 0 and len(starts) > 1 and starts[-1] - starts[-2] >= world + lacking:
        starts[-1] = total - world  # the last micro step takes sentences from the one before, instead of fillers
    return [_piece(order_G, lengths, start, end, rank, world, limits) for start, end in pairwise([*starts, total])]


def evaluation_batches(lengths_N: Ints, limits: Limits, rank: int, world: int) -> list[Piece]:
    """Evaluation batches of one rank. Each sentence has weight 1 in exactly one batch of one rank.

    All ranks get the same number of batches, each of sentences of similar length and within the limits. A sentence
    longer than the limit is a batch of its own. If the last sentences do not suffice for all ranks, a rank gets one
    filler sentence of weight 0.
    """
    order_N = np.argsort(-lengths_N, kind="stable")
    lengths = lengths_N[order_N]
    starts = _starts(lengths, world, limits)
    return [
        _piece(order_N, lengths, start, end, rank, world, limits) for start, end in pairwise([*starts, len(order_N)])
    ]


def _starts(lengths: Sequence[int] | Ints, world: int, limits: Limits) -> list[int]:
    """Where each micro step of all ranks together begins. `lengths` fall, so the first of a step is its longest."""
    starts, start = [], 0
    while start < len(lengths):
        starts.append(start)
        start += world * limits.count(int(lengths[start]), len(lengths))
    return starts


def _lowered(lengths: Sequence[int], world: int, limits: Limits) -> Limits:
    """The smallest limits with which the number of micro steps stays the same."""
    steps = len(_starts(lengths, world, limits))
    for name, limit in vars(limits).items():
        if limit is None:
            continue
        low, high = 0, int(limit)  # `high` keeps the number, `low` is too small
        while high - low > 1:
            middle = (low + high) // 2
            keeps = len(_starts(lengths, world, replace(limits, **{name: middle}))) == steps
            low, high = (low, middle) if keeps else (middle, high)
        limits = replace(limits, **{name: high})
    return limits


def _piece(
    order_G: Ints, lengths: Sequence[int] | Ints, start: int, end: int, rank: int, world: int, limits: Limits
) -> Piece:
    """The part of one rank of the sentences from `start` to `end`. `lengths` are those of `order_G`, and fall."""
    if end - start < world:
        place = start + min(rank, end - start)
        index_B = order_G[place : min(place + 1, end)].astype(np.int64)
    else:
        ends = [0, *_even_ends([int(length) for length in lengths[start:end]], world, limits.sentences)]
        index_B = order_G[start + ends[rank] : start + ends[rank + 1]].astype(np.int64)
    if len(index_B):
        return index_B, np.ones(len(index_B), np.float32)
    return order_G[-1:].astype(np.int64), np.zeros(1, np.float32)


def _even_ends(lengths: Sequence[int], world: int, most_sentences: int | None) -> list[int]:
    """Where the part of each rank ends, so that the part with most tokens, with padding, has as few as possible.

    A part has one sentence at least and `most_sentences` at most, if equal parts do. No part has more tokens than the
    largest of equal parts.
    """
    total = len(lengths)
    if world == 1:
        return [total]
    each, rest = divmod(total, world)
    firsts = [rank * each + min(rank, rest) for rank in range(world)]
    high = max(lengths[first] * (each + (rank < rest)) for rank, first in enumerate(firsts))
    low = lengths[0] - 1  # too few; `high` suffices
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _ends(lengths, world, middle, most_sentences)[-1] == total else (middle, high)
    return _ends(lengths, world, high, most_sentences)


def _ends(lengths: Sequence[int], world: int, most_tokens: int, most_sentences: int | None) -> list[int]:
    """Where parts of at most so many tokens end, if each takes what it can. The last end says how far that reaches."""
    ends, at = [], 0
    for later in reversed(range(world)):
        fitting = most_tokens // lengths[at]
        if most_sentences is not None:
            fitting = min(fitting, most_sentences)
        at += min(fitting, len(lengths) - at - later)  # one for each later rank
        ends.append(at)
    return ends
