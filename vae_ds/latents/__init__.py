"""Convert texts to latent codes and back: encode, decode, reconstruct, sample, interpolate, analogy, traverse.

Depends on `model`, `data` and `distributed`.
"""

from vae_ds.latents.generate import (
    analogy,
    decode,
    encode,
    inference,
    interpolate,
    reconstruct,
    sample,
    shown,
    traversal,
    traverse,
)

__all__ = [
    "analogy",
    "decode",
    "encode",
    "inference",
    "interpolate",
    "reconstruct",
    "sample",
    "shown",
    "traversal",
    "traverse",
]
