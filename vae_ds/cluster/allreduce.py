"""A real all-reduce, by the ranks that are here already or by processes started for it: is it right, and how fast?

Nothing here waits for ever: the group is tried in a thread, and a store beside it says which ranks came and how far
each has got.
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
# Whole numbers below 2^24 add up exactly in float32, so for tens of thousands of ranks.
DISTINCT = 251
MOST_PROCESSES = 8
POLL_S = 0.2
PROBE_S, STORE_S = 1.0, 5.0
# A process from its start to its first line, where the packages lie on a busy network disk.
STARTUP_S = 60.0
# For rank 0 to notice and to tell: a launcher ends all ranks once one has ended.
LAST_WORD_S = 3.0
GRACE_S = 5.0
PATIENCE = 3
FAILED = "failed"
ADVICE = "see `network` and `host name`, and firewalls between machines; on GPUs NCCL_DEBUG=INFO tells more"


@dataclass(frozen=True)
class Outcome:
    """The check of the ranks, and the checks that all of them brought, in rank order.

    `broken`: the group is of no more use, and a thread may wait in it for ever; leave by os._exit.
    """

    check: Check
    brought: list[Check]
    broken: bool = False


def in_group() -> bool:
    """Whether this process is one of several ranks, which a launcher or srun has started."""
    env = os.environ
    return int(env.get("WORLD_SIZE", "1") if "RANK" in env else env.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def try_group(bring: Sequence[Check], timeout_s: float) -> Outcome:
    """Join the group, exchange what each rank brings, and measure; every rank of it calls this.

    Rank 0 has an outcome within `timeout_s` seconds, which names ranks that are missing, behind or have failed.
    """
    trial = _Trial(bring)
    trial.start()
    begun_s, board = time.monotonic(), None
    while trial.is_alive():
        trial.join(POLL_S)
        board = board or _open_board()
        fault = board.exchange(trial.stage) if board else None
        is_late = time.monotonic() - begun_s > timeout_s * (1 if own_rank() == "0" else PATIENCE)
        if trial.is_alive() and (fault or is_late):
            where = board.stages() if board else f"{trial.stage}; nobody answers where rank 0 should"
            return Outcome(_failed(fault or f"no end in {timeout_s:g} s. {where}"), list(bring), broken=True)
    if trial.error is None and trial.result is not None:
        return Outcome(*trial.result)
    told = f"{FAILED} {trial.stage}: {trial.error}"
    board = board or _open_board()
    if board:
        board.exchange(told)
    return Outcome(_failed(f"rank {own_rank()} {told}"), list(bring), broken=True)


def start_group(timeout_s: float) -> Check:
    """The same with processes of this machine: one a GPU, at most 8; without GPUs, 2. None outlives this call."""
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
        told = {rank: _last_line(Path(folder) / f"{rank}.err") for rank in range(processes)}
    fates = [f"rank {rank} ended with {code}: {told[rank] or 'no word'}" for rank, code in enumerate(codes) if code]
    if not answer:
        return _failed("; ".join(fates) or "rank 0 ended without a word")
    check = Check(**json.loads(answer))
    # Rank 0 can only say who is missing.
    return check if check.state == "ok" else replace(check, found="; ".join([check.found, *fates]))


class _Trial(threading.Thread):
    """One rank's part, in a thread that may never end; `stage` says where it is."""

    def __init__(self, bring: Sequence[Check]) -> None:
        super().__init__(name="all-reduce", daemon=True)
        self.stage = "starting"
        self.result: tuple[Check, list[Check]] | None = None
        self.error: str | None = None
        self._bring = list(bring)

    def run(self) -> None:
        try:
            self.result = self._measure()
        except UserError as error:
            self.error = str(error)
        except Exception as error:  # whatever it is, it is the answer
            self.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else '-'}"

    def _measure(self) -> tuple[Check, list[Check]]:
        self.stage = "joining the group"
        ranks = distributed.start()
        self.stage = "in the first all-reduce"
        pattern = (torch.arange(BYTES // 4, dtype=torch.int32, device=ranks.device) % DISTINCT).float()
        expected = pattern * ranks.world + ranks.world * (ranks.world - 1) // 2
        durations_s, right = [], True
        for turn in range(1 + REPETITIONS):
            tensor = pattern + ranks.rank
            distributed.barrier()
            durations_s.append(_time(tensor, ranks))
            right = right and torch.equal(tensor, expected)
            self.stage = f"in the timed all-reduce {turn + 1}"
        self.stage = "gathering the results"
        mine = (right, statistics.median(durations_s[1:]), this_host(), self._bring)
        every = distributed.gather_objects(mine)
        brought = [check for *_, checks in every for check in checks]
        wrong = [rank for rank, (is_right, *_) in enumerate(every) if not is_right]
        hosts = list(dict.fromkeys(host for _, _, host, _ in every))
        return _verdict(ranks, wrong, max(duration_s for _, duration_s, _, _ in every), hosts), brought


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


def _verdict(ranks: Ranks, wrong: Sequence[int], duration_s: float, hosts: Sequence[str]) -> Check:
    backend, gb_s = dist.get_backend(), BYTES / duration_s / 1e9
    # What each link carries, whatever the number of ranks: a ring sends 2(n-1)/n of the tensor.
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
    many = f"{ranks.world} rank{'s' * (ranks.world > 1)} on {some(hosts)} over {backend}"
    if wrong:
        advice = "memory, driver or network corrupt data: on GPUs try NCCL_P2P_DISABLE=1, then another machine"
        found = f"{many}: a wrong sum on rank {some(wrong)}"
        return Check(NAME, "fail", found, advice, {"ranks": facts})
    found = f"{many}, the sum is right; {BYTES >> 20} MiB in {1000 * duration_s:.3g} ms: {gb_s:.3g} GB/s"
    return Check(NAME, "ok", f"{found}, on the bus {bus_gb_s:.3g} GB/s", facts={"ranks": facts})


class _Board:
    """What each rank is at, in the store that rank 0 serves for the group; a connection of its own."""

    def __init__(self, store: dist.TCPStore, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._known: dict[int, str] = {}

    def exchange(self, stage: str) -> str | None:
        """Tell this rank's stage, and on rank 0 read the others'. The fault of a rank, if there is one."""
        try:
            self._store.set(f"doctor/{self._rank}", f"{stage}\t{this_host()}")
            if self._rank:
                return None
            keys = {rank: f"doctor/{rank}" for rank in range(self._world)}
            here = [rank for rank, key in keys.items() if self._store.check([key])]
            self._known = {rank: self._store.get(keys[rank]).decode() for rank in here}
        except (RuntimeError, dist.DistError):
            return "rank 0 is gone"
        failed = [rank for rank in sorted(self._known) if self._known[rank].startswith(FAILED)]
        if not failed:
            return None
        stage, _, host = self._known[failed[0]].rpartition("\t")
        return f"rank {failed[0]} on {host} {stage}"

    def stages(self) -> str:
        """Who never came, and who is where."""
        where: dict[str, list[str]] = {}
        for rank in range(self._world):
            stage, _, host = self._known.get(rank, "").rpartition("\t")
            where.setdefault(stage or "never came", []).append(f"rank {rank}{host and ' on '}{host}")
        return "; ".join(f"{stage}: {some(names)}" for stage, names in sorted(where.items()))


def _open_board() -> _Board | None:
    """None while rank 0 does not serve, and for a group of one."""
    env = os.environ
    # The trial sets what the launcher has not.
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(env) or env["WORLD_SIZE"] == "1":
        return None
    try:
        # The store itself would try long and loudly.
        socket.create_connection((env["MASTER_ADDR"], int(env["MASTER_PORT"])), timeout=PROBE_S).close()
        store = distributed.open_store(int(env["MASTER_PORT"]), False, timedelta(seconds=STORE_S))
    except (OSError, RuntimeError, dist.DistError):
        return None
    return _Board(store, int(env["RANK"]), int(env["WORLD_SIZE"]))


def _environment(processes: int) -> dict[str, str]:
    """That of this process, with another group's and rank 0's exit code file left out."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "VAE_DS_EXIT_FILE")}
    ours = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "LOCAL_SIZE": str(processes)}
    return kept | ours | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _start_worker(rank: int, common: dict[str, str], folder: Path, timeout_s: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vae_ds", "doctor", "--worker", "--timeout", str(timeout_s)]
    env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with (folder / f"{rank}.out").open("wb") as out, (folder / f"{rank}.err").open("wb") as err:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def _wait(workers: Sequence[subprocess.Popen[bytes]], deadline_s: float) -> None:
    """Until all have ended, or rank 0 has, or another in a bad way and rank 0 had time to tell."""
    while workers[0].poll() is None and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
        if any(worker.poll() for worker in workers):
            deadline_s = min(deadline_s, time.monotonic() + GRACE_S)


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


def _failed(found: str) -> Check:
    return Check(NAME, "fail", found, ADVICE)
