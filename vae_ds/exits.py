"""Exit codes, and who tells them."""

import os
from pathlib import Path

# EX_TEMPFAIL for what was stopped on request and EX_UNAVAILABLE where another rank, or its machine, is gone or hangs:
# the same command resumes.
EXIT_FAULT, EXIT_USER, EXIT_LOST, EXIT_STOPPED = 1, 2, 69, 75


def own_rank() -> str:
    """This process's rank, before it has joined any group: from a launcher's variable, or from srun's."""
    in_step = "SLURM_STEP_NUM_TASKS" in os.environ
    return os.environ.get("RANK") or (os.environ.get("SLURM_PROCID", "0") if in_step else "0")


def note_exit(code: int) -> None:
    """Leave the exit code where our launcher asks for it: DeepSpeed's can exit 0 after a failure.

    One rank tells, rank 0 unless the launcher of another node asks for its own first rank's.
    """
    place = os.environ.get("VAE_DS_EXIT_FILE")
    if place and own_rank() == os.environ.get("VAE_DS_EXIT_RANK", "0"):
        Path(place).write_text(str(code), encoding="ascii")
