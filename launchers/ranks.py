"""Run a vae-ds command on this machine's devices through the deepspeed launcher: `ranks.py -n N train RECIPE ...`.

Adds what the launcher lacks: a free port, threads per rank, its own devices under CUDA_VISIBLE_DEVICES, and signals.
SIGINT, SIGTERM and SIGHUP go to the ranks alone and all at once, so that they save at the same step and their exit
code comes back; a second SIGINT, or the end of the grace period, kills whatever is left. No process outlives this one.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
GRACE_S = 120.0
POLL_S = 0.2


def cores() -> int:
    """CPU cores this process may use: its affinity, and a container's quota (control groups, version 2)."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def free_port() -> int:
    """A TCP port nobody listens on now; the launcher's fixed default collides with every other job's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(processes: int, gpus: int) -> dict[str, str]:
    """The environment of the launcher and its ranks."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # This checkout's package, installed or not, from any directory.
    env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [env.get("PYTHONPATH")])])
    # The launcher sets no thread count: each rank would take all cores.
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    if not gpus:
        env["DS_ACCELERATOR"] = "cpu"
        # Glibc gives each large tensor back to the system and faults its pages in anew: an eighth of a CPU step's time.
        env.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
        env.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
        # DeepSpeed counts NUMA nodes as CPU devices unless told how many there are.
        env["LOCAL_SIZE"] = str(processes)
    return env


def own_exit_code(code: int, told: Path) -> int:
    """The job's exit code, given the launcher's: DeepSpeed's is 0 after some failures, so rank 0 tells its own.

    `told` is the file that rank 0 writes at its end; where there is none, it was killed.
    """
    try:
        own = int(told.read_text(encoding="ascii"))
    except (OSError, ValueError):
        own = 0
        if not code:
            print("error: rank 0 ended without a word", file=sys.stderr, flush=True)
            return 1
    return own or (code if code >= 0 else 128 - code)


def command_line(processes: int, arguments: list[str]) -> list[str]:
    """The deepspeed command that runs `vae-ds ARGUMENTS` on `processes` ranks."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_gpus", str(processes)]
    launcher += ["--master_port", str(free_port())]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not chosen:
        return [*launcher, "--module", "vae_ds", *arguments]
    # The launcher would number the devices from 0 again; UUIDs and MIG slices it cannot read at all.
    python = ["env", f"CUDA_VISIBLE_DEVICES={chosen}", sys.executable, "-u", "-m", "vae_ds"]
    return [*launcher, "--no_python", "--no_local_rank", *python, *arguments]


class Job:
    """A launcher and its ranks, in a session of their own: a terminal's Ctrl-C reaches them through us alone."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.launcher = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        self.interrupts = 0
        self.deadline: float | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the ranks to stop; they save and exit with a code of their own."""
        self.interrupts += number == signal.SIGINT
        if self.deadline is None:
            self.deadline = time.monotonic() + GRACE_S
            print("\nstopping: the ranks save and exit; Ctrl-C again kills them", file=sys.stderr, flush=True)
            self.ask_to_stop()

    def members(self) -> list[psutil.Process]:
        """The living processes of the session; a zombie is dead."""
        living = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.launcher.pid and process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
            except (psutil.Error, OSError):
                continue
        return living

    def ask_to_stop(self) -> None:
        """SIGTERM to every rank at once; while there are none yet, to the launcher itself."""
        members = self.members()
        # A rank's own children (workers that read the corpus) have its variables too; they are the rank's to end.
        ranks = [process for process in members if _has_rank(process) and not _has_rank(_parent(process))]
        for process in ranks or members:
            _send(process, signal.SIGTERM)

    def wait(self) -> int:
        """Wait for all of it to end. Returns the launcher's exit code, -N where signal N ended it."""
        while self.launcher.poll() is None and not self._expired():
            time.sleep(POLL_S)
        # The launcher can end before its ranks do; they get the same chance to save.
        if self.members() and self.deadline is None:
            self.deadline = time.monotonic() + GRACE_S
            self.ask_to_stop()
        while self.members() and not self._expired():
            time.sleep(POLL_S)
        for process in self.members():
            _send(process, signal.SIGKILL)
        return self.launcher.wait()

    def _expired(self) -> bool:
        return self.interrupts > 1 or (self.deadline is not None and time.monotonic() > self.deadline)


def _has_rank(process: psutil.Process | None) -> bool:
    try:
        return process is not None and "RANK" in process.environ()
    except psutil.Error:
        return False


def _parent(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.Error:
        return None


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a vae-ds command on this machine's devices.", allow_abbrev=False)
    parser.add_argument("-n", "--processes", type=int, help="default: one a GPU; without GPUs, 2")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND", help="as after `vae-ds`")
    given = parser.parse_args()
    if not given.arguments:
        parser.error("name a vae-ds command, for example: train demo --run-dir runs/demo")
    import torch

    gpus = torch.cuda.device_count()
    processes = given.processes or gpus or 2
    with tempfile.TemporaryDirectory(prefix="vae_ds_ranks_") as folder:
        told = Path(folder) / "exit_code"
        env = environment(processes, gpus) | {"VAE_DS_EXIT_FILE": str(told)}
        job = Job(command_line(processes, given.arguments), env)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, job.on_signal)
        return own_exit_code(job.wait(), told)


if __name__ == "__main__":
    sys.exit(main())
