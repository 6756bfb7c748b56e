"""What a run tells about itself: rows of metrics, TensorBoard curves, a progress bar, its status, its environment.

Rank 0 alone writes; a Monitor on another rank does nothing. A step is a global APPLIED optimizer step, counted over
all phases: the x axis of each curve and the `step` of each row.

Files of a run directory written here:

- `metrics.jsonl`: one JSON object a logging step. `evaluations.jsonl`: one a validation.
- `tensorboard/`: one directory a run. A resumed run adds an event file there that purges the points past the
  checkpoint, so its curves go on where the checkpoint left them.
- `status.json`: running, stopped, failed or done. `environment.json`: versions, commit, devices.

All JSON is strict: a number that is not finite is null (TensorBoard shows it as it is).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vae_ds.errors import CheckpointError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from vae_ds.runtime import Ranks

STATES = ("running", "stopped", "failed", "done")
PACKAGES = ("vae_ds", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "safetensors", "numpy")
SIZES = {"sentences", "tokens", "words", "iw_sentences", "iw_samples"}
"""What an evaluation says about its own extent; the same at each step, so no curve."""
LINE_EVERY = 0.1
LINE_AFTER_S = 300.0


class Monitor:
    """Records a run in `run_dir` and shows how it goes.

    `tensorboard` and `progress` are the recipe's `logging.tensorboard` and `logging.progress`; what is off is not even
    imported. The progress bar needs a terminal on standard error, else plain lines appear there now and then.
    Order of calls: `resume_from` at most once and before anything is logged; `begin_phase`; `log`, `advance` and
    `evaluation`; `close`.
    """

    def __init__(self, run_dir: str | Path, ranks: Ranks, tensorboard: bool = True, progress: bool = True) -> None:
        self._run_dir = Path(run_dir)
        self._active = ranks.is_main
        self._tensorboard = tensorboard and self._active
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None
        self._metrics: TextIO | None = None
        self._progress: _Bar | _Lines | None = None
        if progress and self._active:
            self._progress = _Bar() if sys.stderr.isatty() else _Lines()

    def resume_from(self, step: int) -> None:
        """Forget all that was recorded after the checkpoint of global step `step`; 0 forgets the whole run.

        The rows past it are cut, and so is a last row that a crash left unfinished; TensorBoard is told to drop its
        points. Safe to call where nothing was recorded yet.
        """
        if not self._active:
            return
        if self._metrics is not None or self._writer is not None:
            raise RuntimeError("resume_from comes before the first row")
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            _cut_rows(self._run_dir / name, step)
        self._purge_step = step + 1

    def begin_phase(self, name: str, total_steps: int, done: int = 0) -> None:
        """A phase of `total_steps` applied steps begins, or goes on after `done` of them."""
        if self._progress:
            self._progress.begin(name, total_steps, done)

    def log(self, row: Mapping[str, Any]) -> None:
        """Record one logging step.

        `row` needs `step`, the global applied step; METHOD's symbols name the rest: `rec`, raw `kl`, `kl_weighted`
        and `loss` in nats per sentence, `beta`, `lr`, `grad_norm`, `tokens_per_s`, `padding` and so on. It is on the
        disk before this returns. Each number of it becomes the curve `train/<key>`, and `train/nelbo` is rec + kl.
        """
        if not self._active:
            return
        values = _unpacked(row)
        step = int(values["step"])
        if self._metrics is None:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._metrics = (self._run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(_strict_json(values) + "\n")
        self._metrics.flush()
        if self._progress:
            self._progress.show(values)
        writer = self._open_writer()
        if writer is None:
            return
        curves = {key: value for key, value in values.items() if key != "step" and _is_number(value)}
        if {"rec", "kl"} <= curves.keys():
            curves.setdefault("nelbo", curves["rec"] + curves["kl"])
        for key, value in curves.items():
            writer.add_scalar(f"train/{key}", value, step)
        # A process that dies between a checkpoint and a late flush would leave a hole in the curve, for good.
        writer.flush()

    def advance(self, steps: int = 1) -> None:
        """So many applied steps of the phase are done since the last call."""
        if self._progress:
            self._progress.advance(steps)

    def evaluation(
        self,
        step: int,
        split: str,
        metrics: Mapping[str, Any],
        kl_per_dim: Iterable[float] | None = None,
        reconstructions: Iterable[tuple[str, str]] = (),
        samples: Iterable[str] = (),
    ) -> None:
        """Record an evaluation of `split` at global step `step`.

        `metrics` has METHOD section 4's keys (nats per sentence; null where the model has none), `kl_per_dim` the
        mean KL of each of the L units in nats, `reconstructions` pairs (source, reconstruction), `samples` texts
        decoded from prior draws. TensorBoard gets them as `<split>/<key>`, a histogram and two texts.
        """
        if not self._active:
            return
        values = _unpacked(metrics)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        with (self._run_dir / "evaluations.jsonl").open("a", encoding="utf-8") as rows:
            rows.write(_strict_json({"step": step, "split": split, **values}) + "\n")
        if self._progress:
            self._progress.say(f"{split} at step {step}: {_terms(values, ('nelbo', 'rec', 'kl', 'mi', 'au', 'z_gain'))}")
        writer = self._open_writer()
        if writer is None:
            return
        for key, value in values.items():
            if _is_number(value) and key not in SIZES:
                writer.add_scalar(f"{split}/{key}", value, step)
        units = [float(kl) for kl in _unpacked(kl_per_dim) or () if math.isfinite(kl)]
        if units:
            import numpy as np

            writer.add_histogram(f"{split}/kl_per_dim", np.asarray(units), step)
        pairs = list(reconstructions)
        if pairs:
            writer.add_text(f"{split}/reconstructions", _markdown_table(("source", "reconstruction"), pairs), step)
        texts = list(samples)
        if texts:
            writer.add_text(f"{split}/prior_samples", _markdown_table(("sample",), [(text,) for text in texts]), step)
        writer.flush()

    def close(self) -> None:
        """Flush and close everything. May be called twice."""
        if self._progress:
            self._progress.close()
        if self._metrics:
            self._metrics.close()
            self._metrics = None
        if self._writer:
            self._writer.close()
            self._writer = None

    def _open_writer(self) -> SummaryWriter | None:
        if self._tensorboard and self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=self._purge_step)
            self._purge_step = None
        return self._writer


class _Bar:
    """A bar on the terminal, one a phase."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}", markup=False),
            console=Console(stderr=True),
            redirect_stdout=sys.stdout.isatty(),  # a standard output sent to a file must not end on the terminal
        )
        self._task: Any = None

    def begin(self, name: str, total: int, done: int) -> None:
        self._progress.start()
        self._task = self._progress.add_task(name, total=total, completed=done, terms="")

    def show(self, row: Mapping[str, Any]) -> None:
        if self._task is not None:
            self._progress.update(self._task, terms=_terms(row))

    def advance(self, steps: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, steps)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """Plain lines on a standard error that is no terminal: every tenth of a phase, and after five minutes."""

    def __init__(self) -> None:
        self._name = ""
        self._total = self._done = self._mark = 0
        self._row: Mapping[str, Any] = {}
        self._said_s = time.monotonic()

    def begin(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._done, self._row = name, total, done, {}
        self._mark = self._tenth()
        self.say(f"{name}: {done}/{total} steps")

    def show(self, row: Mapping[str, Any]) -> None:
        self._row = row

    def advance(self, steps: int) -> None:
        self._done += steps
        if self._tenth() == self._mark and time.monotonic() - self._said_s < LINE_AFTER_S:
            return
        self._mark = self._tenth()
        percent = 100 * self._done // max(self._total, 1)
        self.say(f"{self._name}: {self._done}/{self._total} steps ({percent}%)  {_terms(self._row)}".rstrip())

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        self._said_s = time.monotonic()

    def close(self) -> None:
        pass

    def _tenth(self) -> int:
        return int(self._done / max(self._total * LINE_EVERY, 1))


def write_status(run_dir: str | Path, state: str, **facts: Any) -> None:
    """Write `status.json` atomically: the state, when, which process, and `facts` (`reason`, `exit_code`, `step` ...).

    `started_at` is when the run last entered `running`, `updated_at` is now; both ISO 8601 in UTC. Call it on rank 0.
    Raises ValueError for a state that is none of running, stopped, failed, done.
    """
    if state not in STATES:
        raise ValueError(f"state `{state}`; one of {', '.join(STATES)}")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    before: dict[str, Any] = {}
    # A broken old status is no reason to lose the new one.
    with suppress(CheckpointError):
        before = read_status(run_dir) or {}
    goes_on = before.get("pid") == os.getpid() or state != "running"
    process = {
        "started_at": (before.get("started_at") if goes_on else None) or now,
        "updated_at": now,
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
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


def environment(ranks: Ranks) -> dict[str, Any]:
    """Versions, the package's git commit, host, devices of this host and world size, as `environment.json` has them.

    `commit` is null where the package is no checkout; `commit_modified` says that tracked files differ from it.
    """
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        **_checkout(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "world_size": ranks.world,
        "device": ranks.device.type,
        "devices": _devices(ranks),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_environment(run_dir: str | Path, ranks: Ranks) -> None:
    """Write `environment.json`, on rank 0."""
    if ranks.is_main:
        write_json(Path(run_dir) / "environment.json", environment(ranks))


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON atomically: a reader meets the old file or the whole new one, whenever the writer dies.

    Folders are made; numbers, arrays and tensors of any kind are taken; what is not finite becomes null.
    """
    _replace(Path(path), json.dumps(_finite(_unpacked(value)), indent=2, allow_nan=False, default=str) + "\n")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hosts that share the folder may share process numbers, so the name has both.
    part = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _cut_rows(path: Path, step: int) -> None:
    if not path.exists():
        return
    rows = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = [row for row in rows if 0 <= _step_of(row) <= step]
    _replace(path, "".join(f"{row}\n" for row in kept))


def _step_of(row: str) -> int:
    """The step of a row of JSON lines; -1 if the row is not whole."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


def _unpacked(value: Any) -> Any:
    """Tensors and arrays of any library as Python numbers and lists."""
    if isinstance(value, Mapping):
        return {str(key): _unpacked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_unpacked(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _strict_json(values: dict[str, Any]) -> str:
    return json.dumps(_finite(values), allow_nan=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _terms(row: Mapping[str, Any], keys: Iterable[str] = ("rec", "kl", "beta", "tokens_per_s")) -> str:
    shown = [(key, row[key]) for key in keys if _is_number(row.get(key))]
    return "  ".join(f"{v:,.0f} tokens/s" if k == "tokens_per_s" else f"{k} {v:.4g}" for k, v in shown)


def _markdown_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *(tuple(_escape(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """Text as one table cell that Markdown and HTML leave as it is."""
    return re.sub(r"[^\w\s,;'\"?/=$%^@]|_", lambda mark: f"&#{ord(mark[0])};", " ".join(text.split()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _checkout() -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent
    found = _git(root, "rev-parse", "--show-toplevel", "HEAD")
    top, commit = (found.splitlines() + ["", ""])[:2] if found else ("", "")
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


def _devices(ranks: Ranks) -> list[str]:
    if ranks.device.type != "cuda":
        return [f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"]
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in found]
