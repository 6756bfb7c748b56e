"""Convert texts to latent codes and back: encode, decode, reconstruct, sample, interpolate, analogy, traverse.

Depends on `model`, `data` and `distributed`.
"""

from vae_ds.latents.generate import (
    Written,
    analogy,
    decode,
    encode,
    inference,
    interpolate,
    reconstruct,
    sample,
    sample_with_ends,
    shown,
    traversal,
    traverse,
)

__all__ = [
    "Written",
    "analogy",
    "decode",
    "encode",
    "inference",
    "interpolate",
    "reconstruct",
    "sample",
    "sample_with_ends",
    "shown",
    "traversal",
    "traverse",
]
