"""Torch's fake tensors on "cuda", in any build of torch: operators on tensors of two devices fail, as on a GPU.

A fake tensor has a shape and a device, but no numbers. Without gradients: a backward pass asks for the real device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda")
CONVERSIONS: dict[Any, torch.dtype] = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.double: torch.float64,
    torch.Tensor.long: torch.int64,
    torch.Tensor.bool: torch.bool,
}


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Everything inside creates and takes fake tensors."""
    with torch.no_grad(), _ByOperators(), FakeTensorMode():
        yield


def like(real: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A fake tensor on the device, of the shape of a real one."""
    return torch.empty(real.shape, dtype=dtype or real.dtype, device=CUDA)


class _ByOperators(TorchFunctionMode):
    """Basic indexing and conversions by operators: torch's own methods ask for the real device. A CPU build has none.

    Nothing is moved here that the caller did not move.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and _is_basic(args[1]):
            return _view(*args)
        if func is torch.Tensor.__setitem__ and _is_basic(args[1]):
            value = args[2]
            view = _view(*args[:2])
            if isinstance(value, torch.Tensor):
                return torch.ops.aten.copy_.default(view, value)
            return view.fill_(value)
        if func is torch.Tensor.contiguous:
            return args[0].clone(memory_format=torch.contiguous_format)
        if func is torch.Tensor.__invert__:
            return args[0].bitwise_not()
        if func in CONVERSIONS:
            return torch.ops.aten._to_copy.default(args[0], dtype=CONVERSIONS[func])
        if func is torch.Tensor.to:
            return torch.ops.aten._to_copy.default(args[0], **_target(*args[1:], **kwargs))
        return func(*args, **kwargs)


def _target(*to: Any, **named: Any) -> dict[str, Any]:
    kinds = {torch.dtype: "dtype", torch.device: "device", str: "device"}
    found = {kinds[type(one)]: one for one in to if type(one) in kinds}
    for other in (one for one in to if isinstance(one, torch.Tensor)):
        found |= {"dtype": other.dtype, "device": other.device}
    return found | {key: named[key] for key in ("dtype", "device") if key in named}


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_basic(index: Any) -> bool:
    return all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in _parts(index))


def _view(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    parts = list(_parts(index))
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        named = sum(part is not None for part in parts) - 1
        parts[place : place + 1] = [slice(None)] * (tensor.dim() - named)
    dim = 0
    for part in parts:
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        else:
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
        dim += 1
    return tensor
