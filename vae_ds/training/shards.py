"""The files of a checkpoint: one shard per rank, and which elements of which tensor a shard has.

A shard is a safetensors file of 1-D float32 tensors with the keys `weights/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`:
the slices that the rank owns (engine/slices.py). The manifest (checkpoint.py) says where they belong:

- `shapes`: the whole shape of each parameter by name, in the order of the model;
- `frozen`: the names without moments;
- `left_out`: frozen names that no shard has, each with the SHA-256 of its float32 values (base_weights.py);
- `shards`: for each one its `file`, `size`, `sha256`, and `slices`, a list of [number of the name in `shapes`, offset,
  length], in elements of the flattened parameter. A slice of the moments is the slice of the weights.

Any number of ranks reads it at any stage: a rank copies the elements that it needs out of the memory-mapped files.
Schema version 2 had no `left_out`. Version 1 had whole tensors, with their own shapes, in the shards, and no `slices`.
Both are still read.
"""

import bisect
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vae_ds.distributed import Ranks
from vae_ds.engine import MOMENTS, WEIGHTS, Part, whole
from vae_ds.errors import CheckpointError


class Piece(NamedTuple):
    """Elements of a flattened parameter that one shard has."""

    offset: int
    length: int
    file: str


@dataclass(frozen=True)
class Layout:
    """Where the elements of each parameter are: its pieces cover it exactly once, in order.

    A parameter of `left_out`, which has the SHA-256 of its values, has no pieces.
    """

    shapes: dict[str, tuple[int, ...]]
    frozen: frozenset[str]
    pieces: dict[str, list[Piece]]
    left_out: dict[str, str] = field(default_factory=dict)


def write(folder: Path, part: Part, ranks: Ranks) -> dict[str, Any]:
    """Write this rank's shard. Returns the manifest's entry."""
    path = folder / f"shard-{ranks.rank:05d}.safetensors"
    slices = part.slices.items()
    save_file({f"{kind}/{name}": value for name, one in slices for kind, value in one.values.items()}, path)
    sync(path)
    numbers = {name: number for number, name in enumerate(part.shapes)}
    return {
        "file": path.name,
        "size": path.stat().st_size,
        "sha256": _sha256(path),
        "slices": [[numbers[name], one.offset, one.length] for name, one in slices],
    }


def read_layout(folder: Path, manifest: Mapping[str, Any]) -> Layout:
    """The layout of a checkpoint. Raises CheckpointError if elements of a parameter are missing or stored twice."""
    try:
        layout = _listed(manifest) if "shapes" in manifest else _of_version_1(folder, manifest)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its manifest is broken: {error!r}") from None
    if wrong := layout.left_out.keys() - layout.frozen:
        raise CheckpointError(f"{folder}: its manifest is broken: `{min(wrong)}` is trained and left out")
    for name, shape in layout.shapes.items():
        if name in layout.left_out and not layout.pieces[name]:
            continue
        end = 0
        for piece in layout.pieces[name]:
            if piece.offset != end:
                fault = "are missing" if piece.offset > end else "are stored twice"
                first, last = sorted((piece.offset, end))
                raise CheckpointError(f"{folder}: elements {first} to {last - 1} of `{name}` {fault}")
            end += piece.length
        if end != (size := torch.Size(shape).numel()):
            raise CheckpointError(f"{folder}: `{name}` has {size} elements, but the shards have {end} of it")
    return layout


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a shard is missing or has another size than the manifest says."""
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["size"]:
            raise CheckpointError(f"{file}: {'missing' if size is None else f'{size} bytes'}, not {shard['size']}")


def check_sums(folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Raise CheckpointError if the checksum of one of these shards, entries of a manifest, is wrong."""
    for shard in shards:
        file = folder / shard["file"]
        try:
            found = _sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file}: unreadable: {error}") from None
        if found != shard["sha256"]:
            raise CheckpointError(f"{file}: its checksum differs from the manifest's")


class Stored:
    """The state in a checkpoint: a source for PhaseEngine.load, and whole tensors by name.

    Nothing is read before it is asked for. The shards are memory-mapped, so all ranks of a node share one copy in the
    page cache, and a rank itself holds only what it has copied. `close` releases the files; a later access opens them
    again. Raises CheckpointError if a shard cannot be read.
    """

    def __init__(
        self, folder: Path, layout: Layout, steps: int, scaler: dict[str, float], generators: dict[str, Any] | None
    ) -> None:
        self.steps, self.scaler, self.generators = steps, scaler, generators
        self._folder, self._layout = folder, layout
        self._open: dict[str, Any] = {}
        trained = [name for name in layout.shapes if name not in layout.frozen]
        stored = [name for name in layout.shapes if name not in layout.left_out]
        self.weights: Mapping[str, torch.Tensor] = _Tensors(self, WEIGHTS, stored)
        self.moments: dict[str, Mapping[str, torch.Tensor]] = {kind: _Tensors(self, kind, trained) for kind in MOMENTS}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of each parameter."""
        return self._layout.shapes

    @property
    def trained(self) -> set[str]:
        """The names of the parameters that have moments."""
        return self._layout.shapes.keys() - self._layout.frozen

    @property
    def left_out(self) -> dict[str, str]:
        """Frozen parameters that are not stored, each with the SHA-256 of its float32 values."""
        return self._layout.left_out

    def __str__(self) -> str:
        return str(self._folder)

    def copy_to(self, target: torch.Tensor, name: str, kind: str, offset: int) -> None:
        """Fill the 1-D `target` with the elements from `offset` on of a parameter or of one of its moments."""
        pieces, end = self._layout.pieces[name], offset + target.numel()
        number = max(0, bisect.bisect_right(pieces, offset, key=lambda piece: piece.offset) - 1)
        for piece in pieces[number:]:
            start, stop = max(offset, piece.offset), min(end, piece.offset + piece.length)
            if start >= stop:
                return
            values = self._mapped(piece, name, kind)[start - piece.offset : stop - piece.offset]
            target[start - offset : stop - offset].copy_(values)

    def tensor(self, name: str, kind: str = WEIGHTS) -> torch.Tensor:
        """A whole parameter or moment: the mapped file itself if one shard has all of it, else a copy."""
        shape, pieces = self._layout.shapes[name], self._layout.pieces[name]
        if len(pieces) == 1:
            return self._mapped(pieces[0], name, kind).view(shape)
        return whole(self, name, kind)

    def close(self) -> None:
        """Release the files. Tensors that were handed out stay valid."""
        self._open.clear()

    def _mapped(self, piece: Piece, name: str, kind: str) -> torch.Tensor:
        path = self._folder / piece.file
        try:
            if piece.file not in self._open:
                self._open[piece.file] = safe_open(path, framework="pt", device="cpu")
            values: torch.Tensor = self._open[piece.file].get_tensor(f"{kind}/{name}").view(-1)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: unreadable: {error}") from None
        if (values.numel(), values.dtype) != (piece.length, torch.float32):
            raise CheckpointError(
                f"{path}: {kind}/{name} has {values.numel()} elements of {values.dtype}; the manifest says "
                f"{piece.length} of torch.float32"
            )
        return values


class _Tensors(Mapping[str, torch.Tensor]):
    """The whole tensors of one kind by name, read at each access."""

    def __init__(self, stored: Stored, kind: str, names: Sequence[str]) -> None:
        self._stored, self._kind, self._names = stored, kind, dict.fromkeys(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._stored.tensor(name, self._kind)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk before anything refers to it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _listed(manifest: Mapping[str, Any]) -> Layout:
    shapes = {name: tuple(int(size) for size in shape) for name, shape in manifest["shapes"].items()}
    names = list(shapes)
    pieces: dict[str, list[Piece]] = {name: [] for name in names}
    for shard in manifest["shards"]:
        for number, offset, length in shard["slices"]:
            pieces[names[number]].append(Piece(offset, length, shard["file"]))
    places = {name: sorted(found) for name, found in pieces.items()}
    return Layout(shapes, frozenset(manifest["frozen"]), places, dict(manifest.get("left_out", {})))


def _of_version_1(folder: Path, manifest: Mapping[str, Any]) -> Layout:
    """The layout of whole tensors, from the headers of the shards."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        try:
            with safe_open(path, framework="pt", device="cpu") as stored:
                for key in stored.keys():  # noqa: SIM118 - no mapping
                    found[key] = tuple(stored.get_slice(key).get_shape()), shard["file"]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: unreadable: {error}") from None
    shapes, pieces = {}, {}
    for name in manifest["names"]:
        if f"{WEIGHTS}/{name}" not in found:
            raise CheckpointError(f"{folder}: the weight `{name}` is missing")
        shapes[name], file = found[f"{WEIGHTS}/{name}"]
        pieces[name] = [Piece(0, torch.Size(shapes[name]).numel(), file)]
    frozen = {name for name in shapes if not any(f"{kind}/{name}" in found for kind in MOMENTS)}
    return Layout(shapes, frozenset(frozen), pieces)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
