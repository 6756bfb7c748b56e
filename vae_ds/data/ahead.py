"""The micro batches of one rank on its device. A thread makes the next one while the device computes.

Shapes: G sentences of a global batch.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_ds.data.batches import Batch, TokenSet, collate
from vae_ds.data.cuts import Limits, Piece, share
from vae_ds.data.feed import Feed
from vae_ds.distributed import Ranks


class MicroBatches:
    """The micro batches of `feed`: `take` begins a global batch, and then `next` gives each of its micro batches.

    What they contain does not depend on the thread, and `feed` is never further than the global batch that was taken,
    so a checkpoint has the right place. Costs the memory of one micro batch more.
    """

    def __init__(self, feed: Feed, ranks: Ranks, limits: Limits, **settings: Any) -> None:
        """`settings` are keyword arguments of `collate`, without `keys`."""
        self.feed, self._ranks, self._limits, self._settings = feed, ranks, limits, settings
        self._pool = ThreadPoolExecutor(1, "batches")
        self._left: deque[Piece] = deque()  # of the global batch that was taken
        self._upcoming: list[Piece] | None = None  # of the one after it, if it is known
        self._begun: Future[Batch] | None = None  # the next micro batch

    def take(self) -> tuple[int, int]:
        """Begin the next global batch, after `next` gave all of the last one.

        Returns its number of sentences, on all ranks, and of micro batches of this rank. Raises DataError as
        `Feed.take`.
        """
        index_G = self.feed.take()
        self._left = deque(self._cut(index_G) if self._upcoming is None else self._upcoming)
        self._upcoming = None
        return len(index_G), len(self._left)

    def next(self) -> Batch:
        """The next micro batch of the global batch, on the device. The thread begins the one after it."""
        piece = self._left.popleft()
        batch = self._make(self.feed.tokens, self.feed.keys, piece) if self._begun is None else self._begun.result()
        following = self._left[0] if self._left else self._first_of_the_next()
        self._begun = None
        if following is not None:
            self._begun = self._pool.submit(self._make, self.feed.tokens, self.feed.keys, following)
        return batch

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _first_of_the_next(self) -> Piece | None:
        """None at the end of a portion: the next one is read when it is taken."""
        index_G = self.feed.upcoming()
        if index_G is None:
            return None
        self._upcoming = self._cut(index_G)
        return self._upcoming[0]

    def _cut(self, index_G: NDArray[np.int64]) -> list[Piece]:
        return share(index_G, self.feed.tokens.lengths_N, self._ranks.rank, self._ranks.world, self._limits)

    def _make(self, tokens: TokenSet, keys: tuple[int, ...], piece: Piece) -> Batch:
        return collate(tokens, *piece, keys=keys, **self._settings).to(self._ranks.device)
