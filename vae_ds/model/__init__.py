"""`T5VAE`: a pretrained T5 with a Gaussian bottleneck, and the injections of the latent code into the decoder.

Depends on `config` and `errors`.
"""

from vae_ds.model import auto_code, gaussian
from vae_ds.model.auto import VaeDsConfig, VaeDsModel
from vae_ds.model.bases import (
    MAX_TOKENS,
    UNKNOWN_MAX_TOKENS,
    check_base,
    load_t5,
    load_tokenizer,
    model_dir,
    read_export,
)
from vae_ds.model.cost import Footprint, footprint, footprint_of
from vae_ds.model.injection import guard_half
from vae_ds.model.lora import held_names, is_adapter, plain_name
from vae_ds.model.operations import EXTENTS, Operations, count_operations, extents
from vae_ds.model.prior import Prior, least_sentences, make_prior
from vae_ds.model.prior_files import need_prior, prior_in_use, save_prior, select_prior, stored_priors
from vae_ds.model.shapes import base_shapes, check_base_weights, check_latent_dim, check_start, skeleton
from vae_ds.model.t5vae import T5VAE, PriorTerms, Terms, exported_weights

__all__ = [
    "EXTENTS",
    "MAX_TOKENS",
    "T5VAE",
    "UNKNOWN_MAX_TOKENS",
    "Footprint",
    "Operations",
    "Prior",
    "PriorTerms",
    "Terms",
    "VaeDsConfig",
    "VaeDsModel",
    "auto_code",
    "base_shapes",
    "check_base",
    "check_base_weights",
    "check_latent_dim",
    "check_start",
    "count_operations",
    "exported_weights",
    "extents",
    "footprint",
    "footprint_of",
    "gaussian",
    "guard_half",
    "held_names",
    "is_adapter",
    "least_sentences",
    "load_t5",
    "load_tokenizer",
    "make_prior",
    "model_dir",
    "need_prior",
    "plain_name",
    "prior_in_use",
    "read_export",
    "save_prior",
    "select_prior",
    "skeleton",
    "stored_priors",
]
