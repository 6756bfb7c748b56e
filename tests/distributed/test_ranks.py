"""The process group: where it listens, and what it leaves behind."""

from datetime import timedelta

import psutil
import pytest

from support.launch import launch
from vae_ds import distributed
from vae_ds.errors import ConfigError


def test_rendezvous_listens_at_its_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    patience = timedelta(seconds=20)
    served = distributed.open_store(0, True, patience)
    joined = distributed.open_store(served.port, False, patience)
    joined.set("key", "value")
    assert served.get("key") == b"value"
    listening = [one.laddr for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == served.port] == ["127.0.0.1"]
    with pytest.raises(ConfigError, match=f"MASTER_PORT {served.port}: cannot listen there"):
        distributed.open_store(served.port, True, patience)


def test_the_environment_is_left_as_it_was() -> None:
    code = """
import os
from vae_ds import distributed
alone = {"MASTER_ADDR": "localhost", "MASTER_PORT": os.environ["MASTER_PORT"], "RANK": "0", "WORLD_SIZE": "1"}
for given in ({}, alone):
    for name in distributed.VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(given)
    before = dict(os.environ)
    assert distributed.start().world == 1
    assert os.environ["GLOO_SOCKET_IFNAME"]
    distributed.finish()
    assert dict(os.environ) == before
"""
    launch(["-c", code], processes=1, timeout_s=100)
