"""The lock of a run directory: who holds it, and that one whose holder is gone never blocks."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from vae_ds.errors import InUseError
from vae_ds.runtime import records, run_lock

HOLD = """
import sys, time
from vae_ds.runtime import run_lock
run_lock.RunLock(sys.argv[1], print).acquire()
print("held", flush=True)
time.sleep(600)
"""


def never(reason: str) -> None:
    raise AssertionError(reason)


def hold(run: Path) -> subprocess.Popen[bytes]:
    """Another process that holds the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def change(run: Path, **values: Any) -> None:
    """Change what the lock says, without touching it otherwise."""
    path = run / run_lock.NAME
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def left_lock(run: Path) -> str:
    """The lock that a killed process has left in a run, as text."""
    other = hold(run)
    other.kill()
    other.wait()
    return (run / run_lock.NAME).read_text(encoding="utf-8")


def refuse_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BEAT_S": 0.1, "LOST_AFTER_S": 1.0, "POLL_S": 0.05}.items():
        monkeypatch.setattr(run_lock, name, value)


def test_the_second_is_told_who_holds_the_run_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    other = hold(tmp_path / "run")
    try:
        lock = run_lock.RunLock(tmp_path / "run", never)
        with pytest.raises(InUseError) as refused:
            lock.acquire()
        said = str(refused.value)
        assert f"another start trains this run: process {other.pid} on " in said
        assert " UTC; wait for its end, stop it, or choose another --run-dir" in said
        assert "\n" not in said
        # What the second start would record of its own end is not written over the status of the first.
        records.write_end(tmp_path / "run", "failed", "in use")
        assert records.read_status(tmp_path / "run") is None
    finally:
        other.kill()
        other.wait()
    began_s = time.monotonic()
    lock.acquire()
    assert time.monotonic() - began_s < 5
    records.write_end(tmp_path / "run", "failed", "my own")
    lock.release()
    assert sorted(os.listdir(tmp_path / "run")) == ["status.json"]


def test_a_process_with_the_same_number_is_another_one(tmp_path: Path) -> None:
    """In a container that was started again, every process can have the number that it had before."""
    lock = run_lock.RunLock(tmp_path, never)
    lock.acquire()
    change(tmp_path, born="1", token="before")
    again = run_lock.RunLock(tmp_path, never)
    again.acquire()
    assert run_lock.token_of(tmp_path) == again.token
    again.release()


@pytest.mark.usefixtures("quick")
def test_on_another_machine_the_lock_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While its holder touches it, it holds; afterwards it does not."""
    lost: list[str] = []
    there = run_lock.RunLock(tmp_path, lost.append)
    there.acquire()
    change(tmp_path, host="n7", place="n7")
    here = run_lock.RunLock(tmp_path, never)
    with pytest.raises(InUseError, match=r"process \d+ on n7 since "):
        here.acquire()
    there._released.set()
    time.sleep(0.3)
    began_s = time.monotonic()
    here.acquire()
    assert 0.9 < time.monotonic() - began_s < 5
    assert "waiting up to 1 s to see whether it is lost" in capsys.readouterr().err
    here.release()


@pytest.mark.usefixtures("quick")
def test_a_holder_that_was_silent_for_too_long_learns_that_it_lost_the_run(tmp_path: Path) -> None:
    """A machine that was suspended comes back: two would train into one directory."""
    lost: list[str] = []
    suspended = run_lock.RunLock(tmp_path, lost.append)
    suspended.acquire()
    (tmp_path / run_lock.NAME).unlink()
    here = run_lock.RunLock(tmp_path, never)
    here.acquire()
    deadline_s = time.monotonic() + 10
    while not lost and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert "has taken over: this process was silent for too long" in lost[0]
    suspended.release()
    assert run_lock.token_of(tmp_path) == here.token
    here.release()


@pytest.mark.parametrize(("restarts", "is_requeued"), [("1", True), ("0", False)])
@pytest.mark.usefixtures("quick")
def test_a_requeued_job_takes_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str, is_requeued: bool
) -> None:
    """Its old node may be unreachable. Another step of the same job is no requeue."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    there = run_lock.RunLock(tmp_path, lambda _: None)
    there.acquire()
    change(tmp_path, host="n7", place="n7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    here = run_lock.RunLock(tmp_path, never)
    began_s = time.monotonic()
    if is_requeued:
        here.acquire()
        here.release()
        assert time.monotonic() - began_s < 0.9
    else:
        with pytest.raises(InUseError):
            here.acquire()
    there._released.set()


def test_of_many_one_takes_the_lock_of_a_process_that_is_gone(tmp_path: Path) -> None:
    left = left_lock(tmp_path)
    for _ in range(50):
        (tmp_path / run_lock.NAME).write_text(left, encoding="utf-8")
        taken: list[run_lock.RunLock] = []
        refused: list[InUseError] = []
        gate = threading.Barrier(8)

        def try_it() -> None:
            lock = run_lock.RunLock(tmp_path, never)
            gate.wait()  # noqa: B023
            try:
                lock.acquire()
                taken.append(lock)  # noqa: B023
            except InUseError as error:
                refused.append(error)  # noqa: B023

        threads = [threading.Thread(target=try_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(taken), len(refused)) == (1, 7)
        assert run_lock.token_of(tmp_path) == taken[0].token
        taken[0].release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("has_links", [True, False])
def test_one_that_is_late_leaves_the_next_holder_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """Between its look at the old lock and its own claim, another start has taken over."""
    if not has_links:
        monkeypatch.setattr(os, "link", refuse_links)
    left_lock(tmp_path)
    first, late = (run_lock.RunLock(tmp_path, never) for _ in range(2))
    looked = run_lock._is_gone

    def look(path: Path, holder: run_lock.Holder) -> bool:
        monkeypatch.setattr(run_lock, "_is_gone", looked)
        is_gone = looked(path, holder)
        first.acquire()
        return is_gone

    monkeypatch.setattr(run_lock, "_is_gone", look)
    with pytest.raises(InUseError):
        late.acquire()
    assert run_lock.token_of(tmp_path) == first.token
    assert os.listdir(tmp_path) == [run_lock.NAME]
    first.release()


def test_one_that_ended_while_it_took_over_blocks_nobody(tmp_path: Path) -> None:
    lock = tmp_path / run_lock.NAME
    successor = left_lock(tmp_path)
    change(tmp_path, token="the first")
    lock.with_name(f".{run_lock.NAME}-after-the first").write_text(successor, encoding="utf-8")
    assert len(run_lock._succession(lock)) == 2
    here = run_lock.RunLock(tmp_path, never)
    here.acquire()
    assert run_lock.token_of(tmp_path) == here.token
    assert os.listdir(tmp_path) == [run_lock.NAME]
    here.release()


def test_the_lock_of_a_process_that_is_gone_is_cleared(tmp_path: Path) -> None:
    run_lock.clear(tmp_path)
    left_lock(tmp_path)
    run_lock.clear(tmp_path)
    assert os.listdir(tmp_path) == []
    lock = run_lock.RunLock(tmp_path, never)
    lock.acquire()
    with pytest.raises(InUseError):
        run_lock.clear(tmp_path)
    lock.release()


def test_a_file_system_without_links_has_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse_links)
    lock = run_lock.RunLock(tmp_path, never)
    lock.acquire()
    with pytest.raises(InUseError):
        run_lock.RunLock(tmp_path, never).acquire()
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("quick")
def test_a_broken_lock_blocks_for_a_while_only(tmp_path: Path) -> None:
    (tmp_path / run_lock.NAME).write_text('{"token": "', encoding="utf-8")
    lock = run_lock.RunLock(tmp_path, never)
    lock.acquire()
    lock.release()
