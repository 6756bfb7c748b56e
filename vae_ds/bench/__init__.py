"""Measurements of the package itself. Each measurement is a module and a command of `vae-ds bench`.

Imports `authoring`, `training`, `runtime` and `config`. The measurements start trainings in separate processes.
"""

from vae_ds.bench import memory, soak

__all__ = ["memory", "soak"]
