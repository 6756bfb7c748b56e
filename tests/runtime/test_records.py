"""The JSON files of a run directory: strict, atomic, and true when a writer is killed."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import ROOT
from vae_ds.errors import CheckpointError
from vae_ds.runtime.records import environment, read_status, write_end, write_environment, write_json, write_status


def test_status_says_what_became_of_the_run(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path / "new" / "run", "running")
    write_status(tmp_path, "running")
    write_status(tmp_path, "failed", reason="DataError: no text", exit_code=2, step=7, rec=math.nan)
    status = read_status(tmp_path)
    assert status is not None
    assert {"state": "failed", "reason": "DataError: no text", "exit_code": 2, "step": 7, "rec": None}.items() <= (
        status.items()
    )
    assert status["pid"] == os.getpid()
    assert status["started_at"] <= status["updated_at"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "status.json"]
    with pytest.raises(ValueError, match="finished"):
        write_status(tmp_path, "finished")
    assert read_status(tmp_path) == status


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "finished"}', "\xff"])
def test_a_broken_status_is_a_clear_error_and_can_be_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"status\.json: not a run's status"):
        read_status(tmp_path)
    write_status(tmp_path, "done")
    assert (read_status(tmp_path) or {})["state"] == "done"


@pytest.mark.timeout(120)
def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    code = f"""
from vae_ds.runtime.records import write_json
for number in range(10**9):
    write_json({str(tmp_path / "status.json")!r}, {{"state": "running", "number": number, "long": "x" * 20000}})
"""
    path = tmp_path / "status.json"
    writer = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        deadline_s = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        numbers = set()
        for _ in range(200):
            numbers.add(json.loads(path.read_text(encoding="utf-8"))["number"])
            time.sleep(0.002)
    finally:
        writer.kill()
        writer.wait(timeout=10)
    assert len(numbers) > 1
    assert len((read_status(tmp_path) or {})["long"]) == 20000


def test_environment_names_versions_devices_and_the_commit(tmp_path: Path) -> None:
    write_environment(tmp_path, 1, "cpu")
    found = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    assert found["packages"]["torch"] == torch.__version__
    assert {"transformers", "deepspeed", "datasets", "numpy"} <= found["packages"].keys()
    assert found["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert found["world_size"] == 1
    assert len(found["devices"]) == 1
    assert environment(2, "cpu")["world_size"] == 2
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    assert found["commit"] == (head.stdout.strip() if head.returncode == 0 else None)


@pytest.mark.timeout(120)
def test_a_package_inside_a_foreign_checkout_has_no_commit(tmp_path: Path) -> None:
    package = tmp_path / "project" / "site-packages" / "vae_ds"
    shutil.copytree(ROOT / "vae_ds", package, ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", "-C", tmp_path / "project", *arguments], check=True, timeout=10)
    code = "from vae_ds.runtime.records import _checkout; print(_checkout())"
    variables = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=variables, cwd=tmp_path
    )
    assert done.stdout.strip() == "{'commit': None, 'commit_modified': None}", done.stderr


def test_write_json_takes_arrays_and_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "eval-test.json"
    write_json(path, {"kl_per_dim": torch.tensor([1.0, math.inf]), "au": np.int64(2), 3: (Path("x"), None)})
    assert json.loads(path.read_text(encoding="utf-8")) == {"kl_per_dim": [1.0, None], "au": 2, "3": ["x", None]}
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    with pytest.raises(RecursionError):
        write_json(path, loop)
    assert json.loads(path.read_text(encoding="utf-8"))["au"] == 2


@pytest.mark.timeout(120)
def test_the_status_is_read_and_written_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from vae_ds.runtime import records
records.write_status({str(tmp_path)!r}, "running")
assert not {{"torch", "rich", "numpy"}} & set(sys.modules), "the import must be light"
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0


def test_an_end_keeps_what_is_known_of_the_progress(tmp_path: Path) -> None:
    write_status(tmp_path, "running", step=7, total_steps=9)
    write_end(tmp_path, "failed", "no text")
    status = read_status(tmp_path) or {}
    assert (status["state"], status["reason"], status["step"], status["total_steps"]) == ("failed", "no text", 7, 9)
    (tmp_path / "status.json").write_text("{", encoding="utf-8")
    write_end(tmp_path, "stopped", "interrupted")
    assert (read_status(tmp_path) or {})["state"] == "stopped"
