"""Convert texts to latent codes and back: encode, decode, reconstruct, sample, interpolate, analogy, traverse.

Depends on `model`, `data` and `distributed`.
"""

from vae_ds.latents.decoding import Decoding
from vae_ds.latents.generate import (
    Written,
    analogy,
    around,
    between,
    check_texts,
    decode,
    decode_with_ends,
    encode,
    inference,
    interpolate,
    posterior,
    prior_codes,
    reconstruct,
    sample,
    sample_with_ends,
    shown,
    traversal,
    traverse,
)

__all__ = [
    "Decoding",
    "Written",
    "analogy",
    "around",
    "between",
    "check_texts",
    "decode",
    "decode_with_ends",
    "encode",
    "inference",
    "interpolate",
    "posterior",
    "prior_codes",
    "reconstruct",
    "sample",
    "sample_with_ends",
    "shown",
    "traversal",
    "traverse",
]
