"""vae_ds: a pretrained T5 becomes a text variational autoencoder by finetuning alone.

`vae_ds.train(recipe, ...)` trains, `vae_ds.TextVAE.from_pretrained(path)` uses what came of it: texts in, texts out.
`vae_ds.T5VAE` is its network.
"""

import importlib
import sys
from typing import Any

from vae_ds.runtime import after_import

__version__ = "0.2.0"
__all__ = ["T5VAE", "TextVAE", "__version__", "train"]

# Loaded on first use: torch and transformers take seconds, and `vae-ds --help` needs neither.
_HOMES = {"T5VAE": "vae_ds.model", "TextVAE": "vae_ds.textvae", "train": "vae_ds.training"}


def _register() -> None:
    """Make `transformers.AutoModel` know exports. The wing `model` does so when it is imported."""
    if "vae_ds.model" not in sys.modules:
        importlib.import_module("vae_ds.model")


after_import("transformers.models.auto.modeling_auto", _register)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module `vae_ds` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted(__all__)
