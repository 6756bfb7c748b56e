"""The packages of the extras of setup.py, which an installation may lack."""

import importlib

from vae_ds.errors import ConfigError


def require(extra: str, package: str, module: str, what: str) -> None:
    """Raise ConfigError if the module of an optional package cannot be imported. `what` needs it."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f'{what} needs the package {package} ({error}); run `pip install "vae_ds[{extra}]"`'
        ) from None
