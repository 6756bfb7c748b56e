"""The batches of a phase, in order. The source is a tokenised split or a file that is read as a stream.

A portion is a set of sentences that are shuffled together: a whole epoch, or one window of the stream. Its batches and
the random numbers of its sentences are functions of (seed, phase, epoch, window) only. Therefore a resumed run needs
only the position in the portion.

Shapes: G sentences of a global batch, S batches of a portion.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_ds.config import BatchConfig
from vae_ds.data.batches import TokenSet, epoch_batches, from_texts
from vae_ds.data.corpora import LineStream
from vae_ds.data.tokens import report_truncation, report_unknown


class Whole:
    """A tokenised split: each epoch is one portion."""

    windows = 1

    def __init__(self, tokens: TokenSet) -> None:
        self._tokens = tokens
        self.facts: dict[str, Any] = {"fingerprint": tokens.fingerprint, "sentences": len(tokens)}

    def portion(self, window: int, seed: int, phase: int, epoch: int) -> tuple[TokenSet, tuple[int, ...]]:
        """The sentences, and the keys that identify them and their order."""
        return self._tokens, (phase, epoch)


class Streamed:
    """A file that is tokenised window by window when needed, identically on every rank."""

    def __init__(self, lines: LineStream, tokenizer: Any, max_tokens: int) -> None:
        self._lines, self._tokenizer, self._max_tokens = lines, tokenizer, max_tokens
        self.windows = lines.windows
        self._unknown_reported = False
        self.facts: dict[str, Any] = {"fingerprint": lines.fingerprint, "bytes": lines.size}

    def portion(self, window: int, seed: int, phase: int, epoch: int) -> tuple[TokenSet, tuple[int, ...]]:
        """The sentences, and the keys that identify them and their order. Raises DataError for an invalid line."""
        texts = self._lines.window(window, seed, phase, epoch)
        tokens = from_texts(texts, self._tokenizer, self._max_tokens)
        name = f"{self._lines.path}, epoch {epoch + 1}, window {window + 1} of {self.windows}"
        report_truncation(name, tokens, self._max_tokens)
        if not self._unknown_reported:
            self._unknown_reported = report_unknown(name, tokens)
        return tokens, (phase, epoch, window)


Source = Whole | Streamed


class Feed:
    """The batches of one phase, starting at `place` = [epoch, window, batch]. `take` advances `place`."""

    def __init__(self, source: Source, batch: BatchConfig, seed: int, phase: int, place: list[int]) -> None:
        """`place` is changed in place: the caller owns it and stores it in checkpoints."""
        self._source, self._batch, self._seed, self._phase = source, batch, seed, phase
        self._place = place
        self._read: tuple[int, int] | None = None
        self.tokens: TokenSet
        self.keys: tuple[int, ...] = ()
        self._order_SG: NDArray[np.int64] = np.empty((0, 0), dtype=np.int64)

    def take(self) -> NDArray[np.int64]:
        """The next global batch: indices into `tokens`, int64 (G,). `keys` are the keys of its random numbers.

        Raises DataError if a portion is smaller than one batch or its text cannot be read.
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
        """Number of epochs taken so far, with the fraction of the current one."""
        epoch, window, number = self._place
        return epoch + (window + number / max(1, len(self._order_SG))) / self._source.windows
