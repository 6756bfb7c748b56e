"""Measurements of the package itself; each bench is a module and a command of `vae-ds bench`.

Stands on `runtime` and `config`; the benches start `vae-ds train` in processes of their own.
"""

from vae_ds.bench import soak

__all__ = ["soak"]
