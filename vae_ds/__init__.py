"""vae_ds: a pretrained T5 becomes a text variational autoencoder by finetuning alone.

`vae_ds.train(recipe, ...)` trains, `vae_ds.TextVAE.from_pretrained(path)` uses what came of it: texts in, texts out.
`vae_ds.T5VAE` is its network.
"""

import importlib
from typing import Any

__version__ = "0.2.0"
__all__ = ["T5VAE", "TextVAE", "__version__", "train"]

# Loaded on first use: torch and transformers take seconds, and `vae-ds --help` needs neither.
_HOMES = {"T5VAE": "vae_ds.model", "TextVAE": "vae_ds.textvae", "train": "vae_ds.training"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module `vae_ds` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted(__all__)
