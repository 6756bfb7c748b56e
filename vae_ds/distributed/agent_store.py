"""The store of torchrun's agent: how ranks find each other there, and what an attempt leaves for the next one.

torchrun starts failed ranks again (`--max-restarts`) and keeps its store, with all that the ranks before have written.
A node whose ranks did not fail counts no restart, so the ranks have no number of their attempt in common: they agree on
a new name for it, and keep their keys under this name.

torchrun starts the ranks again after every exit code but 0, also after a stop and after wrong input. So a rank leaves
such a code under the name of its agent, and the ranks that this agent starts because of it end at once. What the agent
does not count as a restart (`--nnodes 1:2`, a node has joined) goes on.
"""

import os
import socket
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from vae_ds.errors import ConfigError, Lost, Stopped
from vae_ds.runtime import EXIT_STOPPED, EXIT_USER

POLL_S = 0.1
CONNECT_WITHIN = timedelta(seconds=20)
_ATTEMPT, _OVER = "vae_ds/attempt", "vae_ds/over"


def is_used(env: Mapping[str, str]) -> bool:
    """Whether torchrun's agent serves a store at MASTER_ADDR and MASTER_PORT, so that rank 0 must not listen there."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_attempt(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """The part of the agent's store that belongs to this attempt alone. Returns once all its ranks are there.

    Raises Stopped or ConfigError if an earlier attempt was stopped or had wrong input, and Lost after `timeout`.
    """
    store = _connect()
    store.set_timeout(timeout)
    _look_back(store)
    return _join(store, rank, world, timeout)


def note_end(code: int) -> None:
    """Leave the exit code of this rank for the ranks that torchrun may start in its place."""
    if is_used(os.environ) and code in (EXIT_STOPPED, EXIT_USER):
        _connect().set(_end_key(), f"{code} {_restarts()}")


def _connect() -> dist.TCPStore:
    """The agent serves its store before it starts ranks. If it does not answer soon, the first node has ended."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(address, port, is_master=False, timeout=CONNECT_WITHIN)
    except (RuntimeError, dist.DistError):
        raise Lost(f"torchrun's store at {address}:{port} does not answer; the first node has ended") from None


def _end_key() -> str:
    """The agent is the parent of its ranks, and stays the same from attempt to attempt."""
    return f"vae_ds/end/{socket.gethostname()}/{os.getppid()}"


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _look_back(store: dist.Store) -> None:
    if store.check([_end_key()]):
        code, restarts = store.get(_end_key()).decode().split()
        if _restarts() > int(restarts):
            store.set(_OVER, code)
    _check_over(store)


def _check_over(store: dist.Store) -> None:
    if not store.check([_OVER]):
        return
    message = "torchrun has started the ranks again; nothing is trained: "
    if int(store.get(_OVER)) == EXIT_STOPPED:
        raise Stopped(f"{message}the run was stopped; run the same command again to resume")
    raise ConfigError(f"{message}the input is wrong, see the error of the first start")


def _join(store: dist.Store, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Rank 0 names the attempt; each other rank answers under that name with a word of its own; rank 0 lists the words.

    A name from an earlier attempt has a list without the words of this one.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set(_ATTEMPT, own)
    deadline_s = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline_s:
        _check_over(store)
        name = _complete(store, own, world) if rank == 0 else _answered(store, rank, own)
        if name is not None:
            return dist.PrefixStore(name, store)
        time.sleep(POLL_S)
    raise Lost(f"torchrun: not all of the {world} ranks have started within {timeout.total_seconds():g} s")


def _complete(store: dist.Store, name: str, world: int) -> str | None:
    answers = [f"{name}/{rank}" for rank in range(1, world)]
    if answers and not store.check(answers):
        return None
    store.set(f"{name}/present", " ".join(store.get(key).decode() for key in answers))
    return name


def _answered(store: dist.Store, rank: int, own: str) -> str | None:
    if not store.check([_ATTEMPT]):
        return None
    name = store.get(_ATTEMPT).decode()
    store.set(f"{name}/{rank}", own)
    is_listed = store.check([f"{name}/present"]) and own in store.get(f"{name}/present").decode().split()
    return name if is_listed else None
