"""Measure contestants in turns: A, B, B, A, ..., so that a machine that becomes slower is slower for all of them.

A contestant is an iterator; each `next` takes one training step and tells what it took. A host keeps contestants: in
this process, or in child processes, one per rank. Ratios are taken within a round and then summarised by their median,
so a disturbance spoils one round and not the result.
"""

import json
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol, Self

import psutil

from vae_ds.bench import ranks
from vae_ds.errors import Failed
from vae_ds.runtime import cores

WARM_STEPS = 2
NOISY_SPREAD = 0.1  # quartile range divided by the median
NOISY_LOAD = 0.05  # of the machine's cores, used by other programs


@dataclass(frozen=True)
class Tick:
    """What one step took. operations: 0 where nobody counts them. shares: parts of the step, where they are known."""

    seconds: float
    sentences: int
    tokens: float
    operations: float = 0.0
    shares: Mapping[str, float] | None = None


Contestant = Generator[Tick, None, None]


class Host(Protocol):
    """A place in which contestants run."""

    def go(self, name: str, steps: int) -> list[Tick]: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Here:
    """Contestants in this process, for small measurements."""

    def __init__(self, contestants: Mapping[str, Contestant]) -> None:
        self._contestants = contestants

    def go(self, name: str, steps: int) -> list[Tick]:
        return [next(self._contestants[name]) for _ in range(steps)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for contestant in self._contestants.values():
            contestant.close()


class Apart:
    """Contestants in child processes, one per rank, with so many threads each. `specs`: the settings of each, by name.

    The protocol is one line each way: `[name, steps]` to each rank, the ticks of rank 0 back. Raises Failed, with the
    log file, if a rank ends by itself.
    """

    def __init__(
        self, specs: Mapping[str, Mapping[str, Any]], folder: Path, *, processes: int = 1, threads: int = 1
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "specs.json").write_text(json.dumps(specs), encoding="utf-8")
        self._log = folder / f"ranks-{processes}.log"
        words = ["-m", "vae_ds.bench.contest_rank", str(folder / "specs.json")]
        env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._ranks = ranks.start(words, processes, self._log, env, is_piped=True, keeps_freed_memory=True)

    def go(self, name: str, steps: int) -> list[Tick]:
        for rank in self._ranks:
            self._send(rank, json.dumps([name, steps]))
        told = [self._receive(rank) for rank in self._ranks]
        return [Tick(**tick) for tick in json.loads(told[0])]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self._ranks:
            try:
                rank.wait(30)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
            assert rank.stdout is not None
            rank.stdout.close()

    def _send(self, rank: subprocess.Popen[bytes], line: str) -> None:
        assert rank.stdin is not None
        try:
            rank.stdin.write(line.encode() + b"\n")
            rank.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"a process of the measurement ended; see {self._log}") from None

    def _receive(self, rank: subprocess.Popen[bytes]) -> str:
        assert rank.stdout is not None
        line = rank.stdout.readline()
        if not line:
            raise Failed(f"a process of the measurement ended; see {self._log}")
        return line.decode()


@dataclass(frozen=True)
class Round:
    """The steps of one contestant in one round, as sums. shares: means over the steps."""

    seconds: float
    sentences: int
    tokens: float
    operations: float
    shares: dict[str, float]


def alternate(
    hosts: Mapping[str, Host], steps: Mapping[str, int], rounds: int, warm: int = WARM_STEPS
) -> dict[str, list[Round]]:
    """Let the contestants take their steps in turns. `hosts` and `steps` by contestant; every second round is reversed.

    `warm` steps of each come before and do not count.
    """
    for name, host in hosts.items():
        host.go(name, warm)
    found: dict[str, list[Round]] = {name: [] for name in hosts}
    for number in range(rounds):
        for name in list(hosts) if number % 2 == 0 else reversed(list(hosts)):
            found[name].append(_sum(hosts[name].go(name, steps[name])))
    return found


def _sum(ticks: Sequence[Tick]) -> Round:
    names = ticks[0].shares or {}
    return Round(
        seconds=sum(tick.seconds for tick in ticks),
        sentences=sum(tick.sentences for tick in ticks),
        tokens=sum(tick.tokens for tick in ticks),
        operations=sum(tick.operations for tick in ticks),
        shares={name: sum((tick.shares or {}).get(name, 0.0) for tick in ticks) / len(ticks) for name in names},
    )


@dataclass(frozen=True)
class Middle:
    """The median of paired values, with their quartiles. of: the number of pairs."""

    value: float
    low: float
    high: float
    of: int

    @property
    def is_noisy(self) -> bool:
        return self.of < 3 or self.high - self.low > NOISY_SPREAD * abs(self.value)


def middle(values: Sequence[float]) -> Middle:
    """Median and quartiles of one value or more."""
    if len(values) == 1:
        return Middle(values[0], values[0], values[0], 1)
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Middle(median(values), low, high, len(values))


def ratio(above: Sequence[Round], below: Sequence[Round], of: Callable[[Round], float]) -> Middle:
    """The quotient of a value of two contestants, taken within each round."""
    return middle([of(one) / of(other) for one, other in zip(above, below, strict=True)])


class Neighbours:
    """How much of this machine's cores other programs have used since this object was made.

    Child processes count as this program once they have ended.
    """

    def __init__(self) -> None:
        self._began_s, self._busy_s, self._own_s = time.monotonic(), _busy_s(), _own_s()

    def load(self) -> float:
        """Their share of the cores that this process may use."""
        passed_s = max(time.monotonic() - self._began_s, 1e-9)
        others_s = _busy_s() - self._busy_s - (_own_s() - self._own_s)
        return max(0.0, others_s / passed_s / cores())


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)


def _own_s() -> float:
    used = psutil.Process().cpu_times()
    return float(used.user + used.system + used.children_user + used.children_system)


def as_line(ticks: Sequence[Tick]) -> str:
    """Ticks as one line of JSON, for `Apart`."""
    return json.dumps([asdict(tick) for tick in ticks])
