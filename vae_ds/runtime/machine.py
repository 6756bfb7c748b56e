"""This machine: cores, ports, running processes, and the launchers of a process."""

import os
import socket
from pathlib import Path

import psutil

# The script or module in a launcher's command line. The shell or batch script above it may end; the run continues.
LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "ranks.py"}
# Start times of processes are computed from the boot time in whole seconds, and the clock may have been set since.
CLOCKS_AGREE_WITHIN_S = 60.0


def cores() -> int:
    """CPU cores that this process may use, from its affinity and a container's quota (control groups, version 2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def free_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs. False for a zombie, and if another process has the same id now."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def ran_at(pid: int, time_s: float) -> bool:
    """Whether process `pid` runs and already ran at `time_s` (seconds since 1970), so that its id was not reused."""
    try:
        process = psutil.Process(pid)
        return is_alive(process) and process.create_time() <= time_s + CLOCKS_AGREE_WITHIN_S
    except psutil.Error:
        return False


def birth_of(pid: int) -> str:
    """The time at which process `pid` began, in the notation of this system; empty if there is no such process."""
    try:
        process = psutil.Process(pid)
        if not is_alive(process):
            return ""
        # Ticks since the boot, exact whatever the clock does: field 22, after the name, which can contain spaces.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except psutil.Error:
        return ""
    except OSError:
        return f"{process.create_time():.0f}"


def launchers_of(process: psutil.Process) -> list[psutil.Process]:
    """The launchers among the parents of a process, nearest first, up to the first parent that is not a launcher."""
    found: list[psutil.Process] = []
    try:
        for parent in process.parents():
            # slurmstepd replaces its command line with a title.
            if parent.name() == "slurmstepd":
                return [*found, parent]
            # The interpreter and its options precede the script.
            if LAUNCHERS.isdisjoint(os.path.basename(word) for word in parent.cmdline()[:4]):
                break
            found.append(parent)
    except psutil.Error:
        pass
    return found
