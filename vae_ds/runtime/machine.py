"""This machine: its cores and ports, which processes still run, and which launchers stand above one."""

import os
import socket
from pathlib import Path

import psutil

# The script or the module in a launcher's command line; the shell or the batch script above may go without harm.
LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "ranks.py"}
# A process's beginning is known to the second of the machine's start, and the clock may have been set since.
CLOCKS_AGREE_WITHIN_S = 60.0


def cores() -> int:
    """CPU cores this process may use: its affinity, and a container's quota (control groups, version 2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def free_port() -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not, and neither does another process that has its number now."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def ran_at(pid: int, time_s: float) -> bool:
    """Whether process `pid` runs and did so at `time_s`, in seconds since 1970: else the number is another's now."""
    try:
        process = psutil.Process(pid)
        return is_alive(process) and process.create_time() <= time_s + CLOCKS_AGREE_WITHIN_S
    except psutil.Error:
        return False


def launchers_of(process: psutil.Process) -> list[psutil.Process]:
    """The launchers above a process, nearest first, up to the first parent that is none."""
    found: list[psutil.Process] = []
    try:
        for parent in process.parents():
            # SLURM's writes its title over its command line.
            if parent.name() == "slurmstepd":
                return [*found, parent]
            # An interpreter and its options stand in front of it.
            if LAUNCHERS.isdisjoint(os.path.basename(word) for word in parent.cmdline()[:4]):
                break
            found.append(parent)
    except psutil.Error:
        pass
    return found
