"""Notices that a launcher is gone, or that a rank is gone or hangs, and ends this rank within seconds.

A launcher that dies leaves its ranks behind (DeepSpeed's does, and may exit 0): they then stop as after a signal, with
a checkpoint. A rank that is gone leaves the others waiting in a collective for as long as its time-out: each rank
gives a sign of life through a store beside the process group, rank 0 looks at all, and its verdict ends everybody.
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
from vae_ds.runtime import EXIT_FAULT, EXIT_LOST, StopFlag, is_alive, launchers_of, note_exit

POLL_S = 1.0
SAVE_WITHIN_S = 120.0


class Watch:
    """Threads of this rank, from `with` to its end. Every rank enters and leaves it; entering is a collective."""

    def __init__(
        self, ranks: Ranks, stop: StopFlag, timeouts: TimeoutConfig, on_end: Callable[[str], None] | None = None
    ) -> None:
        """`stop` is raised when a launcher is lost; `on_end` is told the reason before this process ends itself."""
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
        """The training goes on: call it before whatever may wait for the other ranks."""
        self._advanced += 1

    def __enter__(self) -> Self:
        if self._ranks.world > 1:
            self._store = self._open_store()
            threading.Thread(target=self._talk, args=(self._store,), name="signs of life", daemon=True).start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        self._thread.join(timeout=2 * POLL_S)
        # Rank 0's store ends with it: the others must not miss it while they still look.
        if kind is None:
            distributed.barrier()

    def _open_store(self) -> dist.TCPStore:
        """One store on a free port of rank 0's host."""
        patience = timedelta(seconds=self._timeouts.silent_s)
        store = distributed.open_store(0, True, patience) if self._ranks.is_main else None
        port = distributed.broadcast_object(store.port if store is not None else 0)
        store = store or distributed.open_store(port, False, patience)
        # Before any training, so that every rank's host is known whenever it falls silent.
        self._sign(store, 0)
        return store

    def _run(self) -> None:
        while not self._closing.wait(POLL_S):
            self._look_at_launchers()
            if self._store is None:
                continue
            # Turns and not seconds: a process that was suspended has heard nothing, and is not to blame anyone.
            self._unheard += 1
            if self._verdict is None and self._unheard * POLL_S > self._timeouts.silent_s:
                self._verdict = self._lost("no answer")
            if self._verdict is not None and not self._closing.is_set():
                self._end(self._verdict, EXIT_LOST)

    def _talk(self, store: dist.TCPStore) -> None:
        """Exchange signs of life; in a thread of its own, since nothing ends a wait on a link that was cut."""
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
        return f"rank 0 is gone or has been silent for {self._timeouts.silent_s:g} s ({how})"

    def _look_at_launchers(self) -> None:
        lost = next((one for one in self._launchers if not is_alive(one)), None)
        if lost is None:
            return
        if self._deadline_s is None:
            self._deadline_s = time.monotonic() + SAVE_WITHIN_S
            self._stop.raised = self._stop.raised or f"the loss of its launcher, process {lost.pid}"
        if time.monotonic() > self._deadline_s:
            self._end(
                f"its launcher, process {lost.pid}, is gone, and the ranks did not stop in {SAVE_WITHIN_S:g} s",
                EXIT_FAULT,
            )

    def _exchange(self, store: dist.TCPStore, board: "Board", turns: int) -> str | None:
        """Give this rank's sign of life; rank 0 reads all of them. The verdict, if there is one."""
        self._sign(store, turns)
        if self._ranks.is_main:
            for rank in range(self._ranks.world):
                if store.check([f"sign/{rank}"]):
                    board.note(rank, store.get(f"sign/{rank}").decode(), time.monotonic())
            verdict = board.verdict(time.monotonic())
            if verdict is None:
                return None
            store.set("verdict", verdict)
            # Time for the others to read it: the store ends with this process.
            time.sleep(3 * POLL_S)
            return verdict
        return store.get("verdict").decode() if store.check(["verdict"]) else None

    def _sign(self, store: dist.TCPStore, turns: int) -> None:
        store.set(f"sign/{self._ranks.rank}", f"{turns} {self._advanced} {socket.gethostname()}")

    def _end(self, reason: str, code: int) -> None:
        print(f"error: rank {self._ranks.rank} ends: {reason}", file=sys.stderr, flush=True)
        if self._on_end is not None:
            self._on_end(reason)
        note_exit(code)
        os._exit(code)


@dataclass
class Board:
    """What rank 0 knows of the ranks: their last signs, and when these last changed."""

    world: int
    timeouts: TimeoutConfig
    begun_s: float = field(default_factory=time.monotonic)
    signs: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    alive_s: dict[int, float] = field(default_factory=dict)
    advanced_s: dict[int, float] = field(default_factory=dict)

    def note(self, rank: int, sign: str, now_s: float) -> None:
        """A rank's sign of life as it stands in the store: turns of its watch, advances of its training, host."""
        turns, advanced, host = sign.split(" ", 2)
        before = self.signs.get(rank)
        self.signs[rank] = (int(turns), int(advanced), host)
        if before is None or before[0] != int(turns):
            self.alive_s[rank] = now_s
        if before is None or before[1] != int(advanced):
            self.advanced_s[rank] = now_s

    def verdict(self, now_s: float) -> str | None:
        """What is wrong, in words that name the ranks; None while all is well."""
        silent = [r for r in range(self.world) if now_s - self.alive_s.get(r, self.begun_s) > self.timeouts.silent_s]
        if silent:
            return f"no sign of life from {self._names(silent)} for {self.timeouts.silent_s:g} s"
        still = [r for r in self.signs if now_s - self.advanced_s[r] > self.timeouts.stalled_s]
        if len(still) < self.world:
            return None
        least = min(self.signs[rank][1] for rank in still)
        behind = [rank for rank in still if self.signs[rank][1] == least]
        who = f"{self._names(behind)} behind the others" if len(behind) < self.world else "all ranks alike"
        return f"nothing has gone on for {self.timeouts.stalled_s:g} s, {who}"

    def _names(self, ranks: Sequence[int]) -> str:
        known = {rank: f" on {self.signs[rank][2]}" for rank in ranks if rank in self.signs}
        return ", ".join(f"rank {rank}{known.get(rank, '')}" for rank in ranks)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
