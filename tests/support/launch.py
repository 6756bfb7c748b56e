"""Start real processes that communicate over gloo, as on a cluster, with a limit on every wait.

The ranks are forked from a process that has imported the packages (the method `forkserver` of multiprocessing): to
import them takes six seconds of processor time, which each rank would need.
"""

import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from support import ROOT
from support.processes import no_rank
from support.python import run_python
from vae_ds.runtime.machine import free_port

WORKER = Path(__file__).with_name("train_jobs.py")
# When a rank fails, the others block in a collective. They get this time to report it.
GRACE_S = 5.0
PRELOAD = ["vae_ds.cli.entry", "vae_ds.evaluation", "vae_ds.latents", "vae_ds.training", "deepspeed"]
_FORKED, _NEW = multiprocessing.get_context("forkserver"), multiprocessing.get_context("spawn")
_FORKED.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class Finished:
    """The results of the processes, in rank order. A negative code is the number of a signal."""

    codes: list[int]
    outputs: list[str]
    timed_out: bool
    duration_s: float

    @property
    def output(self) -> str:
        """The output of all ranks."""
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(self.outputs))

    def report(self) -> str:
        """The message of a failed assertion."""
        end = "timed out" if self.timed_out else "ended"
        return f"{end} after {self.duration_s:.0f} s with codes {self.codes}\n{self.output}"


def launch(
    arguments: Sequence[str | Path],
    *,
    processes: int = 2,
    timeout_s: float = 240.0,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    check: bool = True,
) -> Finished:
    """Run `python ARGUMENTS` (a script, `-m` and a module, or `-c` and code) as `processes` ranks of one group.

    Each rank has its own session, so that its child processes end with it. Environment and caches are private to this
    call. With `env`, each rank is a new process that has the variables from its first moment: the C library and some
    packages read theirs only then. With `check`, raises AssertionError with all output unless every code is 0.
    """
    with tempfile.TemporaryDirectory(prefix="vae_ds_launch_") as folder:
        private = Path(folder)
        common = _environment(private, processes) | dict(env or {})
        started = time.monotonic()
        context = _FORKED if env is None else _NEW
        ranks = [_start(context, arguments, rank, private, common, cwd) for rank in range(processes)]
        try:
            timed_out = _wait(ranks, started + timeout_s)
        finally:
            _end(ranks)
        outputs = [(private / f"rank{rank}.log").read_text(errors="replace") for rank in range(processes)]
        finished = Finished([rank.exitcode for rank in ranks], outputs, timed_out, time.monotonic() - started)
        _remove_shared_memory(common["MASTER_PORT"])
    if check and any(finished.codes):
        raise AssertionError(finished.report())
    return finished


def job(
    recipe: Path, run_dir: Path, *overrides: str, stop_at: int | None = None, kill_at: int | None = None
) -> dict[str, Any]:
    """A training for `run_jobs`. A signal stops it after the step `stop_at`, or kills a rank after `kill_at`."""
    signals = {"stop_at": stop_at, "kill_at": kill_at}
    return {"recipe": str(recipe), "run_dir": str(run_dir), "overrides": list(overrides), **signals}


def run_jobs(
    world: int, jobs: list[dict[str, Any]], folder: Path, before: str = "pass", timeout_s: float = 400
) -> None:
    """Run jobs on `world` real processes, after the Python code `before`. If a job fails, raises with all output.

    If the last job has `kill_at`, a rank must be killed: nothing runs after that.
    """
    listing = folder / f"jobs-{world}.json"
    listing.write_text(json.dumps(jobs), encoding="utf-8")
    run = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    is_killed = jobs[-1]["kill_at"] is not None
    arguments = ["-c", f"{before}\n{run}", WORKER, listing]
    finished = launch(arguments, processes=world, timeout_s=timeout_s, check=not is_killed)
    if is_killed:
        assert finished.codes[-1] == -signal.SIGKILL, finished.report()
        assert not finished.timed_out, finished.report()
    assert ("ENDED" in finished.output) != is_killed


def clean_environment(private: Path) -> dict[str, str]:
    """The environment of this process, without variables of ranks and schedulers, with caches below `private`."""
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
    context: ForkServerContext | SpawnContext,
    arguments: Sequence[str | Path],
    rank: int,
    private: Path,
    common: Mapping[str, str],
    cwd: Path,
) -> BaseProcess:
    environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    words = [str(word) for word in arguments]
    process = context.Process(target=run_python, args=(words, private / f"rank{rank}.log", environment, cwd))
    with patch.dict(os.environ, environment, clear=True) if context is _NEW else nullcontext():
        process.start()
    return process


def _wait(ranks: Sequence[BaseProcess], deadline: float) -> bool:
    """Wait until all have ended, or one has failed and GRACE_S has passed. Returns whether the deadline came first."""
    failed = False
    while any(rank.exitcode is None for rank in ranks):
        now = time.monotonic()
        if now > deadline:
            return not failed
        if not failed and any(rank.exitcode not in (None, 0) for rank in ranks):
            failed, deadline = True, min(deadline, now + GRACE_S)
        time.sleep(0.05)
    return False


def _end(ranks: Sequence[BaseProcess]) -> None:
    """Kill the session of each rank, with processes that an ended rank has left."""
    for rank in ranks:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.kill()
    for rank in ranks:
        rank.join()


def _remove_shared_memory(port: str) -> None:
    """Remove DeepSpeed's shared-memory buffers, 69 MB each, which outlive their processes."""
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        with suppress(OSError):
            path.unlink()
