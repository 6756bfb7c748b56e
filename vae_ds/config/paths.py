"""Paths in a recipe: made absolute, so that a run can be evaluated from any directory, or taken out to publish it."""

from pathlib import Path
from typing import Any, TypeVar

from vae_ds.config.settings import PretrainConfig, RunConfig

Config = TypeVar("Config", RunConfig, PretrainConfig)

# Settings that are a path whenever they are set, and settings that can also be a name (of the hub, or shipped).
PATHS = ("data.train", "data.valid", "data.test", "data.cache_dir")
PATHS_OR_NAMES = ("data.path", "model.base", "model.weights", "deepspeed", "validation.yardstick")
SHIPPED = {"tiny"}


def absolute(config: Config) -> Config:
    """The configuration with absolute paths. A name stays a name: what does not exist here is taken for one."""
    tree = config.model_dump(by_alias=True)
    for key in (*PATHS, *PATHS_OR_NAMES):
        *parents, last = key.split(".")
        section: Any = tree
        for parent in parents:
            section = section.get(parent, {})
        value = section.get(last)
        if isinstance(value, str) and value not in SHIPPED and (key in PATHS or Path(value).expanduser().exists()):
            section[last] = str(Path(value).expanduser().absolute())
    return type(config).model_validate(tree)


def portable(config: RunConfig) -> dict[str, Any]:
    """The settings as plain data, without directories of this machine: of each path, its last part is left."""
    tree: dict[str, Any] = config.model_dump(mode="json", by_alias=True)
    for key in (*PATHS, *PATHS_OR_NAMES):
        *parents, last = key.split(".")
        section: Any = tree
        for parent in parents:
            section = section.get(parent) or {}
        value = section.get(last)
        if isinstance(value, str) and (value.startswith(("/", "~", ".")) or Path(value).exists()):
            section[last] = Path(value).name
    tree["data"]["cache_dir"] = None
    return tree
