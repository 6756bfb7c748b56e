"""A model without weights: its parameters' names and shapes, and checks of weight files against them.

Everything here reads configurations and the headers of weight files, never the weights themselves.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vae_ds.config import ModelConfig
from vae_ds.errors import CheckpointError, ConfigError
from vae_ds.model.bases import FAMILIES, base_config, model_dir, read_export, tie
from vae_ds.model.prior_files import KEYS, NORMAL, read_settings, stored_priors
from vae_ds.model.t5vae import T5VAE

Shapes = dict[str, tuple[int, ...]]
"""The shape of each parameter by its name."""

INDEX = "model.safetensors.index.json"


def skeleton(settings: ModelConfig) -> T5VAE:
    """The model of a recipe whose T5 is on torch's `meta` device: names and shapes, but no pretrained weights.

    Raises ConfigError if the base's configuration cannot be used.
    """
    config, raw, _ = base_config(settings.base)
    with torch.device("meta"):
        t5 = FAMILIES[config.model_type][1](config)
        tie(t5, head=raw.get("tie_word_embeddings") is not False)
    # The new parts are small, and their initial values are drawn on the CPU.
    return T5VAE(t5, settings, torch.Generator())


def shapes_of(model: torch.nn.Module) -> Shapes:
    """Names and shapes of the parameters of a module."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def base_shapes(base: str) -> Shapes:
    """Names and shapes of the parameters of the pretrained T5 itself, with a tied output head left out.

    Raises ConfigError if the base's configuration cannot be used.
    """
    config, raw, _ = base_config(base)
    with torch.device("meta"):
        t5 = FAMILIES[config.model_type][1](config)
        tie(t5, head=raw.get("tie_word_embeddings") is not False)
    return shapes_of(t5)


def check_latent_dim(settings: ModelConfig) -> None:
    """Raise ConfigError for more latent units than the base has dimensions: mu is a linear map of one such vector."""
    width = int(base_config(settings.base)[0].d_model)
    if settings.injection != "none" and settings.latent_dim > width:
        raise ConfigError(
            f"model.latent_dim is {settings.latent_dim}, but mu is a linear map of a vector of {width} numbers, the "
            f"d_model of {settings.base}; use at most {width}"
        )


def check_base_weights(base: str) -> None:
    """Compare the weight files of a base in a directory with its configuration; a hub name is not looked up.

    Raises ConfigError that names the file and the tensor if a file is missing or truncated, or a shape differs.
    """
    config, _, location = base_config(base)
    folder = Path(location)
    if not folder.is_dir():
        return
    with torch.device("meta"):
        wanted = shapes_of(FAMILIES[config.model_type][1](config))
    found = _stored_shapes(folder, base)
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            raise ConfigError(
                f"model.base {base}: {name} is {list(found[name])} in the weights, but {list(wanted[name])} by "
                "config.json; the two are of different models"
            )


def check_start(settings: ModelConfig) -> None:
    """Check the model whose weights a run starts from (`model.weights`) against the recipe's model.

    It is a VAE or a plain language model, which has the weights of a decoder and the embeddings.

    Raises CheckpointError if there is no such model, ConfigError that names what differs.
    """
    if settings.weights is None:
        return
    export = model_dir(settings.weights)
    stored = ModelConfig.model_validate(read_export(export)["model"])
    is_part = stored.injection == "none" and settings.injection != "none"
    keys = () if is_part else ("injection", "latent_dim", "pooling", "pool_layers", "slots", "memory_mlp")
    for key in keys:
        theirs, ours = getattr(stored, key), getattr(settings, key)
        if theirs != ours:
            raise ConfigError(f"model.weights {settings.weights}: its {key} is {theirs!r}, the recipe's {ours!r}")
    _check_prior(settings, export)
    # An export has no adapters, and its priors are files of their own.
    plain = settings.model_copy(update={"lora": None, "prior": NORMAL})
    found, wanted = _read_header(export / "model.safetensors", CheckpointError), shapes_of(skeleton(plain))
    if is_part:
        wanted = {name: shape for name, shape in wanted.items() if name in found}
    if differing := sorted(set(found.items()) ^ set(wanted.items())):
        raise ConfigError(
            f"model.weights {settings.weights}: `{differing[0][0]}` differs from the recipe's model; was it trained on "
            f"another base than {settings.base}?"
        )


def _check_prior(settings: ModelConfig, export: Path) -> None:
    """A prior of the recipe's kind continues to train; without one, the run begins a new prior."""
    if not settings.has_prior or settings.prior not in stored_priors(export):
        return
    stored = read_settings(export, settings.prior)
    for key in KEYS:
        if stored[key] != getattr(settings, key):
            raise ConfigError(
                f"model.weights {settings.weights}: {key} of its prior `{settings.prior}` is {stored[key]!r}, the "
                f"recipe's {getattr(settings, key)!r}"
            )


def _stored_shapes(folder: Path, base: str) -> Mapping[str, tuple[int, ...]]:
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        try:
            index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            files = sorted({folder / name for name in index["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"model.base {base}: {folder / INDEX} cannot be read: {error}") from None
    found: Shapes = {}
    for file in files:
        found |= _read_header(file, ConfigError)
    for file in folder.glob("pytorch_model*.bin"):
        # Torch's format is a zip archive whose directory is at the end, so that a truncated file has none.
        if not files and not zipfile.is_zipfile(file):
            raise ConfigError(f"model.base {base}: {file} is truncated or not a PyTorch file")
    return found


def _read_header(file: Path, kind: type[ConfigError] | type[CheckpointError]) -> Shapes:
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise kind(f"{file}: missing, truncated or no safetensors file: {error}") from None
