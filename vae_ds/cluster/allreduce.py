"""Run an all-reduce between the existing ranks, or between processes started for it; check the sum, measure the speed.

All waiting is bounded. The collectives run in a thread, and a separate connection to the store shows which ranks have
joined and the stage that each rank has reached.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from vae_ds import distributed
from vae_ds.cluster.checks import Check, some, this_host
from vae_ds.distributed import Ranks
from vae_ds.errors import UserError
from vae_ds.runtime import free_port, own_rank

NAME = "ranks"
BYTES = 64 * 2**20
REPETITIONS = 5
# Sums of integers below 2^24 are exact in float32. With values below 251 this holds for tens of thousands of ranks.
DISTINCT = 251
MOST_PROCESSES = 8
POLL_S = 0.2
PROBE_S, STORE_S = 1.0, 5.0
# Startup of a process until it runs its first line, with the packages on a busy network disk.
STARTUP_S = 60.0
# Time for rank 0 to detect and print a failure: a launcher ends all ranks as soon as one ends.
REPORT_S = 3.0
GRACE_S = 5.0
PATIENCE = 3  # the other ranks wait this many times longer than rank 0, which prints
FAILED = "failed"
ADVICE = "see `network` and `host name`, and check firewalls between machines; on GPUs set NCCL_DEBUG=INFO for details"


@dataclass(frozen=True)
class Outcome:
    """The check of the group, and the checks of all ranks, in rank order.

    `broken`: the group is unusable, and a thread may block in it forever. End the process with os._exit.
    """

    check: Check
    gathered: list[Check]
    broken: bool = False


def in_group() -> bool:
    """Whether this process is one of several ranks that a launcher or srun has started."""
    env = os.environ
    return int(env.get("WORLD_SIZE", "1") if "RANK" in env else env.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def try_group(own_checks: Sequence[Check], timeout_s: float) -> Outcome:
    """Join the group, gather the checks of all ranks, and measure. Every rank of the group must call this.

    Rank 0 returns within `timeout_s` seconds. Its outcome names the ranks that are missing, behind or have failed.
    """
    trial = _Trial(own_checks)
    trial.start()
    begun_s, stages = time.monotonic(), None
    while trial.is_alive():
        trial.join(POLL_S)
        stages = stages or _open_stages()
        fault = stages.exchange(trial.stage) if stages else None
        is_late = time.monotonic() - begun_s > timeout_s * (1 if own_rank() == "0" else PATIENCE)
        if trial.is_alive() and (fault or is_late):
            reached = stages.describe() if stages else f"{trial.stage}; no answer at the address of rank 0"
            found = fault or f"not finished after {timeout_s:g} s. {reached}"
            return Outcome(_failed(found), list(own_checks), broken=True)
    if trial.error is None and trial.result is not None:
        return Outcome(*trial.result)
    failure = f"{FAILED} {trial.stage}: {trial.error}"
    stages = stages or _open_stages()
    if stages:
        stages.exchange(failure)
    return Outcome(_failed(f"rank {own_rank()} {failure}"), list(own_checks), broken=True)


def start_group(timeout_s: float) -> Check:
    """Do the same with new processes on this machine: one per GPU, at most 8; without GPUs, 2.

    All of them have ended when this returns.
    """
    processes = min(MOST_PROCESSES, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    with tempfile.TemporaryDirectory(prefix="vae_ds_doctor_") as folder:
        common = _environment(processes)
        workers = [_start_worker(rank, common, Path(folder), timeout_s) for rank in range(processes)]
        try:
            _wait(workers, time.monotonic() + timeout_s + STARTUP_S)
        finally:
            codes = [worker.poll() for worker in workers]
            for worker in workers:
                worker.kill()
                worker.wait()
        answer = (Path(folder) / "0.out").read_text(encoding="utf-8")
        errors = {rank: _last_line(Path(folder) / f"{rank}.err") for rank in range(processes)}
    exits = [
        f"rank {rank} exited with code {code}: {errors[rank] or 'no output'}" for rank, code in enumerate(codes) if code
    ]
    if not answer:
        return _failed("; ".join(exits) or "rank 0 exited without output")
    check = Check(**json.loads(answer))
    # Rank 0 knows only which ranks are missing. The exit codes give the reason.
    return check if check.state == "ok" else replace(check, found="; ".join([check.found, *exits]))


class _Trial(threading.Thread):
    """The collectives of one rank, in a thread that may block forever. `stage` is what it is doing."""

    def __init__(self, own_checks: Sequence[Check]) -> None:
        super().__init__(name="all-reduce", daemon=True)
        self.stage = "starting"
        self.result: tuple[Check, list[Check]] | None = None
        self.error: str | None = None
        self._own_checks = list(own_checks)

    def run(self) -> None:
        try:
            self.result = self._measure()
        except UserError as error:
            self.error = str(error)
        except Exception as error:  # any error is a result of this check
            self.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else '-'}"

    def _measure(self) -> tuple[Check, list[Check]]:
        self.stage = "joining the group"
        ranks = distributed.start()
        self.stage = "in the first all-reduce"
        pattern = (torch.arange(BYTES // 4, dtype=torch.int32, device=ranks.device) % DISTINCT).float()
        expected = pattern * ranks.world + ranks.world * (ranks.world - 1) // 2
        durations_s, is_correct = [], True
        for turn in range(1 + REPETITIONS):
            tensor = pattern + ranks.rank
            distributed.barrier()
            durations_s.append(_time(tensor, ranks))
            is_correct = is_correct and torch.equal(tensor, expected)
            self.stage = f"in the timed all-reduce {turn + 1}"
        self.stage = "gathering the results"
        own = (is_correct, statistics.median(durations_s[1:]), this_host(), self._own_checks)
        every = distributed.gather_objects(own)
        gathered = [check for *_, checks in every for check in checks]
        wrong = [rank for rank, (was_correct, *_) in enumerate(every) if not was_correct]
        hosts = list(dict.fromkeys(host for _, _, host, _ in every))
        return _result(ranks, wrong, max(duration_s for _, duration_s, _, _ in every), hosts), gathered


def _time(tensor: torch.Tensor, ranks: Ranks) -> float:
    """Seconds of one all-reduce of `tensor`, in place."""
    is_cuda = ranks.device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    begun_s = time.perf_counter()
    dist.all_reduce(tensor)
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun_s


def _result(ranks: Ranks, wrong: Sequence[int], duration_s: float, hosts: Sequence[str]) -> Check:
    backend, gb_s = dist.get_backend(), BYTES / duration_s / 1e9
    # The rate on each link, comparable between numbers of ranks: a ring algorithm sends 2(n-1)/n of the tensor.
    bus_gb_s = gb_s * 2 * (ranks.world - 1) / ranks.world
    facts = {
        "world": ranks.world,
        "backend": backend,
        "hosts": list(hosts),
        "bytes": BYTES,
        "duration_s": duration_s,
        "algorithm_gb_s": gb_s,
        "bus_gb_s": bus_gb_s,
        "sum_is_right": not wrong,
    }
    group = f"{ranks.world} rank{'s' * (ranks.world > 1)} on {some(hosts)} over {backend}"
    if wrong:
        advice = "memory, driver or network corrupts data: on GPUs try NCCL_P2P_DISABLE=1, then another machine"
        found = f"{group}: wrong sum on rank {some(wrong)}"
        return Check(NAME, "fail", found, advice, {"ranks": facts})
    found = f"{group}, the sum is correct; {BYTES >> 20} MiB in {1000 * duration_s:.3g} ms: {gb_s:.3g} GB/s"
    return Check(NAME, "ok", f"{found}, on the bus {bus_gb_s:.3g} GB/s", facts={"ranks": facts})


class _Stages:
    """The stage of each rank, kept in the store that rank 0 serves for the group, through a separate connection."""

    def __init__(self, store: dist.TCPStore, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._known: dict[int, str] = {}

    def exchange(self, stage: str) -> str | None:
        """Write the stage of this rank. Rank 0 also reads the stages of all. Returns the failure of a rank, or None."""
        try:
            self._store.set(f"doctor/{self._rank}", f"{stage}\t{this_host()}")
            if self._rank:
                return None
            keys = {rank: f"doctor/{rank}" for rank in range(self._world)}
            joined = [rank for rank, key in keys.items() if self._store.check([key])]
            self._known = {rank: self._store.get(keys[rank]).decode() for rank in joined}
        except (RuntimeError, dist.DistError):
            return "the connection to rank 0 is lost"
        failed = [rank for rank in sorted(self._known) if self._known[rank].startswith(FAILED)]
        if not failed:
            return None
        stage, _, host = self._known[failed[0]].rpartition("\t")
        return f"rank {failed[0]} on {host} {stage}"

    def describe(self) -> str:
        """The ranks at each stage, and the ranks that have not joined."""
        ranks_at: dict[str, list[str]] = {}
        for rank in range(self._world):
            stage, _, host = self._known.get(rank, "").rpartition("\t")
            ranks_at.setdefault(stage or "not joined", []).append(f"rank {rank}{host and ' on '}{host}")
        return "; ".join(f"{stage}: {some(names)}" for stage, names in sorted(ranks_at.items()))


def _open_stages() -> _Stages | None:
    """Connect to the store. None while rank 0 does not serve it yet, and for a group of one rank."""
    env = os.environ
    # The trial sets the variables that the launcher has not set.
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(env) or env["WORLD_SIZE"] == "1":
        return None
    try:
        # Probe first: the store client retries for a long time and logs each attempt.
        socket.create_connection((env["MASTER_ADDR"], int(env["MASTER_PORT"])), timeout=PROBE_S).close()
        store = distributed.open_store(int(env["MASTER_PORT"]), False, timedelta(seconds=STORE_S))
    except (OSError, RuntimeError, dist.DistError):
        return None
    return _Stages(store, int(env["RANK"]), int(env["WORLD_SIZE"]))


def _environment(processes: int) -> dict[str, str]:
    """The environment of this process, without the rank in an existing group and without the file for the exit code."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "VAE_DS_EXIT_FILE")}
    ours = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "LOCAL_SIZE": str(processes)}
    return kept | ours | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _start_worker(rank: int, common: dict[str, str], folder: Path, timeout_s: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vae_ds", "doctor", "--worker", "--timeout", str(timeout_s)]
    env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with (folder / f"{rank}.out").open("wb") as out, (folder / f"{rank}.err").open("wb") as err:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def _wait(workers: Sequence[subprocess.Popen[bytes]], deadline_s: float) -> None:
    """Wait until rank 0 has ended or the deadline has passed. If a rank fails, rank 0 has GRACE_S to report it."""
    while workers[0].poll() is None and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
        if any(worker.poll() for worker in workers):
            deadline_s = min(deadline_s, time.monotonic() + GRACE_S)


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


def _failed(found: str) -> Check:
    return Check(NAME, "fail", found, ADVICE)
