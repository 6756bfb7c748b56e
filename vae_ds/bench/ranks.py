"""Start the ranks of a training as child processes, so that each can be measured and killed separately."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vae_ds.runtime import free_port

# By default glibc keeps freed memory for reuse. The amount varies by tens of MB from step to step.
RETURN_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}


def start(
    words: Sequence[str],
    processes: int,
    log: Path,
    env: Mapping[str, str] | None = None,
    allocator: Mapping[str, str] = RETURN_FREED_MEMORY,
) -> list[subprocess.Popen[bytes]]:
    """Start `python WORDS` once per rank. Their output is added to the file `log`; `env` are further variables.

    allocator: variables for the allocator of the C library. {} leaves it as it is, which is faster.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    common = {
        **os.environ,
        **allocator,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONUNBUFFERED": "1",
        **(env or {}),
    }
    with log.open("ab") as out:
        return [
            subprocess.Popen(
                [sys.executable, *words],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
            for rank in range(processes)
        ]
