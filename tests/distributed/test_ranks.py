"""The process group: where it listens, and what it leaves behind."""

import subprocess
import sys
from datetime import timedelta

import psutil
import pytest
import torch

from support import ROOT
from support.launch import launch
from support.processes import no_rank
from vae_ds import distributed
from vae_ds.distributed import ranks
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


@pytest.mark.parametrize(
    ("env", "share"),
    [
        ({}, "cores // 2"),
        ({"LOCAL_WORLD_SIZE": "1"}, "cores"),
        ({"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "4"}, "2"),
        # torchrun inside a task of srun: the task's cores are for all ranks of torchrun.
        ({"SLURM_CPUS_PER_TASK": "7", "LOCAL_WORLD_SIZE": "2"}, "cores // 2"),
    ],
)
def test_threads_are_divided_among_the_ranks(env: dict[str, str], share: str) -> None:
    """Also those of an OpenMP that is loaded later, as DeepSpeed's CPU Adam has it."""
    code = f"""
import os
if {"OMP_NUM_THREADS" not in env}:
    del os.environ["OMP_NUM_THREADS"]
import ctypes
import torch
from vae_ds import distributed
from vae_ds.runtime import cores
cores = cores()
distributed.start()
expected = max(1, {share})
assert os.environ["OMP_NUM_THREADS"] == str(expected), os.environ["OMP_NUM_THREADS"]
assert torch.get_num_threads() == expected, torch.get_num_threads()
assert ctypes.CDLL("libgomp.so.1").omp_get_max_threads() == expected
distributed.finish()
assert ("OMP_NUM_THREADS" in os.environ) is {"OMP_NUM_THREADS" in env}
"""
    launch(["-c", code], processes=2, timeout_s=100, env=env)


def test_the_thread_that_torchrun_sets_by_itself_is_no_choice() -> None:
    """It sets OMP_NUM_THREADS=1 if nobody did, and the update of offloaded parameters would use one core of many."""
    code = """
import os, sys, torch
from vae_ds import distributed
from vae_ds.runtime import cores
distributed.start()
assert torch.get_num_threads() == (cores() if sys.argv[1] == "none" else 1), torch.get_num_threads()
"""
    agent = """
import os, subprocess, sys
os.environ.update(OMP_NUM_THREADS="1", TORCHELASTIC_RUN_ID="run")
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""
    env = {name: value for name, value in no_rank().items() if name != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}
    for chosen, more in (("none", {}), ("one", {"OMP_NUM_THREADS": "1"})):
        command = [sys.executable, "-c", agent, "-c", code, chosen]
        subprocess.run(command, env=env | more, check=True, timeout=100)


@pytest.mark.parametrize(
    ("env", "found", "threads"),
    [
        ({"SLURM_CPUS_PER_TASK": "5"}, 16, 5),
        ({"SLURM_CPUS_ON_NODE": "16"}, 16, 8),
        ({"SLURM_CPUS_ON_NODE": "32"}, 16, 16),
    ],
)
def test_threads_of_a_task_of_srun(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], found: int, threads: int
) -> None:
    """The task's cores, its share of the node's, or those to which SLURM has bound it."""
    monkeypatch.setattr(ranks, "cores", lambda: found)
    monkeypatch.setattr(ranks, "_before", {"RANK": None})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**env, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    try:
        ranks._pin_threads(2)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
