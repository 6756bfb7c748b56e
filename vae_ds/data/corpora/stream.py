"""Read a training file as a stream: windows of blocks, in a new random order each epoch, without preparing it before.

A block contains the lines that begin in it, so each line is in exactly one block. A window consists of a few blocks
from random places of the file. Its lines are shuffled together. This approximates a shuffle of the file in constant
memory.

Bad lines, which cannot be read, are skipped and counted (`data.bad_lines`), unless they are many. A window is a random
sample of the file, so a file of the wrong kind fails in its first window.

Shapes: W windows of an epoch, K blocks of the file.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_ds.config import DataConfig
from vae_ds.data.cache import cache_dir, digest, noted_hash
from vae_ds.data.corpora import delimited, layouts, text_files
from vae_ds.data.corpora.findings import Findings
from vae_ds.data.corpora.opening import check_head, unreadable
from vae_ds.data.progress import Progress, is_main
from vae_ds.distributed import stream
from vae_ds.errors import DataError

BLOCK_BYTES = 1 << 16
WINDOW_BLOCKS = 64  # 4 MiB: about fifty thousand sentences
HASHED_BYTES = 1 << 30  # of a larger file, the fingerprint reads only probes
PROBES = 1024  # at 10 GB, one block of each 10 MB
LONGEST_LINE_BYTES = 1 << 24  # a longer line is bad; at least a block
# One block with bad lines only is 1.6 % of a window. So a damaged part of the file must not end a run, but a file of
# the wrong kind exceeds this share in its first windows. A window of few, long lines may have a few bad ones.
BAD_SHARE, FEW_BAD = 0.1, 10
_UNIT = ", from byte"  # lines of a stream have no numbers

log = logging.getLogger(__name__)


class Window(NamedTuple):
    """The sentences of a window, block by block, and the lines that were skipped; their numbers are byte offsets."""

    sentences: list[str]
    skipped: Findings


@dataclass(frozen=True)
class LineStream:
    """The lines of a plain text or JSON lines file, by window. `fingerprint`: see `open_stream`."""

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

    def window(self, number: int, seed: int, *keys: int) -> Window:
        """The lines of one window in the epoch that `seed` and `keys` identify. The first blank lines are logged.

        Raises DataError for lines with the errors of `delimited.read`, for all of the window at once: with
        `data.bad_lines` `error` for any, with `skip` if more than BAD_SHARE of the lines and more than FEW_BAD are bad,
        or all of them. The message gives the byte offsets of the lines.
        """
        blocks = np.array_split(self._order(seed, *keys), self.windows)[number]
        read = self._read(blocks, f"window {number + 1} of {self.windows}")
        blank = read.skipped.blank
        if blank and not self._reported and is_main():
            self._reported.add("blank")
            message = "%s: lines without text: %d of %d in this window skipped (one begins at byte %d); later windows"
            message += " skip them without a message; data.blank_lines=error refuses them"
            log.warning(message, self.path, blank, blank + len(read.sentences), min(read.skipped.first_blank))
        return read

    def check_sample(self) -> None:
        """Read as many blocks as a window has, at equal distances. Raises DataError like `window`."""
        blocks = np.unique(np.linspace(0, self.blocks - 1, self.window_blocks, dtype=np.int64))
        self._read(blocks, "a sample of the file")

    def _read(self, blocks: NDArray[np.int64], where: str) -> Window:
        found = Findings(self.data.blank_lines)
        try:
            with self.path.open("rb") as file:
                lines = [line for block in blocks for line in self._lines(file, int(block) * self.block_bytes, found)]
        except OSError as error:
            raise unreadable(self.path, error) from None
        if self.data.bad_lines == "error":
            found.raise_bad(f"{self.path}{_UNIT}")
        total = len(lines) + found.bad + (found.blank if self.data.blank_lines == "skip" else 0)
        if found.bad and (not lines or found.bad > max(FEW_BAD, BAD_SHARE * total)):
            raise DataError(
                f"{self.path}{_UNIT}:{found.first_bad[0]}: {found.reason}; {found.bad} of {total} lines in {where} are"
                f" bad, but data.bad_lines=skip allows {BAD_SHARE:.0%}; correct the file or the data settings"
            )
        return Window(lines, found)

    def _order(self, seed: int, *keys: int) -> NDArray[np.int64]:
        order_K: NDArray[np.int64] = stream(seed, "blocks", *keys).permutation(self.blocks)
        return order_K

    def _lines(self, file: BinaryIO, start: int, found: Findings) -> Iterator[str]:
        """The sentences whose lines begin in the block at byte `start`."""
        file.seek(max(0, start - 1))
        # Skip the rest of a line of the previous block, or only its line break. The line may fill this block, too.
        if start and not file.readline(self.block_bytes).endswith(b"\n"):
            return
        end = min(start + self.block_bytes, self.size)

        def numbered() -> Iterator[tuple[int, bytes]]:
            while (offset := file.tell()) < end:
                line = file.readline(LONGEST_LINE_BYTES)
                if len(line) == LONGEST_LINE_BYTES and not line.endswith(b"\n"):
                    found.add_bad(offset, f"longer than {LONGEST_LINE_BYTES:,} bytes; write one sentence per line")
                    return  # its rest is longer than the block, in which no other line begins
                yield offset, line

        for sentence in delimited.parse(numbered(), self.path, self.data, found, first=0, unit=_UNIT):
            yield sentence.text


def open_stream(data: DataConfig, fingerprint: str | None = None) -> LineStream:
    """Open the training file of a `text` corpus or of a layout of text files. Raises DataError if there is none.

    The fingerprint is a hash of the settings that select the text and of the bytes of the file. Of a file of more than
    HASHED_BYTES, it hashes the size and PROBES blocks at equal distances. The times of the file do not matter, so that
    a copy has the same fingerprint. A large file is read for it once, see `noted_hash`.

    fingerprint: that of another rank, so that this one does not read the file.
    """
    known = layouts.settings(data) if data.corpus in layouts.LAYOUTS else data
    if known.corpus != "text":
        raise DataError(f"data.streaming needs text files; {data.corpus} has none here; set data.streaming to false")
    path = _seekable(text_files.locate(known)["train"], known)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(BLOCK_BYTES)
        if not size:
            raise DataError(f"{path}: empty; write one sentence per line")
        check_head(path, head)
        mark = _fingerprint(path, size, known) if fingerprint is None else fingerprint
    except OSError as error:
        raise unreadable(path, error) from None
    return LineStream(path, known, size, mark, BLOCK_BYTES, WINDOW_BLOCKS)


def check(data: DataConfig) -> None:
    """Check the training file and, on rank 0, a sample of its lines. Raises DataError like `open_stream` and `window`.

    The rest of the lines is checked when it is read.
    """
    lines = open_stream(data, fingerprint="")
    if is_main():
        lines.check_sample()


def _fingerprint(path: Path, size: int, data: DataConfig) -> str:
    notes = cache_dir(data.cache_dir) / "text"
    if size <= HASHED_BYTES:
        content = noted_hash(path, notes / "hashes")
    else:
        content = noted_hash(path, notes / f"probes-{PROBES}", _hash_probes)
    return digest([str(size), str(data.labelled), text_files.suffix(path), data.column, content])


def _hash_probes(path: Path) -> str:
    """Hash of the probes of a file, 32 hexadecimal digits. Raises OSError."""
    state = hashlib.blake2b(digest_size=16)
    offsets = np.linspace(0, path.stat().st_size - BLOCK_BYTES, PROBES, dtype=np.int64)
    with path.open("rb") as file, Progress(f"Hashing parts of {path.name}", PROBES, "blocks") as progress:
        for offset in offsets:
            file.seek(int(offset))
            state.update(file.read(BLOCK_BYTES))
            progress.add()
    return state.hexdigest()


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
