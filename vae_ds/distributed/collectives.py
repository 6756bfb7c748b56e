"""Reductions and gathers over all ranks: sums, rows, small objects.

Shapes: N is the number of rows of this rank, X stands for any further dimensions.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vae_ds.distributed.patience import await_rank0, working_alone
from vae_ds.distributed.ranks import start, store
from vae_ds.errors import UserError

Value = TypeVar("Value")


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, as a new tensor of the same shape, dtype and device. A collective: every rank calls it."""
    total = tensor.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def to_device(values: torch.Tensor | Sequence[float], device: torch.device) -> torch.Tensor:
    """Values of the host on the device; plain numbers as float32. The host does not wait for the device."""
    tensor = torch.as_tensor(values)
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from pageable memory waits until the device has finished everything before it.
    return tensor.pin_memory().to(device, non_blocking=True)


class NamedSums:
    """Named float64 sums of this rank. One reduction adds them over all ranks.

    All sums are stored in one vector, so a step needs only one collective for any number of sums.
    """

    def __init__(self, device: torch.device, **sizes: int) -> None:
        """`sizes` gives the number of elements of each sum."""
        self._sizes = sizes
        self._packed = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=device)
        self._sums = dict(zip(sizes, self._packed.split(list(sizes.values())), strict=True))
        # Numbers that are on the host are added here: one copy to the device per reduction, not one per addition.
        self._host = torch.zeros_like(self._packed, device="cpu")
        self._host_sums = dict(zip(sizes, self._host.split(list(sizes.values())), strict=True))

    @torch.no_grad()
    def add(self, **values: torch.Tensor | float | Sequence[float]) -> None:
        """Add to some of the sums. Values are tensors of the size of the sum, or plain numbers."""
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                self._sums[name] += value.detach().double()
            else:
                self._host_sums[name] += torch.tensor(value, dtype=torch.float64)

    def reduce(self) -> dict[str, torch.Tensor]:
        """The sums over all ranks, on the CPU. On GPUs, this is the only synchronization. A collective."""
        total = all_sum(self._packed + to_device(self._host, self._packed.device)).cpu()
        return dict(zip(self._sizes, total.split(list(self._sizes.values())), strict=True))


def gather_rows(rows_NX: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks in rank order, on every rank. Ranks may have different numbers of rows. A collective."""
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


def gather_on_main(value: Value) -> list[Value]:
    """The values of all ranks in rank order on rank 0, an empty list on the others. A collective, for plain data."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def broadcast_object(value: Value, src: int = 0) -> Value:
    """Rank `src`'s value on every rank. A collective, for small plain data."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def barrier() -> None:
    """Wait until every rank has reached this call. A collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def first_fault(work: Callable[[], object], *kinds: type[Exception]) -> str | None:
    """Run `work` on this rank. The first fault of these kinds among all ranks, None if there is none. A collective.

    Every rank gets the same line and can decide alike: none waits for one that has failed.
    """
    fault = None
    try:
        work()
    except kinds as error:  # gathered below: the other ranks wait for it
        fault = f"{type(error).__name__}: {error}"
    told = [f"rank {rank}: {one}" for rank, one in enumerate(gather_objects(fault)) if one is not None]
    return told[0] if told else None


def rank0_first(work: Callable[[], Value]) -> Value:
    """Run `work` on rank 0, then on the other ranks, which find the cache that rank 0 wrote. A collective.

    The other ranks wait as long as rank 0 works, also for hours, and raise Lost if it does nothing any more.
    If rank 0 raises a UserError, every rank raises one with the same message.
    """
    ranks = start()
    value: Value | None = None
    fault: BaseException | None = None
    common = store()
    if ranks.is_main:
        with nullcontext() if common is None else working_alone(common):
            try:
                value = work()
            except Exception as error:  # raised below: the other ranks wait for the broadcast
                fault = error
    elif common is not None:
        await_rank0(common)
    failure = broadcast_object(
        None if fault is None else (type(fault).__name__, str(fault), isinstance(fault, UserError))
    )
    if fault is not None:
        raise fault
    if failure is not None:
        name, message, is_user_error = failure
        raise UserError(message) if is_user_error else RuntimeError(f"rank 0 failed: {name}: {message}")
    if not ranks.is_main:
        value = work()
    return value  # type: ignore[return-value]
