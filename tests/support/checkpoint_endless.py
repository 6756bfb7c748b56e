"""Save checkpoints in an endless loop, each filled with its step number. test_checkpoint.py kills it during a write."""

import sys
from pathlib import Path

import torch

from support.checkpoint_cases import part_of
from vae_ds.config.settings import CheckpointConfig
from vae_ds.distributed.ranks import Ranks
from vae_ds.engine.slices import PhaseState
from vae_ds.training.saver import Saver

if __name__ == "__main__":
    folder, ranks, step = Path(sys.argv[1]), Ranks(0, 0, 1, torch.device("cpu")), 0
    saver = Saver(folder, ranks, CheckpointConfig(keep=2))
    while True:
        step += 1
        weights = {f"w{index}": torch.full((300_000,), float(step)) for index in range(4)}
        state = PhaseState(weights, {"exp_avg": {}, "exp_avg_sq": {}}, step)
        saver.begin(lambda state=state: part_of(state, ranks), {"global_step": step}, must=True)
