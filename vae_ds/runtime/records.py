"""The small JSON files of a run directory: `status.json` (running, stopped, failed, done) and `environment.json`.

All JSON is strict: a number that is not finite is null. A file is replaced atomically: a reader meets the old one or
the whole new one, whenever the writer dies.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ds import config as configuration
from vae_ds.config import differences
from vae_ds.errors import CheckpointError, ConfigError
from vae_ds.runtime import machine

if TYPE_CHECKING:
    from vae_ds.config import Config

_log = logging.getLogger(__name__)

STATES = ("running", "stopped", "failed", "done")
PACKAGES = ("vae_ds", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "safetensors", "numpy")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


PROCESS_BEGAN = _now()


def write_status(run_dir: str | Path, state: str, **facts: Any) -> None:
    """Write `status.json` atomically: the state, when, which process, and `facts` (`reason`, `exit_code`, `step` ...).

    `started_at` is when this process began, `updated_at` is now; both ISO 8601 in UTC. Call it on rank 0.
    Raises ValueError for a state that is none of running, stopped, failed, done.
    """
    if state not in STATES:
        raise ValueError(f"state `{state}`; one of {', '.join(STATES)}")
    process = {"started_at": PROCESS_BEGAN, "updated_at": _now(), "pid": os.getpid(), "host": socket.gethostname()}
    write_json(Path(run_dir) / "status.json", {"state": state, "reason": None} | facts | process)


def read_status(run_dir: str | Path) -> dict[str, Any] | None:
    """What `write_status` wrote last, or None where there is no status. Raises CheckpointError if it is unreadable."""
    path = Path(run_dir) / "status.json"
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a run's status: {error}") from None
    if not isinstance(status, dict) or status.get("state") not in STATES:
        raise CheckpointError(f"{path}: not a run's status: its `state` is none of {', '.join(STATES)}")
    return status


def of_the_living(status: dict[str, Any]) -> dict[str, Any]:
    """The status, but `failed` where it says `running` and the process that said so on this host is gone."""
    here = status["state"] == "running" and status.get("host") == socket.gethostname()
    if not here or machine.ran_at(int(status["pid"]), datetime.fromisoformat(status["started_at"]).timestamp()):
        return status
    return status | {"state": "failed", "reason": f"process {status['pid']} is gone and left no word"}


def is_done(
    run_dir: Path, config: Config, free: tuple[str, ...], ends: tuple[str, ...], resume: str, tell: bool = True
) -> bool:
    """Whether a run directory leaves nothing to do for `config`; False where there is no run yet.

    `free`: starts of dotted keys that a resumed run may set anew; `ends`: the keys that say where it ends, which it may
    set anew too, and which a run that was done goes on for. `resume`: `auto`, or `never` to refuse a directory that
    holds a run. What changed in a run that goes on is told in a line of the log, if this process is to `tell`.
    Raises ConfigError if it does, or if its run was made with other settings, naming them.
    """
    stored = run_dir / "config.yaml"
    if not stored.is_file():
        return False
    if resume == "never":
        raise ConfigError(f"{run_dir} already holds a run; choose another --run-dir, or --resume auto")
    before = configuration.load(type(config), str(stored))
    changed = differences(before.model_dump(by_alias=True), config.model_dump(by_alias=True))
    fatal = [key for key in changed if not key.startswith(free) and key not in ends]
    if fatal:
        raise ConfigError(f"{stored}: the run was made with another {', '.join(fatal)}; choose another --run-dir")
    done = (read_status(run_dir) or {}).get("state") == "done" and not set(changed) & set(ends)
    if changed and not done and tell:
        _log.warning("%s: the run goes on with another %s", run_dir, ", ".join(changed))
    return done


def environment(world_size: int, device: str) -> dict[str, Any]:
    """Versions, the package's git commit, host, devices of this host and world size, as `environment.json` has them.

    `device` is torch's name of the device type, `cpu` or `cuda`.

    `commit` is null where the package is no checkout; `commit_modified` says that tracked files differ from it.
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
    """Write `environment.json`. Call it on rank 0."""
    write_json(Path(run_dir) / "environment.json", environment(world_size, device))


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON atomically. Arrays and tensors of any library are taken; folders are made."""
    replace_file(Path(path), f"{strict_json(value, indent=2)}\n".encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hosts that share the folder may share process numbers, so the name has both; it has no part of the file's own
    # name, by which another program may pick up what a crash left behind.
    part = path.with_name(f".part-{socket.gethostname()}-{os.getpid()}")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON text of `value`; what is not finite becomes null, what JSON has no form for its string."""
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
    # An installed package may lie inside somebody else's checkout, whose commit says nothing about it.
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
