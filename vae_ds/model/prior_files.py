"""The priors of an export: one file each, `priors/KIND.safetensors`, and the name of the one in use in `config.json`.

A prior is small beside the model, so a new one is added without writing the model again. N(0, I) has no file and is
always there. A file has the settings of its prior (`prior_components`, ...) in its metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vae_ds.config import ModelConfig
from vae_ds.errors import CheckpointError
from vae_ds.model.bases import read_export
from vae_ds.runtime import records

FOLDER = "priors"  # of an export
PREFIX = "prior."  # of the parameters of T5VAE
NORMAL = "normal"
KEYS = ("latent_dim", "prior", "prior_components", "prior_couplings", "prior_width")


def stored_priors(export: Path) -> list[str]:
    """The kinds of prior that an export has; the first one is always `normal`."""
    return [NORMAL, *sorted(file.stem for file in (export / FOLDER).glob("*.safetensors"))]


def prior_in_use(description: Mapping[str, Any]) -> str:
    """The prior that an export uses, by its `config.json`. That of an older version does not say it."""
    return str(description["model"].get("prior", NORMAL))


def save_prior(
    export: Path, settings: ModelConfig, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
) -> None:
    """Write the prior of `settings`, whose weights have their names in T5VAE, or replace the one of this kind.

    `facts` of its fit are plain data for the metadata of the file.
    """
    folder = export / FOLDER
    folder.mkdir(exist_ok=True)
    stored = {name: tensor.detach().to("cpu").float().contiguous() for name, tensor in tensors.items()}
    told = settings.model_dump(mode="json", include=set(KEYS))
    fresh = folder / f".{settings.prior}.tmp"
    save_file(stored, fresh, metadata={"format": "pt", "settings": json.dumps(told), "fit": json.dumps(facts or {})})
    fresh.replace(folder / f"{settings.prior}.safetensors")


def select_prior(export: Path, kind: str) -> None:
    """Let an export use another one of its priors. Raises CheckpointError if it has none of this kind."""
    description = read_export(export)
    need_prior(export, kind)
    description["model"]["prior"] = kind
    if kind != NORMAL:
        description["model"] |= read_settings(export, kind)
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    records.replace_file(export / "config.json", text.encode())


def need_prior(export: Path, kind: str) -> None:
    """Raise CheckpointError if an export has no prior of this kind."""
    if kind not in (has := stored_priors(export)):
        raise CheckpointError(
            f"{export}: no prior `{kind}`; it has {', '.join(has)}. `vae-ds prior RUN --kind {kind}` fits one"
        )


def with_prior(settings: ModelConfig, export: Path, kind: str | None) -> ModelConfig:
    """The settings of an export's model with the prior `kind`; None is the one in use.

    Raises CheckpointError if the export has no such prior, or one for another number of latent units.
    """
    kind = kind or settings.prior
    need_prior(export, kind)
    if kind == NORMAL:
        return settings.model_copy(update={"prior": NORMAL})
    found = read_settings(export, kind)
    if found["latent_dim"] != settings.latent_dim:
        raise CheckpointError(
            f"{_file(export, kind)}: a prior of {found['latent_dim']} latent units, but the model has "
            f"{settings.latent_dim}; fit one to this model with `vae-ds prior RUN --kind {kind}`"
        )
    return settings.model_copy(update=found)


def read_settings(export: Path, kind: str) -> dict[str, Any]:
    """The settings of a stored prior, KEYS of ModelConfig. Raises CheckpointError."""
    file = _file(export, kind)
    try:
        with safe_open(file, framework="pt") as stored:
            told = json.loads((stored.metadata() or {})["settings"])
            return {key: told[key] for key in KEYS}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: missing, broken or no prior of vae_ds: {error}") from None


def read_prior(export: Path, kind: str) -> dict[str, Tensor]:
    """The weights of a stored prior by their names in T5VAE; none for `normal`. Raises CheckpointError."""
    if kind == NORMAL:
        return {}
    file = _file(export, kind)
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or broken: {error}") from None


def _file(export: Path, kind: str) -> Path:
    return export / FOLDER / f"{kind}.safetensors"
