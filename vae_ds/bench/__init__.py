"""Measurements of the package itself. Each measurement is a module and a command of `vae-ds bench`.

Imports `authoring`, `training`, `evaluation`, `model`, `engine`, `data`, `distributed`, `runtime` and `config`. The
measurements start trainings in separate processes.
"""

from vae_ds.bench import memory, profiles, soak, speed

__all__ = ["memory", "profiles", "soak", "speed"]
