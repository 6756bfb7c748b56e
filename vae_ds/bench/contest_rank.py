"""One rank of a measurement: python -m vae_ds.bench.contest_rank SPECS takes the steps it is told.

Reads lines `[name, steps]` from standard input and answers with a line of ticks. Ends with the input. What libraries
print goes to standard error, so that nothing but ticks is on standard output.
"""

import json
import os
import sys
from pathlib import Path

import torch

from vae_ds.bench.contest import Contestant, as_line
from vae_ds.bench.contestants import make


def main(specs: str) -> None:
    """Take steps until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    told = json.loads(Path(specs).read_text(encoding="utf-8"))
    contestants: dict[str, Contestant] = {}
    for line in sys.stdin:
        name, steps = json.loads(line)
        if name not in contestants:
            contestants[name] = make(told[name])
        answers.write(as_line([next(contestants[name]) for _ in range(steps)]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
