"""A training file read as a stream: in windows of blocks, in an order drawn anew each epoch, without a full pass.

A block owns the lines that begin in it, so that every line is in one block alone. A window is a few blocks from all
over the file, whose lines are then shuffled together: near enough to a shuffle of the file, in constant memory.

Shapes: W windows of an epoch, K blocks of the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vae_ds.config import DataConfig
from vae_ds.data.cache import digest
from vae_ds.data.corpora import delimited, layouts, text
from vae_ds.distributed import stream
from vae_ds.errors import DataError

BLOCK_BYTES = 1 << 16
WINDOW_BLOCKS = 64  # 4 MiB: some fifty thousand sentences
_PROBES = 16  # blocks that the fingerprint reads


@dataclass(frozen=True)
class LineStream:
    """The lines of a file of plain text or JSON lines, by window. `fingerprint` is of its size and of some blocks."""

    path: Path
    data: DataConfig
    size: int
    fingerprint: str
    block_bytes: int
    window_blocks: int

    @property
    def blocks(self) -> int:
        """K, one at least."""
        return max(1, -(-self.size // self.block_bytes))

    @property
    def windows(self) -> int:
        """W, one at least; the blocks divide among them about evenly."""
        return max(1, self.blocks // self.window_blocks)

    def window(self, number: int, seed: int, *keys: int) -> list[str]:
        """The sentences of a window of the epoch that `seed` and `keys` name, block by block.

        Raises DataError with the line's place in bytes for what `delimited.read` refuses.
        """
        order_K = self._order(seed, *keys)
        try:
            with self.path.open("rb") as file:
                own = np.array_split(order_K, self.windows)[number]
                return [line for block in own for line in self._lines(file, int(block) * self.block_bytes)]
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None

    def _order(self, seed: int, *keys: int) -> NDArray[np.int64]:
        order_K: NDArray[np.int64] = stream(seed, "blocks", *keys).permutation(self.blocks)
        return order_K

    def _lines(self, file: BinaryIO, start: int) -> Iterator[str]:
        """The sentences whose lines begin in the block at byte `start`."""
        file.seek(max(0, start - 1))
        if start:
            file.readline()  # of a line that began before, or the line break of one that ended there
        end = min(start + self.block_bytes, self.size)

        def numbered() -> Iterator[tuple[int, bytes]]:
            while (place := file.tell()) < end:
                yield place, file.readline()

        return delimited.parse(numbered(), self.path, self.data, first=0, unit=", from byte")


def open_stream(data: DataConfig) -> LineStream:
    """The training file of a `text` corpus, or of a layout of such files. Raises DataError if there is none."""
    known = layouts.settings(data) if data.corpus in layouts.LAYOUTS else data
    if known.corpus != "text":
        raise DataError(f"data.streaming reads files of text; {data.corpus} is not one here")
    path = text.find(known)["train"]
    if delimited.suffix(path) not in ("", ".jsonl"):
        raise DataError(f"{path}: data.streaming reads plain text or JSON lines, where a line is a sentence")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            probes = []
            for place in np.linspace(0, max(0, size - BLOCK_BYTES), _PROBES, dtype=np.int64):
                file.seek(int(place))
                probes.append(file.read(BLOCK_BYTES).hex())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not size:
        raise DataError(f"{path}: empty; write one sentence a line")
    settings = [str(known.labelled), delimited.suffix(path), known.column]
    return LineStream(path, known, size, digest([str(size), *settings, *probes]), BLOCK_BYTES, WINDOW_BLOCKS)
