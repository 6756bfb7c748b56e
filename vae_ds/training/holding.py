"""One training at a time holds a run directory, and all nodes see the same one. Rank 0 decides, all ranks agree."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vae_ds import distributed
from vae_ds.distributed import Ranks
from vae_ds.errors import ConfigError
from vae_ds.runtime import EXIT_FAULT, note_exit, run_lock

# A client of NFS can take a new file for absent for up to a minute.
SEEN_WITHIN_S = 90.0
POLL_S = 0.5


def check_free(run_dir: Path, ranks: Ranks) -> None:
    """Raise UserError on every rank if another start trains this run. A collective, for before a long preparation."""
    distributed.rank0_first(lambda: _clear(run_dir) if ranks.is_main else None)


@contextmanager
def hold(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Hold a run directory, which is made if it is absent. A collective.

    Raises UserError on every rank if another start trains this run, if the directory cannot be written, or if a rank
    does not see what rank 0 writes there.
    """
    lock = run_lock.RunLock(run_dir, _exit)
    distributed.rank0_first(lambda: _acquire(lock, run_dir) if ranks.is_main else None)
    try:
        _check_shared(run_dir, distributed.broadcast_object(lock.token), ranks)
        yield
    finally:
        if ranks.is_main:
            lock.release()


def _clear(run_dir: Path) -> None:
    # That a directory cannot be used is told by other checks.
    with suppress(OSError):
        run_lock.clear(run_dir)


def _acquire(lock: run_lock.RunLock, run_dir: Path) -> None:
    try:
        lock.acquire()
    except OSError as error:
        raise ConfigError(f"--run-dir {run_dir}: cannot be written ({error.strerror})") from None


def _check_shared(run_dir: Path, token: str, ranks: Ranks) -> None:
    deadline_s = time.monotonic() + SEEN_WITHIN_S
    while not (is_seen := _sees(run_dir, token)) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    every = distributed.gather_objects((is_seen, socket.gethostname()))
    blind = [f"rank {rank} on {host}" for rank, (sees, host) in enumerate(every) if not sees]
    if blind:
        more = f" and {len(blind) - 1} more do" if len(blind) > 1 else " does"
        raise ConfigError(
            f"--run-dir {run_dir}: not on a disk that all nodes share: {blind[0]}{more} not see what rank 0 on "
            f"{every[0][1]} writes there; choose a directory on a shared disk"
        )


def _sees(run_dir: Path, token: str) -> bool:
    try:
        return run_lock.token_of(run_dir) == token
    except OSError:
        return False


def _exit(reason: str) -> None:
    """End this process: another one trains the run now. The other ranks notice it."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    note_exit(EXIT_FAULT)
    os._exit(EXIT_FAULT)
