"""Processes of this machine: whether one still runs, and which launchers stand above it."""

import os

import psutil

# The script or the module in a launcher's command line; the shell or the batch script above may go without harm.
LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "ranks.py"}
# A process's beginning is known to the second of the machine's start, and the clock may have been set since.
CLOCKS_AGREE_WITHIN_S = 60.0


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
