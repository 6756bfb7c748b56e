"""The micro batches of one rank on its device. A thread makes the next one while the device computes.

Shapes: G sentences of a global batch.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_ds.data.batches import Batch, TokenSet, collate
from vae_ds.data.cuts import Limits, Piece, share
from vae_ds.data.feed import Feed
from vae_ds.distributed import Ranks


class _Work(NamedTuple):
    """What a micro batch is made of: the sentences of a portion, the keys of their random numbers, and a piece."""

    tokens: TokenSet
    keys: tuple[int, ...]
    piece: Piece

    def is_that_of(self, other: "_Work") -> bool:
        mine, its = self.piece, other.piece
        same = self.tokens is other.tokens and self.keys == other.keys
        return same and np.array_equal(mine[0], its[0]) and np.array_equal(mine[1], its[1])


class MicroBatches:
    """The micro batches of `feed`: `take` begins a global batch, and then `next` gives its micro batches.

    What they contain does not depend on the thread, and `feed` is never further than the global batch that was taken,
    so a checkpoint has the right place. Costs the memory of one micro batch more.
    """

    def __init__(self, feed: Feed, ranks: Ranks, limits: Limits, **settings: Any) -> None:
        """`settings` are keyword arguments of `collate`, without `keys`."""
        self.feed, self._ranks, self._limits, self._settings = feed, ranks, limits, settings
        self._pool = ThreadPoolExecutor(1, "batches")
        self._left: deque[Piece] = deque()
        self._begun: tuple[_Work, Future[Batch]] | None = None

    def take(self) -> tuple[int, int]:
        """Begin the next global batch. Returns its sentences, on all ranks, and the micro batches of this rank.

        Raises DataError as `Feed.take`.
        """
        index_G = self.feed.take()
        self._left = deque(self._cut(index_G))
        return len(index_G), len(self._left)

    def next(self) -> Batch:
        """The next micro batch of the global batch, on the device. The thread begins the one after it."""
        work = self._work(self._left.popleft())
        begun, self._begun = self._begun, None
        batch = begun[1].result() if begun is not None and begun[0].is_that_of(work) else self._make(work)
        following = self._left[0] if self._left else self._first_of_the_next()
        if following is not None:
            later = self._work(following)
            self._begun = later, self._pool.submit(self._make, later)
        return batch

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)
        self._begun = None

    def _first_of_the_next(self) -> Piece | None:
        """None at the end of a portion: the next one is read when it is taken."""
        index_G = self.feed.upcoming()
        return None if index_G is None else self._cut(index_G)[0]

    def _cut(self, index_G: NDArray[np.int64]) -> list[Piece]:
        return share(index_G, self.feed.tokens.lengths_N, self._ranks.rank, self._ranks.world, self._limits)

    def _work(self, piece: Piece) -> _Work:
        return _Work(self.feed.tokens, self.feed.keys, piece)

    def _make(self, work: _Work) -> Batch:
        made = collate(work.tokens, *work.piece, keys=work.keys, **self._settings)
        return made.to(self._ranks.device)
