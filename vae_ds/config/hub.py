"""Access to the Hugging Face hub without a network: use the local caches of its libraries at once.

By default, the libraries retry for half a minute per call and print each attempt.
"""

import functools
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

TIMEOUT_S = 5.0


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
