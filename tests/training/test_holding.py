"""A run directory has one training, and all ranks see the same directory: real starts and real ranks."""

import signal
import sys
from pathlib import Path

import pytest

from support import ROOT
from support.launch import launch
from support.processes import STARTUP_S, kill_all, new_job, rows, start, state_of, wait_until
from support.recipes import small_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("holding"))


@pytest.mark.timeout(600)
def test_a_second_start_is_refused_in_one_line_and_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    """On two ranks, which agree; after the first is killed, the same start trains."""
    run, job, output = tmp_path / "run", new_job() | {"PYTHONPATH": str(ROOT)}, tmp_path / "output"
    words = ["-m", "vae_ds", "train", str(recipe), "--run-dir", str(run)]
    words += ["--set", "phases.0.steps=100000"]
    process = start([sys.executable, *words], job, output)
    try:
        wait_until(lambda: len(rows(run)) >= 2, process, output, STARTUP_S)
        done = launch(words, timeout_s=STARTUP_S, check=False)
        # `launch` gives the other rank less time than it waits for the message of rank 0.
        assert done.codes[0] == 2, done.report()
        assert done.codes[1] in (2, -signal.SIGKILL), done.report()
        (line,) = [one for one in done.output.splitlines() if "error" in one]
        assert f"another start trains this run: process {process.pid} on " in line
        assert state_of(run) == "running"
        reached = len(rows(run))
        wait_until(lambda: len(rows(run)) > reached, process, output, STARTUP_S)
        process.send_signal(signal.SIGKILL)
        process.wait()
        again = start([sys.executable, *words], job, output)
        reached = rows(run)[-1]["step"]
        wait_until(lambda: rows(run)[-1]["step"] > reached, again, output, STARTUP_S)
        again.send_signal(signal.SIGTERM)
        assert again.wait(timeout=60) == 75
        assert not (run / "run.lock").exists()
    finally:
        kill_all(job)


def test_a_directory_that_not_all_nodes_share_ends_the_start(tmp_path: Path) -> None:
    """Each rank in a directory of its own stands for nodes with their own disks."""
    code = f"""
import os
from pathlib import Path
from vae_ds import distributed
from vae_ds.errors import ConfigError
from vae_ds.training import hold, holding
holding.SEEN_WITHIN_S = 1.0
ranks = distributed.start()
with hold(Path({str(tmp_path)!r}) / "shared", ranks):
    distributed.barrier()
own = Path({str(tmp_path)!r}) / f"node-{{ranks.rank}}"
own.mkdir()
os.chdir(own)
try:
    with hold(Path("run"), ranks):
        raise AssertionError("must not begin")
except ConfigError as error:
    assert "--run-dir run: not on a disk that all nodes share: rank 1 on " in str(error), error
    assert " does not see what rank 0 on " in str(error), error
assert not list(own.glob("run/*"))
distributed.finish()
"""
    launch(["-c", code], processes=2, timeout_s=100)
