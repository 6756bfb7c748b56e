"""Save checkpoints without end, each filled with its own step number; test_checkpoint.py kills it while it writes."""

import sys
from pathlib import Path

import torch

from vae_ds import checkpoint
from vae_ds.engine import PhaseState
from vae_ds.runtime import Ranks

if __name__ == "__main__":
    folder, ranks, step = Path(sys.argv[1]), Ranks(0, 0, 1, torch.device("cpu")), 0
    while True:
        step += 1
        weights = {f"w{index}": torch.full((300_000,), float(step)) for index in range(4)}
        checkpoint.save(
            folder, PhaseState(weights, {"exp_avg": {}, "exp_avg_sq": {}}, step), {"global_step": step}, ranks
        )
        checkpoint.prune(folder, 2, ranks)
