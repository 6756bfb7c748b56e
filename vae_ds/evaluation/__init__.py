"""The metrics of a model on a split, the verdict on the latent code, and the evaluation of a finished run.

Depends on `latents`, `sharing`, `model`, `data`, `distributed`, `runtime` and `config`.
"""

from vae_ds.evaluation import finished_run
from vae_ds.evaluation.identity import agreed_fingerprint, data_fingerprint, yardstick_values
from vae_ds.evaluation.metrics import Evaluation, Training, evaluate, log_likelihoods

__all__ = [
    "Evaluation",
    "Training",
    "agreed_fingerprint",
    "data_fingerprint",
    "evaluate",
    "finished_run",
    "log_likelihoods",
    "yardstick_values",
]
