"""The state of a phase in slices: which elements a rank owns, what it stores, and where it reads them again.

A *slice* is a run of elements of a flattened parameter, with the same run of both Adam moments if the parameter is
trained. DeepSpeed has already divided the trained parameters over the ranks at stages 1 to 3 (masters.py). What every
rank has whole is divided here: all trained parameters at stage 0, and the frozen ones. So a rank can store its slices
alone, without a collective, and all ranks store equally much: 12 / world bytes per trained parameter.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from vae_ds import distributed
from vae_ds.distributed import Ranks

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHTS, *MOMENTS)
# Elements of a parameter that are read, or put together by the ranks, at a time: 256 MiB in float32.
GATHERED = 2**26


class Slice(NamedTuple):
    """Elements from `offset` on of one flattened parameter: 1-D tensors of one length by kind (KINDS)."""

    offset: int
    values: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        """The number of elements; 0 if this rank has none of the parameter."""
        return next((value.numel() for value in self.values.values()), 0)


@dataclass(frozen=True)
class Part:
    """What one rank stores of a phase's state: float32 copies on the CPU.

    `shapes` are the whole shapes of all parameters, in the order of the module; `frozen` are those without moments.
    `left_out` are frozen ones that no rank stores, each with the SHA-256 of its float32 values. The slices of all ranks
    cover every other parameter exactly once. `steps` and `scaler` are as in PhaseState.
    """

    shapes: dict[str, tuple[int, ...]]
    frozen: frozenset[str]
    slices: dict[str, Slice]
    steps: int = 0
    scaler: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class Reader(Protocol):
    """Where an engine reads weights from, element by element: whole tensors in memory, or memory-mapped files."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The whole shape of each parameter."""

    def copy_to(self, target: torch.Tensor, name: str, kind: str, offset: int) -> None:
        """Fill the 1-D `target` with the elements from `offset` on of a parameter or of one of its moments."""


class Source(Reader, Protocol):
    """Where an engine reads the state of a phase from: its weights and moments, and its progress."""

    steps: int
    scaler: dict[str, float]
    generators: dict[str, Any] | None

    @property
    def trained(self) -> Collection[str]:
        """The names of the parameters that have moments."""

    @property
    def left_out(self) -> Collection[str]:
        """The names of frozen parameters that the source does not have: the engine keeps the values that it has."""


@dataclass
class PhaseState:
    """A phase's CPU tensors by parameter name: all weights, and AdamW's moments of the trained ones.

    They are float32. Only those of a base or an export that is read as it is stored can have another dtype.

    `steps` is the number of steps that AdamW applied. `scaler` is the dynamic loss scale of fp16, else empty.
    `generators` are the states of this rank's random generators, if a checkpoint of the same world size has them.
    """

    weights: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    steps: int = 0
    scaler: dict[str, float] = field(default_factory=dict)
    generators: dict[str, Any] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of each parameter."""
        return {name: tuple(value.shape) for name, value in self.weights.items()}

    @property
    def trained(self) -> set[str]:
        """The names of the parameters that have moments."""
        return set().union(*self.moments.values())

    @property
    def left_out(self) -> tuple[str, ...]:
        """None: a state in memory is whole."""
        return ()

    def copy_to(self, target: torch.Tensor, name: str, kind: str, offset: int) -> None:
        """Fill the 1-D `target` with elements of a parameter or of one of its moments."""
        whole = self.weights[name] if kind == WEIGHTS else self.moments[kind][name]
        target.copy_(whole.reshape(-1)[offset : offset + target.numel()])


def whole(source: Reader, name: str, kind: str = WEIGHTS) -> torch.Tensor:
    """A new tensor with all elements of a parameter or of one of its moments."""
    shape = source.shapes[name]
    value = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
    source.copy_to(value, name, kind, 0)
    return value.view(shape)


def shares(sizes: Mapping[str, int], ranks: Ranks) -> dict[str, tuple[int, int]]:
    """This rank's equal part of the concatenated elements: offset and length, by the names that it has a part of."""
    total = sum(sizes.values())
    first, last = total * ranks.rank // ranks.world, total * (ranks.rank + 1) // ranks.world
    found, before = {}, 0
    for name, size in sizes.items():
        start, end = max(first - before, 0), min(last - before, size)
        if start < end:
            found[name] = (start, end - start)
        before += size
    return found


def host_copy(values: torch.Tensor) -> torch.Tensor:
    """A float32 copy on the CPU."""
    return values.detach().to("cpu", torch.float32, copy=True)


class Frozen:
    """The exact float32 values of a phase's frozen parameters.

    In float32 at stages 0 to 2, the parameters themselves are exact and whole on every rank. In 16 bits they are
    rounded, and at stage 3 divided: there, each rank keeps its share of the values, 4 / world bytes per parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], ranks: Ranks, weights: Reader | None) -> None:
        """`parameters` have their whole shapes. `weights` has the values to keep; None: the parameters stay exact."""
        self._ranks, self._parameters = ranks, parameters
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._shares = shares({name: parameter.numel() for name, parameter in parameters.items()}, ranks)
        self._kept = None if weights is None else {name: self._read(name, weights) for name in self._shares}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """This rank's share by name, without a copy."""
        for name, (offset, _) in self._shares.items():
            values = self._mine(name) if self._kept is None else self._kept[name]
            yield name, Slice(offset, {WEIGHTS: values})

    def read(self, name: str) -> torch.Tensor:
        """A copy of a whole parameter, float32 on the CPU. A collective."""
        if self._kept is None:
            return host_copy(self._parameters[name])
        # As integers: a sum of zeros and the bits of one rank is exact, also for -0.0 and NaN.
        size = torch.Size(self._shapes[name]).numel()
        bits = torch.empty(size, dtype=torch.int32)
        offset, length = self._shares.get(name, (0, 0))
        for first in range(0, size, GATHERED):
            last = min(first + GATHERED, size)
            piece = torch.zeros(last - first, dtype=torch.int32)
            start, end = max(offset, first), min(offset + length, last)
            if start < end:
                piece[start - first : end - first] = self._kept[name][start - offset : end - offset].view(torch.int32)
            bits[first:last] = distributed.all_sum(piece.to(self._ranks.device)).cpu()
        return bits.view(torch.float32).view(self._shapes[name])

    def take(self, source: Source) -> list[str]:
        """Keep the values that `source` has. Returns the names whose values differed, equal on every rank.

        A collective.
        """
        names = list(self._shapes)
        differs = torch.zeros(len(names), dtype=torch.int32)
        for name, one in self.slices():
            if name in source.left_out:
                continue
            value = self._read(name, source)
            if not torch.equal(value, one.values[WEIGHTS].detach().cpu()):
                differs[names.index(name)] = 1
                if self._kept is not None:
                    self._kept[name].copy_(value)
        found = distributed.all_sum(differs.to(self._ranks.device)).cpu() if names else differs
        return [name for name, count in zip(names, found.tolist(), strict=True) if count]

    def _read(self, name: str, weights: Reader) -> torch.Tensor:
        offset, length = self._shares[name]
        value = torch.empty(length, dtype=torch.float32)
        weights.copy_to(value, name, WEIGHTS, offset)
        return value

    def _mine(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach().view(-1).narrow(0, *self._shares[name])
