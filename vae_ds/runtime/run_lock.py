"""A run directory belongs to one training at a time: the file `run.lock` names the process that holds it.

File locks of the kernel do not work on every network file system, so the file itself is the lock. `link` makes it,
whole and atomically, also over NFS. Its holder touches it every few seconds.

The lock of a process that is gone never blocks for long:

- On the same machine, a look at the process decides at once.
- For another machine, the file is watched. If it is not touched for LOST_AFTER_S, its holder is lost.
- A SLURM job that was requeued takes over at once: SLURM ends a job before it starts it again.

A lock is never removed to be taken over: between the removal of an old lock and the making of a new one, a slow process
could remove the new one. Instead, the file `.run.lock-after-TOKEN` names the successor of the holder with this token.
`link` makes it too, so that each holder has one successor, and the last successor holds the directory. It then renames
its own file to `run.lock`, and removes the names that are no longer needed.
"""

import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from vae_ds.errors import InUseError
from vae_ds.runtime import machine

NAME = "run.lock"
BEAT_S = 10.0
LOST_AFTER_S = 120.0
# So old that no difference between the clocks of two machines explains it.
SURELY_LOST_AFTER_S = 1800.0
POLL_S = 1.0


@dataclass(frozen=True)
class Holder:
    """Who holds a run directory. `place` is the machine (and container) that `pid` belongs to."""

    token: str
    host: str
    place: str
    pid: int
    born: str
    since: str
    job: str
    start: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since.replace('T', ' ').replace('+00:00', ' UTC')}"


class RunLock:
    """The lock of a run directory, held by this process from `acquire` to `release`."""

    def __init__(self, run_dir: str | Path, on_lost: Callable[[str], None]) -> None:
        """`on_lost` gets one line if another process has taken the lock: this one was silent for too long."""
        self.path = Path(run_dir) / NAME
        self.token = uuid.uuid4().hex
        self._on_lost = on_lost
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock. Creates the directory. Raises InUseError if another process holds it, OSError of the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = self.path.with_name(f".{NAME}-{self.token}")
        own.write_text(json.dumps(asdict(_this_process(self.token))), encoding="utf-8")
        try:
            while not _linked(own, self.path) and not self._succeeds(own):
                pass
        finally:
            own.unlink(missing_ok=True)
        _OURS[self.token] = self
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock back. Does nothing if another process has taken it."""
        self._released.set()
        _OURS.pop(self.token, None)
        with suppress(OSError):
            if token_of(self.path.parent) == self.token:
                self.path.unlink()

    def _succeeds(self, own: Path) -> bool:
        """Take over from a holder that is gone, False if the lock has changed meanwhile. Raises as `acquire`."""
        holders = _succession(self.path)
        if not holders:
            return False
        last_path, last = holders[-1]
        if not _is_gone(last_path, last):
            raise InUseError(
                f"{self.path.parent}: another start trains this run: {last}; wait for its end, stop it, or choose "
                "another --run-dir"
            )
        claim = _after(self.path, last)
        if not last_path.exists() or not _linked(own, claim):
            return False
        try:
            # Another successor may have taken over, and removed the names before, since this process looked.
            if [holder.token for _, holder in _succession(self.path)][-1:] != [self.token]:
                return False
            own.replace(self.path)
            for path, _ in holders[1:]:
                path.unlink(missing_ok=True)
        finally:
            claim.unlink(missing_ok=True)
        return True

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            # A disk that does not answer for a while is no loss. Nor is a lock that someone has deleted.
            with suppress(OSError):
                holder = _holder(self.path)
                if holder is not None and holder.token != self.token and not self._released.is_set():
                    self._on_lost(f"{self.path}: {holder} has taken over: this process was silent for too long")
                    return
                os.utime(self.path)


def clear(run_dir: str | Path) -> None:
    """Remove the lock of a process that is gone; on another machine this takes up to LOST_AFTER_S to find out.

    Raises InUseError if the process still runs, OSError of the disk.
    """
    if (Path(run_dir) / NAME).exists():
        lock = RunLock(run_dir, lambda _: None)
        lock.acquire()
        lock.release()


def token_of(run_dir: str | Path) -> str | None:
    """The token of the process that holds a run directory, None if none does."""
    holder = _holder(Path(run_dir) / NAME)
    return None if holder is None else holder.token


def is_held_by_another(run_dir: str | Path) -> bool:
    """Whether a process that may still run, other than this one, holds a run directory."""
    holder = _holder(Path(run_dir) / NAME)
    return holder is not None and holder.token not in _OURS and _is_known_gone(holder) is not True


def release_all() -> None:
    """Release every lock of this process, which is about to end without the usual clean-up."""
    for lock in list(_OURS.values()):
        lock.release()


_OURS: dict[str, RunLock] = {}


def _this_process(token: str) -> Holder:
    return Holder(
        token=token,
        host=socket.gethostname(),
        place=_place(),
        pid=os.getpid(),
        born=machine.birth_of(os.getpid()),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        job=os.environ.get("SLURM_JOB_ID", ""),
        start=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )


def _place() -> str:
    """Names this machine since its last boot, and the container, so that process ids here mean the same processes."""
    known = [socket.gethostname()]
    with suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        known.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(known)


def _linked(own: Path, lock: Path) -> bool:
    try:
        os.link(own, lock)
    except FileExistsError:
        # Over NFS, the answer to a link that was made can get lost, and the repeated request fails.
        return own.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system without links. A reader takes a file that is not complete for one that is being written.
        try:
            with lock.open("x", encoding="utf-8") as file:
                file.write(own.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _holder(path: Path) -> Holder | None:
    """What a lock says, None if there is none. Raises OSError."""
    try:
        with path.open(encoding="utf-8") as file:
            number = os.fstat(file.fileno()).st_ino
            content = json.load(file)
        return Holder(**{field.name: content[field.name] for field in fields(Holder)})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return Holder(f"unknown-{number}", "an unknown host", "", 0, "", "an unknown time", "", 0)


def _after(lock: Path, holder: Holder) -> Path:
    """The name of the file that names the successor of a holder."""
    return lock.with_name(f".{NAME}-after-{holder.token}")


def _succession(lock: Path) -> list[tuple[Path, Holder]]:
    """The holder that a lock names, and its successors in turn, each with its file; empty if there is no lock.

    There are successors only while one takes over, or if it has ended while it did so. Raises OSError.
    """
    found: list[tuple[Path, Holder]] = []
    path = lock
    while (holder := _holder(path)) is not None:
        found.append((path, holder))
        path = _after(lock, holder)
    return found


def _is_gone(path: Path, holder: Holder) -> bool:
    known = _is_known_gone(holder)
    return _is_silent(path, holder) if known is None else known


def _is_known_gone(holder: Holder) -> bool | None:
    """Whether the holder is gone, None if that cannot be known from here."""
    if holder.place and holder.place == _place():
        return machine.birth_of(holder.pid) != holder.born
    this = _this_process("")
    if holder.job and holder.job == this.job and holder.start < this.start:
        return True
    return None


def _is_silent(path: Path, holder: Holder) -> bool:
    """Watch a lock until it is touched, or until LOST_AFTER_S have passed. Needs no common clock."""
    before = _touched_s(path)
    if before is not None and time.time() - before > SURELY_LOST_AFTER_S:
        return True
    print(
        f"{path}: held by {holder}; waiting up to {LOST_AFTER_S:g} s to see whether it is lost",
        file=sys.stderr,
        flush=True,
    )
    deadline_s = time.monotonic() + LOST_AFTER_S
    while time.monotonic() < deadline_s:
        time.sleep(POLL_S)
        now = _touched_s(path)
        if now != before:
            return now is None
    return True


def _touched_s(path: Path) -> float | None:
    try:
        # Opening a file asks the server of a network file system; a look at its name may be answered by a cache.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
