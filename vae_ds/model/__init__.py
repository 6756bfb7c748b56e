"""`T5VAE`: a pretrained T5 with a Gaussian bottleneck, and the injections of the latent code into the decoder.

Depends on `config` and `errors`.
"""

from vae_ds.model import auto_code, gaussian
from vae_ds.model.auto import VaeDsConfig, VaeDsModel
from vae_ds.model.bases import MAX_TOKENS, check_base, load_tokenizer, model_dir, read_export
from vae_ds.model.cost import Footprint, footprint
from vae_ds.model.injection import guard_half
from vae_ds.model.lora import held_names, is_adapter, plain_name
from vae_ds.model.operations import EXTENTS, Operations, count_operations, extents
from vae_ds.model.shapes import base_shapes, check_base_weights, check_latent_dim, check_start, skeleton
from vae_ds.model.t5vae import T5VAE, exported_weights

__all__ = [
    "EXTENTS",
    "MAX_TOKENS",
    "T5VAE",
    "Footprint",
    "Operations",
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
    "gaussian",
    "guard_half",
    "held_names",
    "is_adapter",
    "load_tokenizer",
    "model_dir",
    "plain_name",
    "read_export",
    "skeleton",
]
