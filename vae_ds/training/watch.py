"""The watchdog of a rank: ends it within seconds if its launcher is lost, or if another rank is lost or hangs.

- A launcher that dies leaves its ranks running (DeepSpeed's does, and can exit 0). The ranks then stop as after a
  signal, with a checkpoint.
- A rank that is lost leaves the others waiting in a collective until its time-out. So each rank writes heartbeats to
  a store beside the process group. Rank 0 reads them all, and its diagnosis ends every rank.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Self

import psutil
import torch.distributed as dist

from vae_ds import distributed
from vae_ds.config import TimeoutConfig
from vae_ds.distributed import Ranks
from vae_ds.runtime import EXIT_FAULT, EXIT_LOST, StopFlag, is_alive, launchers_of, note_exit, run_lock

POLL_S = 1.0
SAVE_WITHIN_S = 120.0
MARGIN = timedelta(minutes=5)


class Watch:
    """The watchdog of this rank, as a context manager. Every rank enters and leaves it; entering is a collective."""

    def __init__(
        self, ranks: Ranks, stop: StopFlag, timeouts: TimeoutConfig, on_end: Callable[[str, int], None] | None = None
    ) -> None:
        """`stop` is raised when a launcher is lost. `on_end` gets reason and exit code before the watchdog exits."""
        self._ranks, self._stop, self._timeouts, self._on_end = ranks, stop, timeouts, on_end
        self._launchers = launchers_of(psutil.Process())
        self._advanced = 0
        self._deadline_s: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._store: dist.TCPStore | None = None
        self._unheard = 0
        self._verdict: str | None = None

    def advance(self) -> None:
        """Report progress. Call it before each operation that can wait for other ranks."""
        self._advanced += 1

    def __enter__(self) -> Self:
        if self._ranks.world > 1:
            self._store = self._open_store()
            threading.Thread(target=self._talk, args=(self._store,), name="heartbeats", daemon=True).start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        self._thread.join(timeout=2 * POLL_S)
        # Rank 0's store ends with its process; the others must not look for it after that.
        if kind is None:
            distributed.barrier()

    def _open_store(self) -> dist.TCPStore:
        """One store on a free port of rank 0's host."""
        patience = timedelta(seconds=self._timeouts.silent_s)
        store = distributed.open_store(0, True, patience) if self._ranks.is_main else None
        port = distributed.broadcast_object(store.port if store is not None else 0)
        store = store or distributed.open_store(port, False, patience)
        # NCCL aborts a process that waits for longer, before anything names the rank that it waits for.
        distributed.set_timeout(timedelta(seconds=self._timeouts.stalled_s + self._timeouts.silent_s) + MARGIN)
        # Before any training, so that the host of every rank is known if the rank falls silent.
        self._sign(store, 0)
        return store

    def _run(self) -> None:
        while not self._closing.wait(POLL_S):
            self._look_at_launchers()
            if self._store is None:
                continue
            # Counted in turns, not in seconds: a process that was suspended received nothing, and no rank is at fault.
            self._unheard += 1
            if self._verdict is None and self._unheard * POLL_S > self._timeouts.silent_s:
                self._verdict = self._lost("no answer")
            if self._verdict is not None and not self._closing.is_set():
                self._end(self._verdict, EXIT_LOST)

    def _talk(self, store: dist.TCPStore) -> None:
        """Exchange heartbeats. Runs in a thread of its own, since a wait on a broken link never ends."""
        board = Board(self._ranks.world, self._timeouts)
        turns = 0
        while self._verdict is None and not self._closing.wait(POLL_S):
            turns += 1
            try:
                self._verdict = self._exchange(store, board, turns)
            except (RuntimeError, dist.DistError) as error:
                self._verdict = self._lost(_line(error))
            self._unheard = 0

    def _lost(self, how: str) -> str:
        return f"rank 0 is lost or has been silent for {self._timeouts.silent_s:g} s ({how})"

    def _look_at_launchers(self) -> None:
        lost = next((one for one in self._launchers if not is_alive(one)), None)
        if lost is None:
            return
        if self._deadline_s is None:
            self._deadline_s = time.monotonic() + SAVE_WITHIN_S
            self._stop.raised = self._stop.raised or f"the loss of its launcher, process {lost.pid}"
        if time.monotonic() > self._deadline_s:
            self._end(
                f"its launcher, process {lost.pid}, is lost, and the ranks did not stop within {SAVE_WITHIN_S:g} s",
                EXIT_FAULT,
            )

    def _exchange(self, store: dist.TCPStore, board: "Board", turns: int) -> str | None:
        """Write this rank's heartbeat; rank 0 also reads all of them. Returns the diagnosis if a rank is lost."""
        self._sign(store, turns)
        if self._ranks.is_main:
            for rank in range(self._ranks.world):
                if store.check([f"sign/{rank}"]):
                    board.note(rank, store.get(f"sign/{rank}").decode(), time.monotonic())
            verdict = board.verdict(time.monotonic())
            if verdict is None:
                return None
            store.set("verdict", verdict)
            # The others need time to read it: the store ends with this process.
            time.sleep(3 * POLL_S)
            return verdict
        return store.get("verdict").decode() if store.check(["verdict"]) else None

    def _sign(self, store: dist.TCPStore, turns: int) -> None:
        store.set(f"sign/{self._ranks.rank}", f"{turns} {self._advanced} {socket.gethostname()}")

    def _end(self, reason: str, code: int) -> None:
        print(f"error: rank {self._ranks.rank} exits: {reason}", file=sys.stderr, flush=True)
        if self._on_end is not None:
            self._on_end(reason, code)
        run_lock.release_all()
        note_exit(code)
        os._exit(code)


@dataclass
class Board:
    """What rank 0 knows of the ranks: their last heartbeats, and when these last changed."""

    world: int
    timeouts: TimeoutConfig
    begun_s: float = field(default_factory=time.monotonic)
    signs: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    alive_s: dict[int, float] = field(default_factory=dict)
    advanced_s: dict[int, float] = field(default_factory=dict)

    def note(self, rank: int, sign: str, now_s: float) -> None:
        """Record a heartbeat as the store has it: turns of the watchdog, advances of the training, host."""
        turns, advanced, host = sign.split(" ", 2)
        before = self.signs.get(rank)
        self.signs[rank] = (int(turns), int(advanced), host)
        if before is None or before[0] != int(turns):
            self.alive_s[rank] = now_s
        if before is None or before[1] != int(advanced):
            self.advanced_s[rank] = now_s

    def verdict(self, now_s: float) -> str | None:
        """What is wrong, with the names of the ranks; None if nothing is."""
        silent = [r for r in range(self.world) if now_s - self.alive_s.get(r, self.begun_s) > self.timeouts.silent_s]
        if silent:
            return f"no heartbeat from {self._names(silent)} for {self.timeouts.silent_s:g} s"
        still = [r for r in self.signs if now_s - self.advanced_s[r] > self.timeouts.stalled_s]
        if len(still) < self.world:
            return None
        least = min(self.signs[rank][1] for rank in still)
        behind = [rank for rank in still if self.signs[rank][1] == least]
        who = f"{self._names(behind)} behind the others" if len(behind) < self.world else "on all ranks"
        return f"no progress for {self.timeouts.stalled_s:g} s, {who}"

    def _names(self, ranks: Sequence[int]) -> str:
        known = {rank: f" on {self.signs[rank][2]}" for rank in ranks if rank in self.signs}
        return ", ".join(f"rank {rank}{known.get(rank, '')}" for rank in ranks)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
