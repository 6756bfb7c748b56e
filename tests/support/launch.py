"""Start real processes that talk over gloo, as a cluster would, and never wait for them longer than stated."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import ROOT
from support.processes import no_rank
from vae_ds.runtime.machine import free_port

WORKER = Path(__file__).with_name("train_jobs.py")
# A rank that fails leaves the others in a collective; they get this long to say something.
GRACE_S = 5.0


@dataclass(frozen=True)
class Finished:
    """How the processes ended, in rank order; a negative code is the signal's number."""

    codes: list[int]
    outputs: list[str]
    timed_out: bool
    duration_s: float

    @property
    def output(self) -> str:
        """Everything that every rank wrote."""
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(self.outputs))

    def report(self) -> str:
        """One text for a failed assertion."""
        fate = "timed out" if self.timed_out else "ended"
        return f"{fate} after {self.duration_s:.0f} s with codes {self.codes}\n{self.output}"


def launch(
    arguments: Sequence[str | Path],
    *,
    processes: int = 2,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    check: bool = True,
) -> Finished:
    """Run `python ARGUMENTS` (a script, or `-m` and a module, with their own) as `processes` ranks of one group.

    Each rank has a session of its own, so that whatever it starts ends with it; environment and caches are private to
    this call. With `check`, an AssertionError carries all output unless every code is 0.
    """
    with tempfile.TemporaryDirectory(prefix="vae_ds_launch_") as folder:
        private = Path(folder)
        common = _environment(private, processes) | dict(env or {})
        started = time.monotonic()
        ranks = [_start(arguments, rank, private, common, cwd) for rank in range(processes)]
        try:
            timed_out = _wait(ranks, started + timeout_s)
        finally:
            _end(ranks)
        outputs = [(private / f"rank{rank}.log").read_text(errors="replace") for rank in range(processes)]
        finished = Finished([rank.returncode for rank in ranks], outputs, timed_out, time.monotonic() - started)
        _remove_shared_memory(common["MASTER_PORT"])
    if check and any(finished.codes):
        raise AssertionError(finished.report())
    return finished


def job(recipe: Path, run_dir: Path, *overrides: str, stop_at: int | None = None) -> dict[str, Any]:
    """A training for `run_jobs`; `stop_at` is the step after which a signal stops it."""
    return {"recipe": str(recipe), "run_dir": str(run_dir), "overrides": list(overrides), "stop_at": stop_at}


def run_jobs(
    world: int, jobs: list[dict[str, Any]], folder: Path, before: str = "pass", timeout_s: float = 400
) -> None:
    """Run jobs on `world` real processes, after a line of Python; `launch` raises with their output if one fails."""
    listing = folder / f"jobs-{world}.json"
    listing.write_text(json.dumps(jobs), encoding="utf-8")
    run = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    finished = launch(["-c", f"{before}\n{run}", WORKER, listing], processes=world, timeout_s=timeout_s)
    assert "ENDED" in finished.output


def clean_environment(private: Path) -> dict[str, str]:
    """This process's environment without any rank of ours or a scheduler's, with caches below `private`."""
    kept = no_rank()
    kept.update(
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        PYTHONUNBUFFERED="1",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        TORCH_EXTENSIONS_DIR=str(private / "torch_extensions"),
        TMPDIR=str(private),
    )
    return kept


def _environment(private: Path, processes: int) -> dict[str, str]:
    return clean_environment(private) | {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def _start(
    arguments: Sequence[str | Path], rank: int, private: Path, common: Mapping[str, str], cwd: Path
) -> subprocess.Popen[bytes]:
    with (private / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(ranks: Sequence[subprocess.Popen[bytes]], deadline: float) -> bool:
    """Until all ended, or one failed and the others had their grace. Whether the deadline came first."""
    failed = False
    while any(rank.poll() is None for rank in ranks):
        now = time.monotonic()
        if now > deadline:
            return not failed
        if not failed and any(rank.poll() not in (None, 0) for rank in ranks):
            failed, deadline = True, min(deadline, now + GRACE_S)
        time.sleep(0.05)
    return False


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill each rank's whole session, also what a rank that is gone has left behind."""
    for rank in ranks:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def _remove_shared_memory(port: str) -> None:
    """DeepSpeed's shared-memory buffers outlive their processes; 69 MB each where they are made at all."""
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        with suppress(OSError):
            path.unlink()
