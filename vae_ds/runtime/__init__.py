"""A process and its run directory: records, exit codes, signals, this machine, SLURM's variables. Needs no torch.

Depends on `errors`.
"""

from vae_ds.runtime import evaluations, records, run_dirs, run_lock, slurm
from vae_ds.runtime.exits import (
    EXIT_FAULT,
    EXIT_LOST,
    EXIT_STOPPED,
    EXIT_USER,
    StopFlag,
    heeded,
    listening,
    note_exit,
    own_rank,
)
from vae_ds.runtime.extras import require
from vae_ds.runtime.late import after_import
from vae_ds.runtime.machine import cores, free_port, is_alive, launchers_of
from vae_ds.runtime.terminal import outlive_terminal

__all__ = [
    "EXIT_FAULT",
    "EXIT_LOST",
    "EXIT_STOPPED",
    "EXIT_USER",
    "StopFlag",
    "after_import",
    "cores",
    "evaluations",
    "free_port",
    "heeded",
    "is_alive",
    "launchers_of",
    "listening",
    "note_exit",
    "outlive_terminal",
    "own_rank",
    "records",
    "require",
    "run_dirs",
    "run_lock",
    "slurm",
]
