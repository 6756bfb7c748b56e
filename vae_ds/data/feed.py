"""The batches of a phase, in order. The source is a tokenised split or a file that is read as a stream.

A portion is a set of sentences that are shuffled together: a whole epoch, or one window of the stream. Its batches and
the random numbers of its sentences are functions of (seed, phase, epoch, window) only. Therefore a resumed run needs
only the position in the portion.

Bad lines of a stream are skipped. Every rank reads the same lines, so the number of skipped lines is the same on all.

Shapes: G sentences of a global batch, S batches of a portion.
"""

import logging
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_ds.config import BatchConfig
from vae_ds.data.batches import TokenSet, epoch_batches, from_texts
from vae_ds.data.corpora import LineStream
from vae_ds.data.progress import is_main
from vae_ds.data.tokens import report_truncation, report_unknown

log = logging.getLogger(__name__)


class Portion(NamedTuple):
    """The sentences of a portion, and the keys that identify them and their order.

    `bad`: number of lines that were skipped; `first_bad`: the place of the first one and what is wrong with it.
    """

    tokens: TokenSet
    keys: tuple[int, ...]
    bad: int = 0
    first_bad: str = ""


class Whole:
    """A tokenised split: each epoch is one portion."""

    windows = 1

    def __init__(self, tokens: TokenSet) -> None:
        self._tokens = tokens
        self.facts: dict[str, Any] = {"fingerprint": tokens.fingerprint, "sentences": len(tokens)}

    def portion(self, window: int, seed: int, phase: int, epoch: int) -> Portion:
        """The sentences of an epoch."""
        return Portion(self._tokens, (phase, epoch))


class Streamed:
    """A file that is tokenised window by window when needed, identically on every rank."""

    def __init__(self, lines: LineStream, tokenizer: Any, max_tokens: int) -> None:
        self._lines, self._tokenizer, self._max_tokens = lines, tokenizer, max_tokens
        self.windows = lines.windows
        self._unknown_reported = False
        self.facts: dict[str, Any] = {"fingerprint": lines.fingerprint, "bytes": lines.size}

    def portion(self, window: int, seed: int, phase: int, epoch: int) -> Portion:
        """The sentences of a window. Raises DataError for bad lines that are not skipped."""
        texts, skipped = self._lines.window(window, seed, phase, epoch)
        tokens = from_texts(texts, self._tokenizer, self._max_tokens)
        name = f"{self._lines.path}, epoch {epoch + 1}, window {window + 1} of {self.windows}"
        report_truncation(name, tokens, self._max_tokens)
        if not self._unknown_reported:
            self._unknown_reported = report_unknown(name, tokens)
        first = f"{self._lines.path}, from byte {skipped.first_bad[0]}: {skipped.reason}" if skipped.bad else ""
        return Portion(tokens, (phase, epoch, window), skipped.bad, first)


Source = Whole | Streamed


class Feed:
    """The batches of one phase, starting at `place` = [epoch, window, batch]. `take` advances `place`.

    bad_lines: number of bad lines that the run has skipped so far. A line counts each time that an epoch reads it.
    """

    def __init__(
        self, source: Source, batch: BatchConfig, seed: int, phase: int, place: list[int], bad_lines: int = 0
    ) -> None:
        """`place` is changed in place: the caller owns it and stores it in checkpoints, with `bad_lines`."""
        self._source, self._batch, self._seed, self._phase = source, batch, seed, phase
        self._place = place
        self._read: tuple[int, int] | None = None
        self.bad_lines, self._told_from = bad_lines, 0
        self.tokens: TokenSet
        self.keys: tuple[int, ...] = ()
        self._order_SG: NDArray[np.int64] = np.empty((0, 0), dtype=np.int64)

    def take(self) -> NDArray[np.int64]:
        """The next global batch: indices into `tokens`, int64 (G,). `keys` are the keys of its random numbers.

        Raises DataError if a portion is smaller than one batch or its text cannot be read.
        """
        epoch, window, number = self._place
        if self._read != (epoch, window):
            portion = self._source.portion(window, self._seed, self._phase, epoch)
            self.tokens, self.keys = portion.tokens, portion.keys
            self._count_bad(portion, is_new=number == 0)
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

    def upcoming(self) -> NDArray[np.int64] | None:
        """What the next `take` will return, if it is of the portion of the last one, else None. Changes nothing."""
        epoch, window, number = self._place
        return self._order_SG[number] if self._read == (epoch, window) else None

    def _count_bad(self, portion: Portion, is_new: bool) -> None:
        """Count the skipped lines of a portion, unless a resumed run reads it again. Log them each time they double."""
        self.bad_lines += portion.bad if is_new else 0
        if portion.bad and self.bad_lines >= self._told_from:
            self._told_from = 2 * self.bad_lines
            if is_main():
                message = "%s; skipped; the run has skipped %d bad lines so far; data.bad_lines=error refuses them"
                log.warning(message, portion.first_bad, self.bad_lines)

    @property
    def epoch(self) -> float:
        """Number of epochs taken so far, with the fraction of the current one."""
        epoch, window, number = self._place
        return epoch + (window + number / max(1, len(self._order_SG))) / self._source.windows
