"""The store that torchrun keeps from attempt to attempt: each finds its own ranks there, and how the last ended."""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from vae_ds import distributed
from vae_ds.distributed import agent_store
from vae_ds.errors import ConfigError, Lost, Stopped
from vae_ds.runtime.machine import free_port

PATIENCE = timedelta(seconds=20)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store of an agent, and the variables that it gives to its ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    return store


def join(world: int = 3) -> list[dist.Store]:
    """One attempt: its ranks arrive in any order."""
    with ThreadPoolExecutor(world) as pool:
        order = range(world - 1, -1, -1)
        return list(pool.map(lambda rank: agent_store.open_attempt(rank, world, PATIENCE), order))


def test_an_attempt_does_not_see_the_keys_of_the_one_before(agent: dist.TCPStore) -> None:
    for number in ("first", "second"):
        stores = join()
        assert not any(store.check(["key"]) for store in stores)
        stores[0].set("key", number)
        assert [store.get("key").decode() for store in stores] == [number] * 3


def test_a_rank_waits_for_the_others_of_its_own_attempt(agent: dist.TCPStore) -> None:
    """The names and answers of a whole attempt are there already."""
    join()
    for rank in (0, 1):
        with pytest.raises(Lost, match=r"not all of the 3 ranks have started within 0\.5 s"):
            agent_store.open_attempt(rank, 3, timedelta(seconds=0.5))


@pytest.mark.parametrize(("code", "error"), [(75, Stopped), (2, ConfigError)])
def test_what_another_attempt_cannot_change_ends_it(
    agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    distributed.note_end(code)
    # A node has joined: the agent stops its ranks and starts them again, and counts no restart.
    assert len(join()) == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(error, match="torchrun has started the ranks again; nothing is trained"):
        agent_store.open_attempt(0, 1, PATIENCE)
    # The ranks of an agent that has counted nothing end with them.
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(error):
        agent_store.open_attempt(1, 2, PATIENCE)


@pytest.mark.parametrize("code", [0, 1, 69])
def test_what_another_attempt_can_change_is_tried_again(
    agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    distributed.note_end(code)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert len(join()) == 3


def test_an_agent_that_has_ended_is_no_reason_to_wait(agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_store, "CONNECT_WITHIN", timedelta(seconds=1))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(Lost, match=r"torchrun's store at 127\.0\.0\.1:\d+ does not answer; the first node has ended"):
        agent_store.open_attempt(1, 2, PATIENCE)
