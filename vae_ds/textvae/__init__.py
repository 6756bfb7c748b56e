"""`TextVAE`: a trained model with its tokenizer, on a device. Texts to codes, to other texts and to probabilities.

Depends on `evaluation`, `latents`, `sharing`, `model`, `data`, `distributed`, `runtime`, `config` and `errors`.
"""

from vae_ds.textvae import code_files
from vae_ds.textvae.nearest import Nearest
from vae_ds.textvae.vae import Neighbour, TextVAE

__all__ = ["Nearest", "Neighbour", "TextVAE", "code_files"]
