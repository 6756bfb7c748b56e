"""Open a text file, compressed or not. A file in another encoding or format is recognised by its first bytes."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from vae_ds.data.corpora.text_files import compression
from vae_ds.data.progress import Progress
from vae_ds.errors import DataError

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 12
# The longer marks come first: the mark of UTF-16 is the beginning of that of UTF-32.
_ENCODINGS = {
    b"\xff\xfe\0\0": "UTF-32LE",
    b"\0\0\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
}
_FORMATS = {
    b"\x1f\x8b": "compressed with gzip; its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; its name must end in .zst",
    b"BZh": "compressed with bzip2; decompress it",
    b"\xfd7zXZ": "compressed with xz; decompress it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "a parquet file; its name must end in .parquet",
}


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed, with progress. Memory does not grow with the file.

    Raises DataError if the file cannot be read or decompressed, or is not UTF-8 by its first bytes.
    """
    try:
        with path.open("rb") as raw, Progress(f"Reading {path.name}", path.stat().st_size, "B") as progress:
            codec = compression(path)
            if codec and not pa.Codec.is_available(codec):
                raise DataError(f"{path}: pyarrow was built without {codec}; decompress the file, or install pyarrow")
            file = io.BufferedReader(_decompressed(raw, codec), _CHUNK_BYTES) if codec else raw
            check_head(path, file.peek(_HEAD_BYTES)[:_HEAD_BYTES])
            while lines := file.readlines(_CHUNK_BYTES):
                yield from lines
                progress.reach(raw.tell())
    except OSError as error:
        raise unreadable(path, error) from None


def check_head(path: Path, head: bytes) -> None:
    """Raise DataError if the first bytes of a file show that it is not UTF-8 text."""
    for mark, encoding in _ENCODINGS.items():
        if head.startswith(mark):
            raise _encoded(path, encoding)
    # Latin letters in UTF-16 have a zero byte in each second place. Those zero bytes are valid UTF-8.
    for encoding, zeros in (("UTF-16LE", head[1::2]), ("UTF-16BE", head[::2])):
        if len(head) >= 4 and zeros.count(0) > len(zeros) / 2:
            raise _encoded(path, encoding)
    for mark, what in _FORMATS.items():
        if head.startswith(mark) and not _is_utf8(head):
            raise DataError(f"{path}:1: not UTF-8 text: the file is {what}")


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that cannot be opened, read or decompressed."""
    if error.strerror is None and compression(path):
        return DataError(f"{path}: cannot be decompressed ({error}); the file is incomplete or has another format")
    return DataError(f"{path}: cannot be read ({error.strerror or error})")


def _decompressed(raw: BinaryIO, codec: str) -> io.RawIOBase:
    stream: io.RawIOBase = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)
    return stream


def _encoded(path: Path, encoding: str) -> DataError:
    return DataError(
        f"{path}:1: not UTF-8 at byte 1 of the line; the file looks like {encoding}; convert it, for example with"
        f" `iconv -f {encoding.removesuffix('LE').removesuffix('BE')} -t UTF-8`"
    )


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # the head may end inside a character
    return b"\0" not in head
