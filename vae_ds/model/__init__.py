"""`T5VAE`: a pretrained T5 with a Gaussian bottleneck, and the injections of the latent code into the decoder.

Depends on `config` and `errors`.
"""

from vae_ds.model import gaussian
from vae_ds.model.bases import check_base, load_tokenizer, model_dir, read_export
from vae_ds.model.cost import Footprint, footprint, operations
from vae_ds.model.injection import guard_half
from vae_ds.model.lora import held_names, is_adapter, plain_name
from vae_ds.model.shapes import base_shapes, check_base_weights, check_latent_dim, check_start, skeleton
from vae_ds.model.t5vae import T5VAE, exported_weights

__all__ = [
    "T5VAE",
    "Footprint",
    "base_shapes",
    "check_base",
    "check_base_weights",
    "check_latent_dim",
    "check_start",
    "exported_weights",
    "footprint",
    "gaussian",
    "guard_half",
    "held_names",
    "is_adapter",
    "load_tokenizer",
    "model_dir",
    "operations",
    "plain_name",
    "read_export",
    "skeleton",
]
