"""Processes that are gone: zombies, numbers that another process has now, and launchers."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

from vae_ds.runtime import is_alive, launchers_of, records


def test_a_run_whose_process_is_a_zombie_or_another_has_failed(tmp_path: Path) -> None:
    """In a container no one may reap a killed rank, and numbers of processes come round again."""
    records.write_status(tmp_path, "running")
    status = records.read_status(tmp_path)
    assert status is not None
    assert records.of_the_living(status)["state"] == "running"
    assert records.of_the_living(status | {"started_at": "2020-01-01T00:00:00+00:00"})["state"] == "failed"
    assert records.of_the_living(status | {"host": "elsewhere", "pid": 2**30})["state"] == "running"
    child = subprocess.Popen([sys.executable, "-c", ""])
    try:
        deadline = time.monotonic() + 30
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert records.of_the_living(status | {"pid": child.pid})["state"] == "failed"
    finally:
        child.wait()
    assert records.of_the_living(status | {"pid": child.pid})["state"] == "failed"


def test_only_launchers_are_watched_and_zombies_are_dead() -> None:
    """A shell may go without harm: its children were told to go on without it."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert launchers_of(psutil.Process(child.pid)) == []
        watched = psutil.Process(child.pid)
        assert is_alive(watched)
        child.kill()
        deadline = time.monotonic() + 30
        while is_alive(watched):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
