"""Measurements of the package itself. Each measurement is a module and a command of `vae-ds bench`.

Imports `authoring`, `training`, `textvae`, `data`, `model`, `runtime` and `config`. The measurements of trainings start
them in separate processes.
"""

from vae_ds.bench import latents, memory, soak

__all__ = ["latents", "memory", "soak"]
