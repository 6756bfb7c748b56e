"""How long ranks wait for each other: in collectives, and while rank 0 prepares something alone."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import psutil
import torch.distributed as dist

from vae_ds.errors import Lost

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Rank 0 may work alone for hours. It is lost if it does nothing at all for this time: it uses no processor and no disk.
IDLE_S = 1800.0
BEAT_S = 5.0
# What counts as work between two beats: this share of a processor, or so many bytes read or written. The beats, the
# store and other threads of the libraries use less.
LEAST_SHARE, LEAST_BYTES = 0.05, 2**20
LEAST_POLL_S, MOST_POLL_S = 0.05, 2.0

_timeout = COLLECTIVE_TIMEOUT
_works = 0


def set_timeout(timeout: timedelta) -> None:
    """Let a collective of any process group wait this long, also of groups that are made before `apply_timeout`.

    NCCL aborts the process after this time, so a diagnosis that names the rank must come before.
    """
    global _timeout
    _timeout = timeout
    apply_timeout()


def apply_timeout() -> None:
    """Set the time-out for all process groups. Those that DeepSpeed makes have 10 minutes by default under NCCL."""
    if not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(_timeout, group)


@contextmanager
def working_alone(store: dist.Store) -> Iterator[None]:
    """Rank 0 works inside this, and the other ranks call `await_rank0` at the same time. A collective."""
    key, over = _next_key(), threading.Event()

    def beat() -> None:
        turns, meter = 0, _Meter()
        while not over.wait(BEAT_S):
            turns += meter.has_worked()
            # Without the other ranks, the work itself still has a result or an error to tell.
            with suppress(RuntimeError, dist.DistError):
                store.set(key, str(turns))

    thread = threading.Thread(target=beat, name="rank 0 works", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        store.set(f"{key}/over", "")


def await_rank0(store: dist.Store) -> None:
    """Wait until rank 0 has left `working_alone`, however long it works. Raises Lost if it does nothing any more."""
    key, before = _next_key(), b""
    began_s = changed_s = time.monotonic()
    try:
        while not store.check([f"{key}/over"]):
            now = store.get(key) if store.check([key]) else b""
            if now != before:
                before, changed_s = now, time.monotonic()
            if time.monotonic() - changed_s > IDLE_S:
                raise Lost(f"rank 0 has done nothing for {IDLE_S:g} s, while the other ranks wait for what it prepares")
            # The store of rank 0 answers all ranks.
            time.sleep(min(MOST_POLL_S, max(LEAST_POLL_S, (time.monotonic() - began_s) / 10)))
    except (RuntimeError, dist.DistError) as error:
        raise Lost(f"rank 0 has ended, while the other ranks wait for what it prepares ({_line(error)})") from None


def is_loss(error: BaseException) -> bool:
    """Whether an error of a collective says that another rank or its machine is gone, as NCCL tells it."""
    told = (
        "ncclRemoteError",
        "remote process exit",
        "communicator was aborted",
        "Watchdog caught collective operation",
    )
    return isinstance(error, dist.DistError) and any(words in str(error) for words in told)


def is_consequence(error: BaseException) -> bool:
    """Whether an error of a collective tells only that a connection to another rank has closed, as gloo says it.

    The other rank may have failed, or it may be gone. Only its exit code tells which.
    """
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def _next_key() -> str:
    global _works
    _works += 1
    return f"rank0/{_works}"


class _Meter:
    """Tells whether this process or a child of it has worked since the last look. One thread alone uses it."""

    def __init__(self) -> None:
        self._process = psutil.Process(os.getpid())
        self._seconds, self._bytes = self._processor_s(), self._moved()

    def has_worked(self) -> bool:
        moved = self._moved() - self._bytes
        seconds = self._processor_s()
        # A child that has ended is no longer in the sum.
        has_computed = abs(seconds - self._seconds) > LEAST_SHARE * BEAT_S
        # Looking at the children reads files too: not counted.
        self._seconds, self._bytes = seconds, self._moved()
        return has_computed or moved > LEAST_BYTES

    def _processor_s(self) -> float:
        total = sum(self._process.cpu_times()[:2]) - time.thread_time()
        with suppress(psutil.Error):
            for child in self._process.children(recursive=True):
                with suppress(psutil.Error):
                    total += sum(child.cpu_times()[:2])
        return float(total)

    def _moved(self) -> int:
        # Not every system counts bytes.
        with suppress(psutil.Error, AttributeError):
            counted = self._process.io_counters()
            return int(counted.read_chars + counted.write_chars)
        return 0


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
