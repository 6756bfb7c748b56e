"""Access to the Hugging Face hub without a network: use the local caches of its libraries at once.

By default, the libraries retry for half a minute per call and print each attempt.
"""

import functools
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

from vae_ds.errors import CheckpointError, ConfigError

TIMEOUT_S = 5.0
EXPORT_FILES = (
    *("config.json", "model.safetensors", "priors/*.safetensors"),
    *("tokenizer*", "special_tokens_map.json", "spiece.model", "added_tokens.json"),
)


def folder_of(name: str | Path, revision: str | None = None) -> Path:
    """The directory `name` or, if there is none and this can be a hub name (OWNER/NAME), its export in the hub's cache.

    The export is downloaded if the hub can be reached. A path that is neither is returned as it is.

    revision: a branch, a tag or a commit of the hub; None means the newest of the main branch.
    Raises CheckpointError if the hub has no such model or revision, or cannot be reached and the cache does not have
    it; ConfigError for a revision of a directory.
    """
    path, words = Path(name).expanduser(), str(name).split("/")
    if path.exists() or len(words) != 2 or not all(words) or words[0].startswith((".", "~")):
        if revision is not None:
            raise ConfigError(f"a revision ({revision}) is one of a name on the hub (OWNER/NAME); {name} is none")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        with reachable_or_offline():
            return Path(
                snapshot_download(
                    str(name),
                    revision=revision,
                    allow_patterns=list(EXPORT_FILES),
                    local_files_only=constants.HF_HUB_OFFLINE,
                    endpoint=constants.ENDPOINT,
                )
            )
    except (OSError, ValueError, HTTPError):
        at = "" if revision is None else f" --revision {revision}"
        raise CheckpointError(
            f"{name}: no such directory, and the hub cannot be reached or has no such model"
            f"{' or revision' if at else ''}; check the name, or download it on a machine with a network (`hf download "
            f"{name}{at}`)"
        ) from None


def check_name(name: str) -> None:
    """Raise ConfigError if `name` is not OWNER/NAME as the hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        why = "" if name.count("/") == 1 else "it has no owner"
    except HFValidationError as error:
        why = " ".join(str(error).split())
    if why:
        raise ConfigError(f"{name} is no name of a model on the hub, which is OWNER/NAME: {why}")


def endpoint() -> str:
    """The address of the hub."""
    return str(constants.ENDPOINT)


def is_reachable() -> bool:
    """Whether the hub, or the proxy to it, accepts a connection."""
    return _answers(constants.ENDPOINT)


def is_offline() -> bool:
    """Whether the hub's libraries are offline, because of HF_HUB_OFFLINE or `reachable_or_offline`."""
    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def reachable_or_offline(local: bool = False) -> Iterator[None]:
    """Within this context, load hub names only from the local cache if the hub does not answer.

    With `local`, always load from the cache and do not contact the hub.
    """
    # `datasets` copies the switch when it is imported.
    holders: list[Any] = [constants, sys.modules.get("datasets.config")]
    switches = [(module, module.HF_HUB_OFFLINE) for module in holders if module is not None]
    already_offline = any(before for _, before in switches)
    offline = already_offline or not (local or _answers(constants.ENDPOINT))
    try:
        for module, _ in switches:
            module.HF_HUB_OFFLINE = offline
        yield
    finally:
        for module, before in switches:
            module.HF_HUB_OFFLINE = before


@functools.cache
def _answers(endpoint: str) -> bool:
    """Whether the address of the hub, or of the proxy, accepts a connection. Checked once per process."""
    target = urlsplit(endpoint)
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy:
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname or "", port), timeout=TIMEOUT_S).close()
    except OSError:
        return False
    return True
