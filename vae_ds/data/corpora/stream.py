"""Read a training file as a stream: windows of blocks, in a new random order each epoch, without a full pass before.

A block contains the lines that begin in it, so each line is in exactly one block. A window consists of a few blocks
from random places of the file. Its lines are shuffled together. This approximates a shuffle of the file in constant
memory.

Shapes: W windows of an epoch, K blocks of the file.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vae_ds.config import DataConfig
from vae_ds.data.cache import digest
from vae_ds.data.corpora import delimited, layouts, text_files
from vae_ds.data.corpora.findings import Findings
from vae_ds.data.corpora.opening import check_head, unreadable
from vae_ds.data.progress import is_main
from vae_ds.distributed import stream
from vae_ds.errors import DataError

BLOCK_BYTES = 1 << 16
WINDOW_BLOCKS = 64  # 4 MiB: about fifty thousand sentences
_PROBES = 16  # blocks that the fingerprint reads
_UNIT = ", from byte"  # lines of a stream have no numbers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LineStream:
    """The lines of a plain text or JSON lines file, by window. `fingerprint` hashes its size and some of its blocks."""

    path: Path
    data: DataConfig
    size: int
    fingerprint: str
    block_bytes: int
    window_blocks: int
    _reported: set[str] = field(default_factory=set, repr=False, compare=False)  # reports are logged once

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

        Raises DataError like `delimited.read`, for all lines of the window at once. The message gives the byte offsets
        of the lines. The first blank lines are logged.
        """
        order_K = self._order(seed, *keys)
        found = Findings(self.data.blank_lines)
        try:
            with self.path.open("rb") as file:
                own = np.array_split(order_K, self.windows)[number]
                lines = [line for block in own for line in self._lines(file, int(block) * self.block_bytes, found)]
        except OSError as error:
            raise unreadable(self.path, error) from None
        found.raise_bad(f"{self.path}{_UNIT}")
        if found.blank and not self._reported and is_main():
            self._reported.add("blank")
            message = "%s: lines without text: %d of %d in this window skipped (one begins at byte %d); later windows"
            message += " skip them without a message; data.blank_lines=error refuses them"
            log.warning(message, self.path, found.blank, found.blank + len(lines), min(found.first_blank))
        return lines

    def _order(self, seed: int, *keys: int) -> NDArray[np.int64]:
        order_K: NDArray[np.int64] = stream(seed, "blocks", *keys).permutation(self.blocks)
        return order_K

    def _lines(self, file: BinaryIO, start: int, found: Findings) -> Iterator[str]:
        """The sentences whose lines begin in the block at byte `start`."""
        file.seek(max(0, start - 1))
        if start:
            file.readline()  # skip the rest of a line of the previous block, or only its line break
        end = min(start + self.block_bytes, self.size)

        def numbered() -> Iterator[tuple[int, bytes]]:
            while (offset := file.tell()) < end:
                yield offset, file.readline()

        return delimited.parse(numbered(), self.path, self.data, found, first=0, unit=_UNIT)


def open_stream(data: DataConfig) -> LineStream:
    """Open the training file of a `text` corpus or of a layout of text files. Raises DataError if there is none."""
    known = layouts.settings(data) if data.corpus in layouts.LAYOUTS else data
    if known.corpus != "text":
        raise DataError(f"data.streaming needs text files; {data.corpus} has none here; set data.streaming to false")
    path = _seekable(text_files.locate(known)["train"], known)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            probes = []
            for offset in np.linspace(0, max(0, size - BLOCK_BYTES), _PROBES, dtype=np.int64):
                file.seek(int(offset))
                probes.append(file.read(BLOCK_BYTES))
    except OSError as error:
        raise unreadable(path, error) from None
    if not size:
        raise DataError(f"{path}: empty; write one sentence per line")
    check_head(path, probes[0])
    settings = [str(known.labelled), text_files.suffix(path), known.column]
    fingerprint = digest([str(size), *settings, *(probe.hex() for probe in probes)])
    return LineStream(path, known, size, fingerprint, BLOCK_BYTES, WINDOW_BLOCKS)


def _seekable(files: tuple[Path, ...], data: DataConfig) -> Path:
    """The training file. Raises DataError if it is not one file of lines in which blocks can be found."""
    path, kind = files[0], text_files.suffix(files[0])
    if len(files) > 1:
        raise DataError(
            f"{data.train}: data.streaming seeks in one file, but this pattern matches {len(files)} files; join them"
            " into one, or set data.streaming to false"
        )
    if text_files.compression(path):
        raise DataError(
            f"{path}: data.streaming seeks in the file, but a compressed file can only be read from its start;"
            " decompress it, or set data.streaming to false"
        )
    if kind not in ("", ".jsonl"):
        reason = "parquet has no lines" if kind == ".parquet" else "a row may have several lines, or needs the first"
        raise DataError(
            f"{path}: data.streaming reads plain text or JSON lines, with one sentence per line ({reason});"
            " convert the file, or set data.streaming to false"
        )
    return path
