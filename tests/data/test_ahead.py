"""Micro batches that a thread makes ahead are those that are made when they are needed."""

import threading

import pytest
import torch

from support.tiny import ENGLISH
from vae_ds.config import BatchConfig
from vae_ds.data import Batch, Feed, Limits, MicroBatches, Whole, ahead, collate, from_texts, share
from vae_ds.distributed import Ranks
from vae_ds.model import load_tokenizer

RANKS = Ranks(rank=1, local_rank=1, world=2, device=torch.device("cpu"))
SETTINGS = {"pad_id": 0, "latent_dim": 3, "seed": 5, "denoise": 0.3, "sample": True}
# Micro batches of 3 sentences: a global batch of 16 needs several, and an epoch has 3 global batches.
LIMITS = Limits(sentences=3)
STEPS = 8


def made(place: list[int], batch: BatchConfig) -> Feed:
    return Feed(Whole(from_texts(ENGLISH[:50], load_tokenizer("tiny"), 24)), batch, 5, 0, place)


def direct(feed: Feed, steps: int) -> list[list[Batch]]:
    """Without a thread and without the class: the formula."""
    found = []
    for _ in range(steps):
        index_G = feed.take()
        pieces = share(index_G, feed.tokens.lengths_N, RANKS.rank, RANKS.world, LIMITS)
        found.append([collate(feed.tokens, *piece, keys=feed.keys, **SETTINGS) for piece in pieces])
    return found


def equal(one: Batch, other: Batch) -> bool:
    names = ("index_B", "input_ids_BT", "attention_mask_BT", "labels_BT", "eps_BL", "weight_B")
    return one.tokens == other.tokens and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.fixture
def batch() -> BatchConfig:
    return BatchConfig.model_validate({"global": 16})


def test_they_are_those_of_the_formula_over_several_epochs(batch: BatchConfig) -> None:
    wanted = direct(made([0, 0, 0], batch), STEPS)
    place = [0, 0, 0]
    batches = MicroBatches(made(place, batch), RANKS, LIMITS, **SETTINGS)
    after = made(steps := [0, 0, 0], batch)
    for expected in wanted:
        sentences, number = batches.take()
        assert (sentences, number) == (16, len(expected))
        assert all(equal(batches.next(), one) for one in expected)
        # A checkpoint here resumes with the next global batch, whatever the thread has begun.
        after.take()
        assert place == steps
    batches.close()


def test_the_next_one_is_made_by_the_thread(batch: BatchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once: list[bool] = []
    monkeypatch.setattr(ahead, "collate", lambda *a, **k: at_once.append(on_main()) or collate(*a, **k))
    batches = MicroBatches(made([0, 0, 0], batch), RANKS, LIMITS, **SETTINGS)
    for _ in range(3):  # an epoch
        for _ in range(batches.take()[1]):
            batches.next()
    batches.close()
    assert at_once == [True] + [False] * (len(at_once) - 1)


def test_a_fault_of_the_thread_is_raised_where_the_batch_is_needed(
    batch: BatchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = MicroBatches(made([0, 0, 0], batch), RANKS, LIMITS, **SETTINGS)
    batches.take()

    def fails(*_: object, **__: object) -> Batch:
        raise OSError("the file of token ids is gone")

    monkeypatch.setattr(ahead, "collate", lambda *a, **k: (collate if on_main() else fails)(*a, **k))
    batches.next()
    with pytest.raises(OSError, match="is gone"):
        batches.next()
    batches.close()


def on_main() -> bool:
    return threading.current_thread() is threading.main_thread()
