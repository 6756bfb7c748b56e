"""The batches of a phase, in order: of a split that is there whole, or of a file that is read as a stream.

A portion is what is shuffled together: a whole epoch, or a window of the stream. Its batches, and what is drawn for its
sentences, are functions of (seed, phase, epoch, window) alone, so that a place in it is all that a resumption needs.

Shapes: G sentences of a global batch, S batches of a portion.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_ds.config import BatchConfig
from vae_ds.data.batches import TokenSet, epoch_batches, from_texts
from vae_ds.data.corpora import LineStream
from vae_ds.data.tokens import tell_cut


class Whole:
    """A tokenised split: each epoch is one portion."""

    windows = 1

    def __init__(self, tokens: TokenSet) -> None:
        self._tokens = tokens
        self.facts: dict[str, Any] = {"fingerprint": tokens.fingerprint, "sentences": len(tokens)}

    def portion(self, window: int, seed: int, phase: int, epoch: int) -> tuple[TokenSet, tuple[int, ...]]:
        """The sentences, and the keys that name them and their order."""
        return self._tokens, (phase, epoch)


class Streamed:
    """A file whose windows are tokenised when their turn comes, on every rank alike."""

    def __init__(self, lines: LineStream, tokenizer: Any, max_tokens: int) -> None:
        self._lines, self._tokenizer, self._max_tokens = lines, tokenizer, max_tokens
        self.windows = lines.windows
        self.facts: dict[str, Any] = {"fingerprint": lines.fingerprint, "bytes": lines.size}

    def portion(self, window: int, seed: int, phase: int, epoch: int) -> tuple[TokenSet, tuple[int, ...]]:
        """The sentences, and the keys that name them and their order. Raises DataError for a line that is no text."""
        texts = self._lines.window(window, seed, phase, epoch)
        tokens = from_texts(texts, self._tokenizer, self._max_tokens)
        name = f"{self._lines.path}, epoch {epoch + 1}, window {window + 1} of {self.windows}"
        tell_cut(name, tokens, self._max_tokens)
        return tokens, (phase, epoch, window)


Source = Whole | Streamed


class Feed:
    """One phase's batches from `place` on: [epoch, window, batch], which moves on with each batch taken."""

    def __init__(self, source: Source, batch: BatchConfig, seed: int, phase: int, place: list[int]) -> None:
        """`place` is the caller's own, who keeps it in checkpoints."""
        self._source, self._batch, self._seed, self._phase = source, batch, seed, phase
        self._place = place
        self._read: tuple[int, int] | None = None
        self.tokens: TokenSet
        self.keys: tuple[int, ...] = ()
        self._order_SG: NDArray[np.int64] = np.empty((0, 0), dtype=np.int64)

    def take(self) -> NDArray[np.int64]:
        """The next global batch, int64 (G,), of `tokens`; `keys` are those of what is drawn for it.

        Raises DataError if a portion is smaller than one batch, or its text cannot be read.
        """
        epoch, window, number = self._place
        if self._read != (epoch, window):
            self.tokens, self.keys = self._source.portion(window, self._seed, self._phase, epoch)
            size, bucket = self._batch.global_size, self._batch.bucket_batches
            self._order_SG = epoch_batches(self.tokens.lengths_N, size, bucket, self._seed, *self.keys)
            self._read = (epoch, window)
        number += 1
        if number == len(self._order_SG):
            window, number = window + 1, 0
        if window == self._source.windows:
            epoch, window = epoch + 1, 0
        taken: NDArray[np.int64] = self._order_SG[self._place[2]]
        self._place[:] = [epoch, window, number]
        return taken

    @property
    def epoch(self) -> float:
        """Epochs taken so far."""
        epoch, window, number = self._place
        return epoch + (window + number / max(1, len(self._order_SG))) / self._source.windows
