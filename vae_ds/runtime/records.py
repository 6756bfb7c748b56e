"""The small JSON files of a run directory: `status.json` (running, stopped, failed, done) and `environment.json`.

All JSON is strict: a number that is not finite becomes null. Files are replaced atomically: a reader sees either the
old file or the complete new one, even if the writer is killed.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vae_ds.errors import CheckpointError
from vae_ds.runtime import machine, run_lock
from vae_ds.runtime.exits import EXIT_FAULT, EXIT_STOPPED

# What `write_status` says of itself.
OF_THE_WRITER = ("state", "started_at", "updated_at", "pid", "host")
STATES = ("running", "stopped", "failed", "done")
EXIT_CODES = {"stopped": EXIT_STOPPED, "failed": EXIT_FAULT, "done": 0}
PACKAGES = ("vae_ds", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "safetensors", "numpy")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


PROCESS_BEGAN = _now()


def write_status(run_dir: str | Path, state: str, **facts: Any) -> None:
    """Write `status.json` atomically: state, times, process, and `facts` (`reason`, `exit_code`, `step`, ...).

    `started_at` is the start of this process, `updated_at` is now; both are ISO 8601 in UTC. `exit_code` is null while
    the run is running, and if not given, it is the usual one of the state. Call it on rank 0 only.
    Raises ValueError if the state is not one of running, stopped, failed, done.
    """
    if state not in STATES:
        raise ValueError(f"state is `{state}`; it must be one of {', '.join(STATES)}")
    if facts.get("exit_code") is None:
        facts["exit_code"] = EXIT_CODES.get(state)
    process = {"started_at": PROCESS_BEGAN, "updated_at": _now(), "pid": os.getpid(), "host": socket.gethostname()}
    write_json(Path(run_dir) / "status.json", {"state": state, "reason": None} | facts | process)


def write_end(run_dir: str | Path, state: str, reason: str, code: int | None = None) -> None:
    """Write that a run has failed or stopped. What the last status says of the run's progress is kept.

    Does nothing while another process trains the run.
    """
    if run_lock.is_held_by_another(run_dir):
        return
    try:
        before = read_status(run_dir) or {}
    except CheckpointError:
        before = {}
    facts = {key: value for key, value in before.items() if key not in OF_THE_WRITER}
    write_status(run_dir, state, **facts | {"reason": reason, "exit_code": code})


def read_status(run_dir: str | Path) -> dict[str, Any] | None:
    """The last status that `write_status` wrote, None if there is none. Raises CheckpointError if it is unreadable."""
    path = Path(run_dir) / "status.json"
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a run's status: {error}") from None
    if not isinstance(status, dict) or status.get("state") not in STATES:
        raise CheckpointError(f"{path}: not a run's status: its `state` is not one of {', '.join(STATES)}")
    return status


def of_the_living(status: dict[str, Any]) -> dict[str, Any]:
    """The status, with `running` replaced by `failed` if its process ran on this host and is gone."""
    here = status["state"] == "running" and status.get("host") == socket.gethostname()
    if not here or machine.ran_at(int(status["pid"]), datetime.fromisoformat(status["started_at"]).timestamp()):
        return status
    return status | {"state": "failed", "reason": f"process {status['pid']} is gone and wrote no final status"}


def environment(world_size: int, device: str) -> dict[str, Any]:
    """The content of `environment.json`: versions, git commit, host, devices of this host, and world size.

    `device` is torch's device type, `cpu` or `cuda`. `commit` is null if the package is not in its own git checkout;
    `commit_modified` is true if tracked files differ from the commit.
    """
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        **_checkout(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "world_size": world_size,
        "device": device,
        "devices": _devices(device),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "time": _now(),
    }


def write_environment(run_dir: str | Path, world_size: int, device: str) -> None:
    """Write `environment.json`. Call it on rank 0 only."""
    write_json(Path(run_dir) / "environment.json", environment(world_size, device))


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON atomically. Accepts arrays and tensors of any library. Creates missing directories."""
    replace_file(Path(path), f"{strict_json(value, indent=2)}\n".encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, empty without a file. A last row that is still being written is left out.

    Raises CheckpointError if a row is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise CheckpointError(f"{path}: a row is not JSON: {error}") from None


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically. Creates missing directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hosts that share the directory can have the same process ids, so the temporary name contains both. It does not
    # contain the file's own name, so that no program takes the remains of a crash for the file.
    part = path.with_name(f".part-{socket.gethostname()}-{os.getpid()}")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON text of `value`. Non-finite numbers become null, and objects that JSON cannot represent become strings."""
    return json.dumps(_finite(unpacked(value)), indent=indent, allow_nan=False, default=str)


def unpacked(value: Any) -> Any:
    """Tensors and arrays of any library as Python numbers and lists."""
    if isinstance(value, Mapping):
        return {str(key): unpacked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [unpacked(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _checkout() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    found = _git(root, "rev-parse", "--show-toplevel", "HEAD")
    top, commit = [*found.splitlines(), "", ""][:2] if found else ("", "")
    # An installed package can be inside the checkout of another project, whose commit does not describe it.
    if not commit or Path(top).resolve() != root:
        return {"commit": None, "commit_modified": None}
    return {"commit": commit, "commit_modified": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _devices(device: str) -> list[str]:
    if device != "cuda":
        return [f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"]
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in found]
