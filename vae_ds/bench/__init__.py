"""Measurements of the package itself. Each measurement is a module and a command of `vae-ds bench`.

Imports `authoring`, `training`, `evaluation`, `textvae`, `latents`, `model`, `engine`, `data`, `distributed`, `runtime`
and `config`. The measurements of trainings start them in separate processes.
"""

from vae_ds.bench import gpu, latents, memory, profiles, soak, speed

__all__ = ["gpu", "latents", "memory", "profiles", "soak", "speed"]
