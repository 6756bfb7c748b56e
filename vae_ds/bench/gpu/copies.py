"""What a step copies between the host and the device, and where it waits for the device.

`Copies` sees each call of torch that copies, with the place of the code that made it. On a GPU, the device of a tensor
tells what is a copy. On a CPU, both are one memory, so `Copies` follows the tensors: those that were made or moved with
a `torch.device`, parameters, and what is computed from them count as being on the device; `cpu()` and `"cpu"` lead to
the host. So the loop of a training can be checked on any machine.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vae_ds import engine, training

TO_HOST, TO_DEVICE = "to host", "to device"
OWNERS = ("vae_ds", "deepspeed", "transformers")
SYNCHRONIZING = "called a synchronizing CUDA operation"

_MARK = "_vae_ds_on_device"
# Each waits until the device has computed the value.
_READS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu", "__contains__")
} | {torch.equal, torch.allclose, torch.is_nonzero, torch.Tensor.equal, torch.Tensor.allclose, torch.Tensor.is_nonzero}
# The shape of the result depends on values, so the host waits for it.
_SHAPED = {
    *(torch.nonzero, torch.Tensor.nonzero, torch.masked_select, torch.Tensor.masked_select, torch.argwhere),
    *(torch.unique, torch.Tensor.unique, torch.unique_consecutive, torch.bincount),
}
_MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}
# They copy a value of the host to the device.
_FROM_VALUES = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}


@dataclass(frozen=True)
class Copy:
    """One copy. place: `package.module:function`, the innermost of OWNERS. is_async: pinned and without blocking."""

    direction: str
    place: str
    owner: str
    is_async: bool = False


@dataclass
class Copies:
    """The copies of what was watched, apart from them those of the engine's own step, and the places of waits."""

    found: Counter[Copy] = field(default_factory=Counter)
    of_engine: Counter[Copy] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    is_in_engine: bool = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what happens inside, in this thread."""
        with _Watch(self):
            yield

    @contextmanager
    def engine_step(self) -> Iterator[None]:
        """Count what happens inside as the engine's."""
        self.is_in_engine = True
        try:
            yield
        finally:
            self.is_in_engine = False

    def add(self, copy: Copy) -> None:
        """Count one."""
        (self.of_engine if self.is_in_engine else self.found)[copy] += 1


def count(found: Counter[Copy], direction: str, owner: str = "vae_ds") -> int:
    """The number of copies in a direction by the code of an owner. transformers is part of the model: `vae_ds`."""
    owners = ("vae_ds", "transformers") if owner == "vae_ds" else (owner,)
    return sum(n for copy, n in found.items() if copy.direction == direction and copy.owner in owners)


def lines(found: Counter[Copy]) -> list[str]:
    """Number, direction and place, the most frequent first."""
    return [f"{n} {copy.direction}: {copy.place}" for copy, n in found.most_common()]


class _Watch(TorchFunctionMode):
    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self._copies = copies
        self._has_gpu = torch.cuda.is_available()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        was_there = any(map(self._is_on_device, given))
        target = _target(func, args, kwargs)
        leaves = func in _MOVES and target == "host"
        if was_there and (leaves or func in _READS or func in _SHAPED or _is_masked(func, args)):
            self._add(TO_HOST, False)
        # What `new_tensor` and `tensor` are given is on the host.
        elif target == "device" and (func in _FROM_VALUES or (func in _MOVES and not was_there)):
            pinned = bool(given) and given[0].device.type == "cpu" and given[0].is_pinned()
            self._add(TO_DEVICE, pinned and bool(kwargs.get("non_blocking")))
        result = func(*args, **kwargs)
        if was_there and leaves:
            # On a CPU, this is the tensor itself, which has the mark.
            return result if self._has_gpu else result.view_as(result)
        if target != "host" and func not in _READS and (was_there or target == "device"):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    setattr(leaf, _MARK, True)
        return result

    def _is_on_device(self, tensor: torch.Tensor) -> bool:
        if self._has_gpu:
            return tensor.device.type == "cuda"
        return isinstance(tensor, torch.nn.Parameter) or hasattr(tensor, _MARK)

    def _add(self, direction: str, is_async: bool) -> None:
        owner, place = place_of(sys._getframe(2))
        self._copies.add(Copy(direction, place, owner, is_async))


def _target(func: Any, args: Any, kwargs: Any) -> str | None:
    """Where a call puts its result: `host`, `device`, or None if it says neither."""
    if func is torch.Tensor.cpu:
        return "host"
    if func is torch.Tensor.cuda or func is torch.Tensor.new_tensor:
        return "device"
    told = kwargs.get("device")
    if told is None and func in _MOVES:
        told = next((one for one in args[1:] if isinstance(one, torch.device | str)), None)
    if told is None:
        return None
    return "host" if str(told) == "cpu" and isinstance(told, str) else "device"


def _is_masked(func: Any, args: Any) -> bool:
    """Whether a tensor is indexed by a mask: the shape of the result depends on its values."""
    if func is not torch.Tensor.__getitem__:
        return False
    parts = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def place_of(frame: FrameType | None) -> tuple[str, str]:
    """The owner and the place of the innermost frame that belongs to one of OWNERS; `other` if there is none."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        owner = module.split(".")[0]
        if owner in OWNERS and not module.startswith("vae_ds.bench."):
            return owner, f"{module}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "other", "other"


@contextmanager
def watched_steps() -> Iterator[list[Copies]]:
    """The copies and waits of each step of the trainings inside, in order.

    A step begins with its batch and ends after its sums. The engine's own step is apart: it may copy and wait.
    """
    found: list[Copies] = []
    phase_engines: Any = engine.PhaseEngine
    engine_step = phase_engines.step

    @contextmanager
    def watched() -> Iterator[None]:
        found.append(Copies())
        with found[-1].watch(), _noted_waits(found[-1].waits):
            yield

    def apart(phase_engine: Any, *arguments: Any) -> Any:
        with found[-1].engine_step(), _sync_mode("default"):
            return engine_step(phase_engine, *arguments)

    phase_engines.step = apart
    try:
        with around_steps(watched):
            yield found
    finally:
        phase_engines.step = engine_step


@contextmanager
def around_steps(around: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter a new `around()` for each step of the trainings inside."""
    trainers: Any = training.Trainer
    step = trainers.step

    def inside(trainer: Any, *arguments: Any) -> Any:
        with around():
            return step(trainer, *arguments)

    trainers.step = inside
    try:
        yield
    finally:
        trainers.step = step


@contextmanager
def _noted_waits(waits: Counter[str]) -> Iterator[None]:
    """Count where the host waits for a GPU. On a CPU, nothing waits."""

    def note(message: Any, *_: Any, **__: Any) -> None:
        if SYNCHRONIZING in str(message):
            waits[place_of(sys._getframe(1))[1]] += 1

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{SYNCHRONIZING}")
        warnings.showwarning = note
        with _sync_mode("warn"):
            yield


@contextmanager
def _sync_mode(mode: str) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
