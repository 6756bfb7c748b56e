"""The metrics of a model on a split, the verdict on the latent code, and the evaluation of a finished run.

Depends on `latents`, `sharing`, `model`, `data`, `distributed`, `runtime` and `config`.
"""

from vae_ds.evaluation import finished_run
from vae_ds.evaluation.identity import agreed_fingerprint, data_fingerprint, yardstick_values
from vae_ds.evaluation.mauve import pooled_base
from vae_ds.evaluation.metrics import Evaluation, Training, evaluate, log_likelihoods
from vae_ds.evaluation.prior_fit import FitSettings, fit_prior
from vae_ds.evaluation.text_metrics import bleu, diversity

__all__ = [
    "Evaluation",
    "FitSettings",
    "Training",
    "agreed_fingerprint",
    "bleu",
    "data_fingerprint",
    "diversity",
    "evaluate",
    "finished_run",
    "fit_prior",
    "log_likelihoods",
    "pooled_base",
    "yardstick_values",
]
