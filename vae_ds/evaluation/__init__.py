"""The metrics of a model on a split, the verdict on the latent code, and the evaluation of a finished run.

Depends on `latents`, `model`, `data`, `distributed`, `runtime` and `config`.
"""

from vae_ds.evaluation import finished_run
from vae_ds.evaluation.metrics import evaluate

__all__ = ["evaluate", "finished_run"]
