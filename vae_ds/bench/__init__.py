"""Measurements of the package itself. Each measurement is a module and a command of `vae-ds bench`.

Imports `authoring`, `training`, `evaluation`, `latents`, `engine`, `data`, `model`, `distributed`, `runtime` and
`config`. The measurements start trainings in separate processes.
"""

from vae_ds.bench import gpu, memory, profiles, soak

__all__ = ["gpu", "memory", "profiles", "soak"]
