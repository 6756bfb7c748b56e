"""Draw valid and test from one file: by a seeded hash of each sentence, so that equal sentences are in one split.

Shapes: N sentences of the file, K sentences of valid and test together. Memory grows with K only.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from vae_ds.data.cache import LABELLED, TEXT, cache_error, make_folder, write_batches, write_rows
from vae_ds.data.progress import Progress
from vae_ds.errors import DataError

_ROWS_AT_ONCE = 10_000
_KEYS_AT_ONCE = 1 << 20
_LARGEST = (1 << 64) - 1

Keys = NDArray[np.uint64]
Rows = NDArray[np.int64]


def draw(name: str, whole: Dataset, numbers: dict[str, float], seed: int, targets: dict[str, Path]) -> None:
    """Write the rows of `whole` to one Arrow file for each split: `targets` maps train, valid and test to files.

    The columns are `text` and, if the rows have it, `label`.

    The sentences are sorted by a hash of the seed and the sentence. The first ones are test, the next ones valid. These
    two files have that random order, so that their first rows are a random sample. The rest is train, in file order.
    Sentences that differ only in case or white space have the same hash and are in one split. If such a group is larger
    than the rest of test and valid, it is in train.

    numbers: sentences of valid and test, as numbers or as fractions below 1.
    name: the file that errors name.

    Raises DataError if the file has too few sentences or the cache cannot be written.
    """
    total = len(whole)
    wanted = {part: _number(numbers[part], total) for part in ("test", "valid")}
    if sum(wanted.values()) >= total:
        raise DataError(_too_small(name, total, wanted))
    folder = targets["train"].parent
    schema = LABELLED if "label" in whole.column_names else TEXT
    make_folder(folder)
    try:
        # A file, not memory: eight bytes for each sentence.
        with TemporaryFile(dir=folder) as file:
            for texts in _batches(whole, f"Drawing valid and test from {name}"):
                file.write(np.array([_key(seed, text) for text in texts], np.uint64).tobytes())
            file.flush()
            chosen = choose(np.memmap(file, np.uint64, "r", shape=(total,)), wanted)
    except OSError as error:
        raise cache_error(folder, error) from None
    if chosen is None:
        raise DataError(f"{_too_small(name, total, wanted)}; equal sentences are not divided")
    for part, rows_K in chosen.items():
        chosen_rows = whole.select(rows_K)
        batches = (zip(*batch.values(), strict=True) for batch in chosen_rows.iter(_ROWS_AT_ONCE))
        write_rows(targets[part], (row for batch in batches for row in batch), schema)
    held = np.sort(np.concatenate(list(chosen.values())))
    write_batches(targets["train"], _others(whole, held), schema)


def choose(keys_N: Keys, wanted: dict[str, int]) -> dict[str, Rows] | None:
    """The rows of each wanted part, int64, sorted by key. None if groups of equal keys do not give these numbers.

    A group of equal keys goes to the first part with room for all of it. Only the rows with the smallest keys are
    considered, and more of them as long as a part is not full. This does not change the result.
    """
    total, needed = len(keys_N), sum(wanted.values())
    share = 2 * needed / total
    while True:
        limit = min(_LARGEST, int(share * _LARGEST))
        rows = _rows_up_to(keys_N, limit)
        rows = rows[np.argsort(keys_N[rows], kind="stable")]
        found = _fill(keys_N[rows], wanted)
        if found is not None:
            return {part: rows[places] for part, places in found.items()}
        if limit == _LARGEST:
            return None
        share *= 4


def _rows_up_to(keys_N: Keys, limit: int) -> Rows:
    parts = [
        start + np.flatnonzero(keys_N[start : start + _KEYS_AT_ONCE] <= np.uint64(limit))
        for start in range(0, len(keys_N), _KEYS_AT_ONCE)
    ]
    return np.concatenate(parts).astype(np.int64)


def _fill(sorted_keys: Keys, wanted: dict[str, int]) -> dict[str, Rows] | None:
    """The places of the keys of each part in the sorted keys, or None if there are too few."""
    _, counts = np.unique(sorted_keys, return_counts=True)
    left = list(wanted.values())
    part_of_group = np.full(len(counts), -1, np.int8)
    for group, count in enumerate(counts):
        for part, room in enumerate(left):
            if count <= room:
                part_of_group[group] = part
                left[part] = room - int(count)
                break
        if not any(left):
            part_of_key = np.repeat(part_of_group, counts)
            return {name: np.flatnonzero(part_of_key == part) for part, name in enumerate(wanted)}
    return None


def _others(whole: Dataset, held: Rows) -> Iterator[pa.RecordBatch]:
    """All rows of `whole` but the sorted rows `held`."""
    first = 0
    for table in whole.with_format("arrow").iter(_ROWS_AT_ONCE):
        keep = np.ones(len(table), bool)
        keep[held[slice(*np.searchsorted(held, [first, first + len(table)]))] - first] = False
        first += len(table)
        yield from table.filter(pa.array(keep)).combine_chunks().to_batches()


def _batches(whole: Dataset, task: str) -> Iterator[list[str]]:
    with Progress(task, len(whole)) as progress:
        for table in whole.with_format("arrow").iter(_ROWS_AT_ONCE):
            yield table.column("text").to_pylist()
            progress.add(len(table))


def _key(seed: int, text: str) -> int:
    plain = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(f"{seed} {plain}".encode(), digest_size=8).digest(), "big")


def _number(configured: float, total: int) -> int:
    return int(configured) if configured >= 1 else max(1, round(configured * total))


def _too_small(name: str, total: int, wanted: dict[str, Any]) -> str:
    return (
        f"{name}: {total} sentences are too few for data.split with valid {wanted['valid']} and test {wanted['test']},"
        " and at least one for train; reduce data.split.valid and data.split.test"
    )
