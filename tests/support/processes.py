"""Jobs as a user starts them: start, find by a mark in their environment, wait, signal, and clean up."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from vae_ds import distributed

# Time limit for a launcher and its ranks to reach the first step, on a machine with other load.
STARTUP_S = 300.0


def no_rank() -> dict[str, str]:
    """The environment of this process, without variables of ranks and of schedulers."""
    ours = (*distributed.VARIABLES, "LOCAL_SIZE", "RUNS")
    return {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("SLURM_", "SBATCH_"))}


def new_job() -> dict[str, str]:
    """The environment of a job, with a mark by which `processes_of` finds its processes."""
    return {**no_rank(), "VIRTUAL_ENV": sys.prefix, "VAE_DS_TEST_JOB": uuid.uuid4().hex}


def processes_of(job: dict[str, str]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and (
                process.environ().get("VAE_DS_TEST_JOB") == job["VAE_DS_TEST_JOB"]
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_all(job: dict[str, str]) -> None:
    for process in processes_of(job):
        process.kill()


def start(command: list[str], job: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    """Start a command as a terminal does: in its own process group, which does not ignore Ctrl-C."""
    with output.open("wb") as file:
        return subprocess.Popen(
            command,
            env=job,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], output: Path, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():
        assert process.poll() is None, f"ended too early:\n{output.read_text(encoding='utf-8')}"
        assert time.monotonic() < deadline, f"not ready in {limit_s} s:\n{output.read_text(encoding='utf-8')}"
        time.sleep(0.1)


def rows(run: Path) -> list[dict[str, float]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def curve(run: Path) -> list[dict[str, float]]:
    """The logged rows without what is measured by the clock or the machine, for comparisons between runs."""
    measured = ("tokens_per_s", "positions_per_s", "tflops", "mfu", "peak_memory_gb", "share_")
    return [{key: value for key, value in row.items() if not key.startswith(measured)} for row in rows(run)]


def state_of(run: Path) -> str:
    return str(json.loads((run / "status.json").read_text(encoding="utf-8"))["state"])


@contextmanager
def small_disk_at(place: Path, size: str) -> Iterator[Path]:
    """A file system of this size, in the notation of mount. Skips the test if mounting is not permitted."""
    place.mkdir()
    can = shutil.which("mount") and os.geteuid() == 0
    if not can or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
