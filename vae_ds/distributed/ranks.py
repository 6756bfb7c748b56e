"""The process group: the numbers of this rank, joining the group, and leaving it."""

import errno
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from vae_ds.distributed import agent_store
from vae_ds.distributed.patience import COLLECTIVE_TIMEOUT
from vae_ds.errors import ConfigError
from vae_ds.runtime import cores, free_port, slurm

# Environment variables of a rank that `start` may set. `finish` restores them, and OMP_NUM_THREADS.
VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"),
)


@dataclass(frozen=True)
class Ranks:
    """The rank, local rank, world size and device of this process."""

    rank: int
    local_rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0


_ranks: Ranks | None = None
_store: dist.Store | None = None
_before: dict[str, str | None] = {}


def start() -> Ranks:
    """Join the process group once: NCCL on GPUs, gloo on CPUs. A single process works too.

    The ranks come from RANK, LOCAL_RANK and WORLD_SIZE (set by deepspeed and torchrun), else from SLURM's variables.
    Raises ConfigError if only some of them are set.
    """
    global _ranks, _store, _before
    if _ranks is not None:
        return _ranks
    _before = {name: os.environ.get(name) for name in (*VARIABLES, "OMP_NUM_THREADS")}
    rank, local_rank, world = _numbers()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # A task that sees only one device (SLURM's --gpus-per-task=1) can have a local rank above 0.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    _pin_threads(world)
    if not dist.is_initialized():
        interface = interface_to(os.environ["MASTER_ADDR"])
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        _store = _rendezvous(rank, world)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=_store, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT
        )
    _ranks = Ranks(rank, local_rank, world, device)
    return _ranks


def _rendezvous(rank: int, world: int) -> dist.Store:
    """The store in which the ranks find each other: that of torchrun's agent, else one that rank 0 serves."""
    if not agent_store.is_used(os.environ):
        return open_store(int(os.environ["MASTER_PORT"]), rank == 0, COLLECTIVE_TIMEOUT)
    return agent_store.open_attempt(rank, world, COLLECTIVE_TIMEOUT)


def open_store(port: int, serve: bool, timeout: timedelta) -> dist.TCPStore:
    """Open a TCPStore at MASTER_ADDR: as its server (port 0: any free port), or as a client.

    The server listens only at this address. Torch's own server listens at every address of the machine.
    Raises ConfigError if it cannot listen at the address and port.
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
        # Behind address translation, the name of this host can resolve to an address that none of its interfaces has.
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        listener.bind(("", port))
    listener.listen(1024)
    return listener


def interface_to(host: str) -> str | None:
    """The network interface of this machine that is used to reach `host`. None if it cannot be determined.

    By default, gloo uses the interface that this machine's own name resolves to, which is often the loopback.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Connecting a datagram socket sends nothing; it only looks up the route.
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    if own.startswith("127."):
        own = "127.0.0.1"
    return next((name for name, found in interfaces if own in [one.address for one in found]), None)


def store() -> dist.Store | None:
    """The store in which the ranks of this group have found each other. None for one process, or before `start`."""
    return _store if _ranks is not None and _ranks.world > 1 else None


def part() -> None:
    """The last barrier: wait until every rank is here. After it, a process can exit at once. A collective.

    Gloo's own barrier is not sufficient: a rank that leaves it can still have unsent data for the others.
    """
    if _ranks is None or _store is None or _ranks.world == 1:
        return
    _store.set(f"parted/{_ranks.rank}", "")
    try:
        _store.wait([f"parted/{rank}" for rank in range(_ranks.world)], COLLECTIVE_TIMEOUT)
    except (RuntimeError, dist.DistError):
        # Rank 0 serves the store, and exits as soon as it has seen all ranks.
        if _ranks.is_main:
            raise
    if _ranks.is_main:
        # Let the other ranks receive their answer before the store closes; otherwise they report an error.
        time.sleep(0.2)


def finish() -> None:
    """Leave the process group and restore the environment. Only for a successful end: every rank must call it."""
    global _ranks, _store, _before
    part()
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _ranks, _store, _before = None, None, {}


def _numbers() -> tuple[int, int, int]:
    """Rank, local rank and world size. Sets the variables that torch and DeepSpeed read, if they are missing."""
    env = os.environ
    if "RANK" not in env and (task := slurm.task(env)) is not None:
        env.update(RANK=str(task.rank), LOCAL_RANK=str(task.local_rank), WORLD_SIZE=str(task.world))
        env.update(MASTER_ADDR=task.master_addr, MASTER_PORT=str(task.master_port))
        env.update(LOCAL_WORLD_SIZE=str(task.local_world))
    if "RANK" not in env:
        env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise ConfigError(f"RANK is set but not {', '.join(missing)}; start with `deepspeed`, `torchrun` or `srun`")
    env.setdefault("LOCAL_RANK", "0")
    return int(env["RANK"]), int(env["LOCAL_RANK"]), int(env["WORLD_SIZE"])


def _pin_threads(world: int) -> None:
    """Divide the cores of this machine among its ranks, on GPU nodes too: the CPU updates what is offloaded to it.

    Without this, each rank would use all cores, or with torchrun, which sets OMP_NUM_THREADS=1, a single one. The
    variable is for libraries that are loaded later and have an OpenMP of their own, such as DeepSpeed's CPU Adam.
    """
    env = os.environ
    if "OMP_NUM_THREADS" in env and not _is_torchruns_default(env):
        return
    by_srun = _before["RANK"] is None and world > 1
    here = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", world)))
    threads = max(1, cores() // max(1, here))
    if by_srun and "SLURM_CPUS_PER_TASK" in env:
        threads = int(env["SLURM_CPUS_PER_TASK"])
    elif by_srun and cores() < int(env.get("SLURM_CPUS_ON_NODE", "0")):
        # SLURM has bound this task to cores of its own.
        threads = cores()
    torch.set_num_threads(threads)
    env["OMP_NUM_THREADS"] = str(threads)


def _is_torchruns_default(env: Mapping[str, str]) -> bool:
    """Whether torchrun has set OMP_NUM_THREADS by itself: its agent, the parent, was started without it."""
    if "TORCHELASTIC_RUN_ID" not in env:
        return False
    try:
        return "OMP_NUM_THREADS" not in psutil.Process(os.getppid()).environ()
    except (psutil.Error, OSError):
        return False
