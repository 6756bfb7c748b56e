"""Log rows of a training, for tests of their readers and writers."""

from typing import Any

import torch

from vae_ds.distributed import Ranks

MAIN = Ranks(rank=0, local_rank=0, world=1, device=torch.device("cpu"))
OTHER = Ranks(rank=1, local_rank=1, world=2, device=torch.device("cpu"))


def row(step: int, **others: Any) -> dict[str, Any]:
    values = {"rec": 100.0 - step, "kl": 2.5, "kl_weighted": 0.25, "beta": 0.1, "loss": 100.25 - step, "lr": 1e-3}
    rest = {"grad_norm": 4.0, "padding": 0.05, "skipped_steps": 0}
    rest |= {"tokens_per_s": 12345.6, "mfu": 0.4321, "share_data": 0.1}
    return {"phase": "full", "step": step, "epoch": step / 100} | values | rest | others
