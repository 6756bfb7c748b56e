"""Ranks, random streams, reductions, and the stop flag that signals set.

Shapes: N rows of this rank, X any further dimensions.
"""

import errno
import hashlib
import os
import random
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from vae_ds.errors import ConfigError, UserError

Value = TypeVar("Value")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int
    local_rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


_ranks: Ranks | None = None


def start() -> Ranks:
    """Join the process group, once: NCCL where there are GPUs, gloo elsewhere; one process alone works too.

    Ranks come from RANK, LOCAL_RANK and WORLD_SIZE (deepspeed and torchrun set them), else from SLURM's variables.
    Raises ConfigError if only some of them are set.
    """
    global _ranks
    if _ranks is not None:
        return _ranks
    rank, local_rank, world = _numbers()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # A task that sees one device only (SLURM's --gpus-per-task=1) has a local rank past it.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        _pin_threads(world)
    if not dist.is_initialized():
        if _is_loopback(os.environ["MASTER_ADDR"]) and "lo" in (name for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = open_store(int(os.environ["MASTER_PORT"]), rank == 0, COLLECTIVE_TIMEOUT)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT
        )
    _ranks = Ranks(rank, local_rank, world, device)
    return _ranks


def open_store(port: int, serve: bool, timeout: timedelta) -> dist.TCPStore:
    """A store at MASTER_ADDR: served there (port 0: any free one), or joined.

    The server listens at that address alone; torch's own listens at every address of the machine.
    Raises ConfigError if the address or the port cannot be had.
    """
    host = os.environ["MASTER_ADDR"]
    if not serve:
        return dist.TCPStore(host, port, is_master=False, timeout=timeout)
    try:
        listener = _listener(host, port)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {host}, MASTER_PORT {port}: cannot listen there ({error.strerror})") from None
    # The store closes the socket when it ends, so Python must not.
    address, fd = listener.getsockname(), listener.detach()
    return dist.TCPStore(host, address[1], is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=fd)


def _listener(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        # Behind address translation this host's name may stand for an address that none of its interfaces has.
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        listener.bind(("", port))
    listener.listen(1024)
    return listener


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def finish() -> None:
    """Leave the process group; for a successful end only, since every rank must come here."""
    global _ranks
    if _ranks is not None and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    _ranks = None


def _numbers() -> tuple[int, int, int]:
    """Rank, local rank, world size; sets the variables that torch and DeepSpeed read where they are missing."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    if "RANK" not in env:
        env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise ConfigError(f"RANK is set but not {', '.join(missing)}; start through `deepspeed`, `torchrun` or `srun`")
    env.setdefault("LOCAL_RANK", "0")
    return int(env["RANK"]), int(env["LOCAL_RANK"]), int(env["WORLD_SIZE"])


def free_port() -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pin_threads(world: int) -> None:
    """Share the cores of this machine among its ranks: the launcher leaves it to each to take all of them."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // max(1, here)))


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, as a new tensor of the same shape, type and device. A collective: every rank calls it."""
    total = tensor.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


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


def stream(*keys: int | str) -> np.random.Generator:
    """A counter-based random generator that is a function of `keys` alone, the same on every rank and machine."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def seed_everything(seed: int, rank: int, phase: int) -> None:
    """Seed the generators behind dropout, differently on each rank; the method's own draws use `stream`."""
    numbers = stream(seed, "phase", phase, "rank", rank).integers(0, 2**31, size=3)
    random.seed(int(numbers[0]))
    np.random.seed(int(numbers[1]))
    torch.manual_seed(int(numbers[2]))


def cache_dir(configured: str | None = None) -> Path:
    """Where prepared corpora are kept: the setting, else $VAE_DS_CACHE, else ~/.cache/vae_ds."""
    chosen = configured or os.environ.get("VAE_DS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vae_ds"


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1; the ranks agree on it at a step boundary, save, and exit with 75.

    A second SIGINT interrupts at once, for the impatient.
    """

    def __init__(self) -> None:
        self.raised: str | None = None

    def install(self) -> None:
        """Take over the three signals. Only the main thread of a process may do so."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.raised == "SIGINT":
            raise KeyboardInterrupt
        self.raised = signal.Signals(number).name
