"""The training of a VAE: phases and their schedules, the loop, checkpoints, what a run reports, and its watch.

Stands on `evaluation`, `latents`, `model`, `engine`, `data`, `distributed`, `runtime` and `config`.
"""

from vae_ds.training import checkpoint, phases, resumption, tensorboard, trackers
from vae_ds.training.dry_run import describe, dry_run
from vae_ds.training.holding import check_free, hold
from vae_ds.training.monitor import Monitor
from vae_ds.training.phases import learning_rate
from vae_ds.training.preparation import write_headers
from vae_ds.training.saver import Requests, Saver
from vae_ds.training.schedules import LearningRate
from vae_ds.training.shards import Stored
from vae_ds.training.speed import Speed, matrix_rate
from vae_ds.training.stepping import Step, Steps
from vae_ds.training.trainer import Trainer, train
from vae_ds.training.watch import Watch

__all__ = [
    "LearningRate",
    "Monitor",
    "Requests",
    "Saver",
    "Speed",
    "Step",
    "Steps",
    "Stored",
    "Trainer",
    "Watch",
    "check_free",
    "checkpoint",
    "describe",
    "dry_run",
    "hold",
    "learning_rate",
    "matrix_rate",
    "phases",
    "resumption",
    "tensorboard",
    "trackers",
    "train",
    "write_headers",
]
