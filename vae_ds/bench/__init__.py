"""Measurements of the package itself. Each measurement is a module and a command of `vae-ds bench`.

Imports `runtime` and `config`. The measurements start `vae-ds train` in separate processes.
"""

from vae_ds.bench import soak

__all__ = ["soak"]
