"""Fit a learned prior to the codes of a finished run, and add it to its export.

The encoder and the decoder stay as they are. The codes of training sentences are encoded once; the fit draws samples of
their posteriors. The result is measured on sentences of the valid split.

Shapes: M training sentences, N valid sentences, B codes of a step, L latent units. All quantities are in nats.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vae_ds import distributed
from vae_ds.config import ModelConfig
from vae_ds.data import Limits, Progress, TokenSet, cache_dir, corpora, logit_tokens, tokenise
from vae_ds.distributed import Ranks
from vae_ds.errors import CheckpointError, ConfigError, DataError
from vae_ds.evaluation import finished_run, information
from vae_ds.evaluation.estimates import with_errors
from vae_ds.model import (
    T5VAE,
    Prior,
    gaussian,
    least_sentences,
    make_prior,
    save_prior,
    select_prior,
    stored_priors,
)

HELD_OUT = 10_000  # the most sentences of the valid split
LARGEST_GRADIENT = 10.0  # the norm at which a step's gradient is clipped, nats per code


@dataclass(frozen=True)
class FitSettings:
    """How a prior is fitted. A full Gaussian has a closed form, so it needs neither steps nor a learning rate.

    sentences: training sentences to encode, drawn at random.
    replace: whether a prior of this kind may be replaced.
    """

    kind: str
    sentences: int = 50_000
    steps: int = 3000
    batch: int = 512
    lr: float = 2e-3
    seed: int = 0
    components: int | None = None
    couplings: int | None = None
    width: int | None = None
    replace: bool = False


def fit_prior(run: Path, how: FitSettings, recipe: str | None = None) -> dict[str, Any] | None:
    """Fit a prior to a run, write it into the export, and let the export use it. The other priors stay there.

    A collective. Returns what was measured on rank 0, None on the other ranks: the mean KL of valid sentences under
    N(0, I) (`kl_normal`), under the prior in use before (`kl_before`) and under the new one (`kl`), all with samples of
    z, and `saved`, the paired difference of the first and the last.

    Raises ConfigError for a model without a code, or if the densities of the fit are not finite; DataError for too few
    sentences; CheckpointError if there is no model, or if it has a prior of this kind and `replace` is not set.
    """
    place, config = finished_run.locate(run), finished_run.config_of(run, recipe)
    export = place.model_dir
    if how.kind in stored_priors(export) and not how.replace:
        raise CheckpointError(f"{export}: has a prior `{how.kind}` already; --replace replaces it")
    distributed.rank0_first(lambda: corpora.check(config.data))
    ranks = distributed.start()
    model, tokenizer = finished_run.load_model(run)
    if model.bottleneck is None:
        raise ConfigError(f"{run}: a plain language model (injection `none`) has no code, so it has no prior")
    corpus = distributed.rank0_first(lambda: corpora.load(config.data))
    train = finished_run.training_sentences(config, corpus, "valid", tokenizer, how.sentences)
    least, count = least_sentences(model.latent_dim), 0 if train is None else len(train.tokens)
    if train is None or count < least:
        raise DataError(
            f"{count} training sentences are too few for a prior of {model.latent_dim} latent units; use at least "
            f"{least}"
        )
    cache = cache_dir(config.data.cache_dir)
    valid = distributed.rank0_first(lambda: tokenise(corpus, "valid", tokenizer, config.data.max_tokens, cache))
    model.to(ranks.device)
    limits = Limits(config.evaluation.batch, logit_tokens(config.evaluation.tokens, model.t5.config.vocab_size))
    pad_id = tokenizer.pad_token_id
    codes = [_encode(model, part, ranks, limits, pad_id) for part in (train.tokens, valid.first(HELD_OUT))]
    settings = with_sizes(model.settings, how)

    def work() -> dict[str, Any] | None:
        if not ranks.is_main:
            return None
        prior = fit(settings, codes[0], how)
        found = {"prior": how.kind, "sentences": count} | _compare(model, prior, codes[1], how.seed)
        save_prior(export, settings, {f"prior.{name}": weight for name, weight in prior.named_parameters()}, found)
        select_prior(export, how.kind)
        return found

    return distributed.rank0_first(work)


def with_sizes(settings: ModelConfig, how: FitSettings) -> ModelConfig:
    """The settings of a model with the prior of a fit."""
    sizes = {"prior_components": how.components, "prior_couplings": how.couplings, "prior_width": how.width}
    given = {name: size for name, size in sizes.items() if size is not None}
    return settings.model_copy(update={"prior": how.kind} | given)


def fit(settings: ModelConfig, codes: tuple[torch.Tensor, torch.Tensor], how: FitSettings) -> Prior:
    """The prior of `settings`, fitted to samples of the posteriors mu_ML and logvar_ML. Needs no process group.

    It maximizes the mean of log p(z) over z ~ q(z), the mixture of these posteriors: so it minimizes KL(q(z) || p(z)).
    Raises ConfigError if a density is not finite.
    """
    mu_ML, logvar_ML = (part.float() for part in codes)
    generator = torch.Generator().manual_seed(how.seed)
    prior = make_prior(settings, generator)
    if prior is None:
        raise ConfigError("the prior `normal` has no weights to fit")
    prior.to(mu_ML.device)
    if not all(part.isfinite().all() for part in codes):
        raise ConfigError("the codes of the training sentences are not finite, so no prior can be fitted to them")
    if prior.start_at(*codes, generator):
        return prior
    adam = torch.optim.Adam(prior.parameters(), lr=how.lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, how.steps)
    with Progress(f"Fitting the prior {how.kind}", how.steps, "steps") as shown:
        for step in range(how.steps):
            row_B = torch.randint(len(mu_ML), (how.batch,), generator=generator)
            eps_BL = torch.randn(how.batch, mu_ML.shape[1], generator=generator).to(mu_ML.device)
            row_B = row_B.to(mu_ML.device)
            loss = -prior.log_prob(gaussian.sample(mu_ML[row_B], logvar_ML[row_B], eps_BL)).mean()
            if not math.isfinite(loss.item()):
                raise ConfigError(
                    f"the density of the prior {how.kind} is not finite at step {step + 1}; the export is as it was. "
                    f"Use a lower --lr than {how.lr:g}"
                )
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(prior.parameters(), LARGEST_GRADIENT)
            adam.step()
            decay.step()
            shown.add(1)
    return prior


@torch.no_grad()
def _compare(model: T5VAE, prior: Prior, codes: tuple[torch.Tensor, torch.Tensor], seed: int) -> dict[str, Any]:
    """The mean KL of held-out sentences under three priors, with the same samples of z."""
    mu_NL, logvar_NL = codes
    eps_NL = distributed.stream(seed, "prior-fit").standard_normal(tuple(mu_NL.shape))
    z_NL = gaussian.sample(mu_NL, logvar_NL, torch.as_tensor(eps_NL, device=mu_NL.device))
    log_q_N = gaussian.log_density(z_NL, mu_NL, logvar_NL)
    kl = {
        "kl_normal": log_q_N - gaussian.log_prior(z_NL),
        "kl_before": log_q_N - model.log_prior(z_NL),
        "kl": log_q_N - torch.cat([prior.log_prob(z_BL) for z_BL in z_NL.split(1024)]),
    }
    information.need_finite(kl["kl"])
    arrays: dict[str, np.ndarray] = {name: values_N.double().cpu().numpy() for name, values_N in kl.items()}
    return {"held_out": len(z_NL), **with_errors(**arrays, saved=arrays["kl_normal"] - arrays["kl"])}


def _encode(
    model: T5VAE, tokens: TokenSet, ranks: Ranks, limits: Limits, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and logvar of all sentences on every rank, float64. A collective."""
    with Progress("Encoding", -(-len(tokens) // ranks.world), "sentences") as shown, torch.no_grad():
        return information.encode_all(model, tokens, ranks, limits, pad_id, shown.add)
