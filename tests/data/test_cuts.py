"""What would silently break training and evaluation: sentences lost, doubled or in batches that do not fit."""

import math
from typing import Any

import numpy as np
import pytest

from vae_ds.config import BatchConfig
from vae_ds.data.batches import epoch_batches
from vae_ds.data.cuts import LOGITS, Limits, evaluation_batches, limits_of, logit_tokens, share
from vae_ds.errors import ConfigError

WORLDS = [1, 2, 3, 4, 7]
LIMITS = [Limits(), Limits(1), Limits(5), Limits(8), Limits(None, 60), Limits(None, 300), Limits(6, 200)]


@pytest.fixture
def lengths_N() -> np.ndarray:
    return np.random.default_rng(1).integers(2, 60, size=1003).astype(np.int32)


def by_length(index: np.ndarray, lengths_N: np.ndarray) -> list[int]:
    """The longest first, sorted by Python, whose sort keeps the order of equal lengths on each machine."""
    return sorted(index.tolist(), key=lambda sentence: -int(lengths_N[sentence]))


def steps_of(ranks: list[list[Any]]) -> list[tuple[Any, ...]]:
    """The pieces of all ranks, by micro step. Ranks with different numbers of micro batches would wait forever."""
    return list(zip(*ranks, strict=True))


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("size", [96, 97, 7])
def test_a_cut_holds_each_sentence_once_within_its_limits(
    size: int, world: int, limits: Limits, lengths_N: np.ndarray
) -> None:
    index_G = epoch_batches(lengths_N, size, 4, 0, 0, 0)[3]
    steps = steps_of([share(index_G, lengths_N, rank, world, limits) for rank in range(world)])
    pieces = [piece for step in steps for piece in step]
    real = np.concatenate([index_B[weight_B > 0] for index_B, weight_B in pieces])
    assert real.tolist() == by_length(index_G, lengths_N)
    for index_B, weight_B in pieces:
        assert (index_B.dtype, weight_B.dtype) == (np.int64, np.float32)
        assert 1 <= len(index_B) == len(weight_B) <= (limits.sentences or size)
        tokens = len(index_B) * lengths_N[index_B].max()
        assert len(index_B) == 1 or tokens <= (limits.tokens or math.inf)


@pytest.mark.parametrize("world", WORLDS)
def test_only_a_batch_that_does_not_divide_needs_fillers(world: int, lengths_N: np.ndarray) -> None:
    """A filler is computed for nothing."""
    for size, limits in [(world * 13, limits) for limits in LIMITS] + [(world * 13 + 1, Limits(4)), (world, LIMITS[1])]:
        index_G = np.random.default_rng(size).permutation(1003)[:size]
        pieces = [piece for rank in range(world) for piece in share(index_G, lengths_N, rank, world, limits)]
        assert all(weight_B.all() for _, weight_B in pieces), (size, limits)
    if world > 1:
        ranks = [share(np.arange(world + 1), lengths_N, rank, world, Limits(1)) for rank in range(world)]
        assert [[float(weight_B[0]) for _, weight_B in pieces] for pieces in ranks] == [[1, 1], *[[1, 0]] * (world - 1)]


def test_a_number_that_divides_gives_equal_micro_batches(lengths_N: np.ndarray) -> None:
    """As in version 0.2: adjacent pieces of the order by length."""
    index_G = np.random.default_rng(0).permutation(1003)[:960].astype(np.int32)
    order = np.array(by_length(index_G, lengths_N)).reshape(-1, 4, 6)
    for rank in range(4):
        pieces = [index_B.tolist() for index_B, _ in share(index_G, lengths_N, rank, 4, Limits(6))]
        assert pieces == order[:, rank].tolist()


@pytest.mark.parametrize(("size", "world"), [(134, 2), (536, 8), (67, 1), (130, 2)])
def test_a_prime_share_does_not_become_micro_batches_of_one(size: int, world: int, lengths_N: np.ndarray) -> None:
    limits = limits_of(BatchConfig(global_size=size, micro=16), world, 60)
    for rank in range(world):
        pieces = share(np.arange(size), lengths_N, rank, world, limits)
        assert len(pieces) == math.ceil(size / world / 16)
        assert min(len(index_B) for index_B, _ in pieces) > 6
    limits = limits_of(BatchConfig(global_size=size), world, 60)
    assert len(share(np.arange(size), lengths_N, 0, world, limits)) <= math.ceil(size / world / 64)


def test_micro_batches_are_few_and_alike(lengths_N: np.ndarray) -> None:
    """A last micro batch of a few short sentences takes as long as any other: kernels have a least time."""
    index_G = np.random.default_rng(0).permutation(1003)[:256]
    pieces = share(index_G, lengths_N, 0, 1, Limits(None, 1000))
    order = by_length(index_G, lengths_N)
    least, start = 0, 0
    while start < len(order):
        least, start = least + 1, start + 1000 // int(lengths_N[order[start]])
    assert len(pieces) == least
    tokens = [len(index_B) * int(lengths_N[index_B].max()) for index_B, _ in pieces]
    assert min(tokens) > 0.5 * max(tokens)
    assert lengths_N[pieces[0][0]].max() == lengths_N[index_G].max()  # the longest first


def test_ranks_compute_for_about_the_same_time(lengths_N: np.ndarray) -> None:
    index_G = np.random.default_rng(0).permutation(1003)[:96]
    for step in steps_of([share(index_G, lengths_N, rank, 4, Limits(None, 240)) for rank in range(4)]):
        assert np.ptp([lengths_N[index_B].max() for index_B, _ in step]) < 20
        assert max(np.ptp(lengths_N[index_B]) for index_B, _ in step) < 12


@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("size", [64, 256])
def test_no_rank_waits_long_for_another(size: int, world: int) -> None:
    """The longest sentences of a step are on one rank. In equal parts, the slowest of 8 has 6 to 10% more tokens."""
    random = np.random.default_rng(0)
    lengths_N = np.clip(np.rint(random.lognormal(3.2, 0.47, 20_000)), 2, 128).astype(np.int64)
    mean = most = equal = 0
    for index_G in epoch_batches(lengths_N, size, 32, 0, 0, 0)[:60]:
        limits = Limits(None, 64 * 128)
        parts = [share(index_G, lengths_N, rank, world, limits) for rank in range(world)]
        tokens = [sum(len(index_B) * int(lengths_N[index_B].max()) for index_B, _ in pieces) for pieces in parts]
        mean, most = mean + sum(tokens) / world, most + max(tokens)
        equal += max(
            len(part) * int(lengths_N[part].max()) for part in np.split(np.array(by_length(index_G, lengths_N)), world)
        )
    assert most < 1.03 * mean if size > 8 * world else most < 1.05 * mean
    assert most <= equal


def test_fewer_sentences_than_ranks() -> None:
    with pytest.raises(ConfigError) as error:
        limits_of(BatchConfig(global_size=32), 64, 60)
    assert str(error.value) == (
        "batch.global 32 has fewer sentences than there are ranks (64); set batch.global to 64 or more, or start at "
        "most 32 ranks"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Limits(None, 64 * 60)),
        ({"micro": 7}, Limits(7, None)),
        ({"tokens": 500}, Limits(None, 500)),
        ({"micro": 7, "tokens": 500}, Limits(7, 500)),
    ],
)
def test_what_the_settings_mean(settings: dict[str, Any], expected: Limits) -> None:
    assert limits_of(BatchConfig(**settings), 2, 60) == expected


def test_the_logits_of_an_evaluation_are_bounded() -> None:
    """128 sentences of 256 tokens would be 33 GB of logits for mT5."""
    assert logit_tokens("auto", 250_112) == 2146
    assert logit_tokens("auto", 2 * LOGITS) == 1
    assert logit_tokens(77, 250_112) == 77


@pytest.mark.parametrize("count", [1, 2, 7, 37, 64])
@pytest.mark.parametrize(("world", "batch"), [(1, 1), (1, 8), (2, 8), (3, 5), (4, 16)])
@pytest.mark.parametrize("tokens", [None, 20, 120])
def test_evaluation_sees_each_sentence_once(
    count: int, world: int, batch: int, tokens: int | None, lengths_N: np.ndarray
) -> None:
    lengths_N = lengths_N[:count]
    ranks = [evaluation_batches(lengths_N, Limits(batch, tokens), rank, world) for rank in range(world)]
    steps = steps_of(ranks)
    assert len(steps) == math.ceil(count / (batch * world)) or tokens is not None
    seen = np.zeros(count)
    for index_B, weight_B in (pair for step in steps for pair in step):
        assert 1 <= len(index_B) == len(weight_B) <= batch
        assert len(index_B) == 1 or len(index_B) * lengths_N[index_B].max() <= (tokens or math.inf)
        assert weight_B.dtype == np.float32
        np.add.at(seen, index_B, weight_B)
    assert (seen == 1).all()


def test_an_evaluation_begins_with_the_longest_and_fills_with_the_shortest(lengths_N: np.ndarray) -> None:
    """What does not fit into memory fails at once, and a filler costs little. Equal lengths stay in order."""
    lengths_N = lengths_N[:321]
    ranks = [evaluation_batches(lengths_N, Limits(5), rank, 4) for rank in range(4)]
    steps = [pair for step in steps_of(ranks) for pair in step]
    real = np.concatenate([index_B[weight_B > 0] for index_B, weight_B in steps])
    expected = by_length(np.arange(321), lengths_N)
    assert real.tolist() == expected
    assert [index_B.tolist() for index_B, weight_B in steps if not weight_B.all()] == [[expected[-1]]] * 3
