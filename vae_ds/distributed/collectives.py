"""Reductions and gathers over all ranks: sums, rows, small objects.

Shapes: N rows of this rank, X any further dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vae_ds.distributed.ranks import start
from vae_ds.errors import UserError

Value = TypeVar("Value")


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, as a new tensor of the same shape, type and device. A collective: every rank calls it."""
    total = tensor.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


class NamedSums:
    """Sums of this rank by name, which one reduction adds over all ranks. Float64.

    All sums lie in one vector, so a step costs one collective, however many it reports.
    """

    def __init__(self, device: torch.device, **sizes: int) -> None:
        """`sizes`: the number of elements of each sum."""
        self._sizes = sizes
        self._packed = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=device)
        self._sums = dict(zip(sizes, self._packed.split(list(sizes.values())), strict=True))
        # Numbers that the host knows wait here: one copy to the device a reduction, not one an addition.
        self._host = torch.zeros_like(self._packed, device="cpu")
        self._host_sums = dict(zip(sizes, self._host.split(list(sizes.values())), strict=True))

    @torch.no_grad()
    def add(self, **values: torch.Tensor | float | Sequence[float]) -> None:
        """Add to some of the sums: tensors with as many elements, or plain numbers."""
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                self._sums[name] += value.detach().double()
            else:
                self._host_sums[name] += torch.tensor(value, dtype=torch.float64)

    def reduce(self) -> dict[str, torch.Tensor]:
        """The sums over all ranks, on the CPU, and on GPUs the only synchronisation. A collective."""
        total = all_sum(self._packed + self._host.to(self._packed.device)).cpu()
        return dict(zip(self._sizes, total.split(list(self._sizes.values())), strict=True))


def gather_rows(rows_NX: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks in rank order, on every rank; ranks may bring different numbers. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows_NX.detach().clone()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows_NX.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows_NX)], device=rows_NX.device))
    most = int(max(int(count) for count in counts))
    padded = rows_NX.new_zeros((most, *rows_NX.shape[1:]))
    padded[: len(rows_NX)] = rows_NX.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def gather_objects(value: Value) -> list[Value]:
    """The values of all ranks in rank order, on every rank. A collective, for small plain data."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Value, src: int = 0) -> Value:
    """Rank `src`'s value on every rank. A collective, for small plain data."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def barrier() -> None:
    """Wait until every rank is here. A collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def rank0_first(work: Callable[[], Value]) -> Value:
    """Run `work` on rank 0, then on the others, who find its cache. A collective.

    Raises rank 0's UserError on every rank, so that one clear message ends all of them.
    """
    ranks = start()
    value: Value | None = None
    fault: BaseException | None = None
    if ranks.is_main:
        try:
            value = work()
        except Exception as error:  # passed on below: the others wait for an answer
            fault = error
    told = broadcast_object(None if fault is None else (type(fault).__name__, str(fault), isinstance(fault, UserError)))
    if fault is not None:
        raise fault
    if told is not None:
        name, message, is_user_error = told
        raise UserError(message) if is_user_error else RuntimeError(f"rank 0 failed: {name}: {message}")
    if not ranks.is_main:
        value = work()
    return value  # type: ignore[return-value]
