"""Read a training file as a stream: windows of blocks, in a new random order each epoch, without a full pass before.

A block contains the lines that begin in it, so each line is in exactly one block. A window consists of a few blocks
from random places of the file. Its lines are shuffled together. This approximates a shuffle of the file in constant
memory.

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
WINDOW_BLOCKS = 64  # 4 MiB: about fifty thousand sentences
_PROBES = 16  # blocks that the fingerprint reads


@dataclass(frozen=True)
class LineStream:
    """The lines of a plain text or JSON lines file, by window. `fingerprint` hashes its size and some of its blocks."""

    path: Path
    data: DataConfig
    size: int
    fingerprint: str
    block_bytes: int
    window_blocks: int

    @property
    def blocks(self) -> int:
        """K, at least one."""
        return max(1, -(-self.size // self.block_bytes))

    @property
    def windows(self) -> int:
        """W, at least one. The windows have about the same number of blocks."""
        return max(1, self.blocks // self.window_blocks)

    def window(self, number: int, seed: int, *keys: int) -> list[str]:
        """The sentences of one window, block by block, in the epoch that `seed` and `keys` identify.

        Raises DataError like `delimited.read`. The message gives the byte offset of the line.
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
            file.readline()  # skip the rest of a line of the previous block, or only its line break
        end = min(start + self.block_bytes, self.size)

        def numbered() -> Iterator[tuple[int, bytes]]:
            while (offset := file.tell()) < end:
                yield offset, file.readline()

        return delimited.parse(numbered(), self.path, self.data, first=0, unit=", from byte")


def open_stream(data: DataConfig) -> LineStream:
    """Open the training file of a `text` corpus or of a layout of text files. Raises DataError if there is none."""
    known = layouts.settings(data) if data.corpus in layouts.LAYOUTS else data
    if known.corpus != "text":
        raise DataError(f"data.streaming needs text files; {data.corpus} has none here; set data.streaming to false")
    path = text.find(known)["train"]
    if delimited.suffix(path) not in ("", ".jsonl"):
        raise DataError(f"{path}: data.streaming reads plain text or JSON lines, with one sentence per line")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            probes = []
            for offset in np.linspace(0, max(0, size - BLOCK_BYTES), _PROBES, dtype=np.int64):
                file.seek(int(offset))
                probes.append(file.read(BLOCK_BYTES).hex())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not size:
        raise DataError(f"{path}: empty; write one sentence per line")
    settings = [str(known.labelled), delimited.suffix(path), known.column]
    return LineStream(path, known, size, digest([str(size), *settings, *probes]), BLOCK_BYTES, WINDOW_BLOCKS)
