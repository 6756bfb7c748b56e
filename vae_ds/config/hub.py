"""The Hugging Face hub where it is out of reach: its libraries' caches answer at once.

On their own the libraries retry for half a minute a call and print each try.
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

PATIENCE_S = 5.0


def is_offline() -> bool:
    """Whether the hub's libraries were told to stay offline, by HF_HUB_OFFLINE or by this room."""
    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def reachable_or_offline(local: bool = False) -> Iterator[None]:
    """Inside, hub names are served from the local cache alone if the hub does not answer; `local` asks nobody."""
    # The second is a copy of the switch, there once that library is imported.
    holders: list[Any] = [constants, sys.modules.get("datasets.config")]
    switches = [(module, module.HF_HUB_OFFLINE) for module in holders if module is not None]
    told = any(before for _, before in switches)
    offline = told or not (local or _answers(constants.ENDPOINT))
    try:
        for module, _ in switches:
            module.HF_HUB_OFFLINE = offline
        yield
    finally:
        for module, before in switches:
            module.HF_HUB_OFFLINE = before


@functools.cache
def _answers(endpoint: str) -> bool:
    """Whether anything accepts a connection at the hub's address, or at the proxy's; asked once a process."""
    target = urlsplit(endpoint)
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy:
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname or "", port), timeout=PATIENCE_S).close()
    except OSError:
        return False
    return True
