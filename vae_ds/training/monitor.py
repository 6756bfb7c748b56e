"""What a run tells about itself: rows of metrics, TensorBoard curves, a progress bar, its status, its environment.

Rank 0 alone writes; a Monitor on another rank does nothing. A step is a global APPLIED optimizer step, counted over
all phases: the x axis of each curve and the `step` of each row.

Files of a run directory written here:

- `metrics.jsonl`: one JSON object a logging step. `evaluations.jsonl`: one a validation. `checkpoints.jsonl`: one a
  checkpoint.
- `tensorboard/`: one directory a run. A resumed run cuts the points past its checkpoint and adds an event file, so
  its curves go on. TensorBoard's own purge mark is not enough: its default (Rust) loader does not know it.
- `status.json`: running, stopped, failed or done. `environment.json`: versions, commit, devices.

All JSON is strict: a number that is not finite is null (TensorBoard shows it as it is).
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vae_ds.runtime import records

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from vae_ds.distributed import Ranks

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
        # TensorBoard takes a run's first session mark for its beginning and purges at the later ones only, so a run
        # needs a mark from its first file on.
        self._purge_step = 0
        self._writer: SummaryWriter | None = None
        self._metrics: TextIO | None = None
        self._progress: _Bar | _Lines | None = None
        if progress and self._active:
            self._progress = _Bar() if sys.stderr.isatty() else _Lines()

    def resume_from(self, step: int) -> None:
        """Forget all that was recorded after the checkpoint of global step `step`; 0 forgets the whole run.

        Rows and curves past it are cut, and so is a last row that a crash left unfinished. Safe to call where nothing
        was recorded yet.
        """
        if not self._active:
            return
        if self._metrics is not None or self._writer is not None:
            raise RuntimeError("resume_from comes before the first row")
        last_step = step if step > 0 else -1
        for name in ("metrics.jsonl", "evaluations.jsonl", "checkpoints.jsonl"):
            _cut_rows(self._run_dir / name, last_step)
        if self._tensorboard:
            for path in (self._run_dir / "tensorboard").glob("*tfevents*"):
                _cut_points(path, last_step)
        # The files are right for a server that starts now; the mark reaches one that has read the cut points already.
        self._purge_step = last_step + 1

    def begin_phase(self, name: str, total_steps: int, done: int = 0) -> None:
        """A phase of `total_steps` applied steps begins, or goes on after `done` of them."""
        if self._progress:
            self._progress.begin(name, total_steps, done)

    def log(self, row: Mapping[str, Any]) -> None:
        """Record one logging step.

        `row` needs `step`, the global applied step; the method's symbols name the rest: `rec`, raw `kl`, `kl_weighted`
        and `loss` in nats per sentence, `beta`, `lr`, `grad_norm`, `tokens_per_s`, `padding` and so on. It is on the
        disk before this returns. Each number of it becomes the curve `train/<key>`, and `train/nelbo` is rec + kl.
        """
        if not self._active:
            return
        values = records.unpacked(row)
        step = int(values["step"])
        if self._metrics is None:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._metrics = (self._run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(records.strict_json(values) + "\n")
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

        `metrics` has the README's metrics as keys (nats per sentence; null where the model has none), `kl_per_dim` the
        mean KL of each of the L units in nats, `reconstructions` pairs (source, reconstruction), `samples` texts
        decoded from prior draws. TensorBoard gets them as `<split>/<key>`, a histogram and texts; what the model wrote
        is in samples/, too. A `verdict` with its `verdict_reason` is a text of its own, and ends the line of progress.
        """
        if not self._active:
            return
        values = records.unpacked(metrics)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        with (self._run_dir / "evaluations.jsonl").open("a", encoding="utf-8") as rows:
            rows.write(records.strict_json({"step": step, "split": split, **values}) + "\n")
        if self._progress:
            terms = _terms(values, ("nelbo", "rec", "kl", "mi", "au", "z_gain"))
            verdict = f"  {values['verdict']}" if values.get("verdict") else ""
            self._progress.say(f"{split} at step {step}: {terms}{verdict}")
        tables = _text_tables(reconstructions, samples)
        if tables:
            sections = "\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items())
            records.replace_file(self._run_dir / "samples" / f"{split}-step-{step:08d}.md", f"{sections}\n".encode())
        writer = self._open_writer()
        if writer is None:
            return
        for key, value in values.items():
            if _is_number(value) and key not in SIZES:
                writer.add_scalar(f"{split}/{key}", value, step)
        units = [float(kl) for kl in records.unpacked(kl_per_dim) or () if math.isfinite(kl)]
        if units:
            import numpy as np

            writer.add_histogram(f"{split}/kl_per_dim", np.asarray(units), step)
        if values.get("verdict"):
            told = f"**{values['verdict']}**: {_escape(values.get('verdict_reason') or '')}"
            writer.add_text(f"{split}/verdict", told, step)
        for name, table in tables.items():
            writer.add_text(f"{split}/{name}", table, step)
        writer.flush()

    def checkpoint(self, step: int, *, size_bytes: int, stall_s: float, write_s: float) -> None:
        """Record a checkpoint of global step `step`: how long the training waited for it, and how long it was written.

        A row of `checkpoints.jsonl`, curves `checkpoint/<key>`, and a line beside the progress.
        """
        if not self._active:
            return
        values = {"size_bytes": size_bytes, "stall_s": stall_s, "write_s": write_s}
        with (self._run_dir / "checkpoints.jsonl").open("a", encoding="utf-8") as rows:
            rows.write(records.strict_json({"step": step, **values}) + "\n")
        if self._progress:
            told = f"{size_bytes / 1e6:.1f} MB, written in {write_s:.2f} s, training waited {stall_s:.2f} s"
            self._progress.say(f"checkpoint at step {step}: {told}")
        writer = self._open_writer()
        if writer is not None:
            for key, value in values.items():
                writer.add_scalar(f"checkpoint/{key}", value, step)

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


def _cut_rows(path: Path, last_step: int) -> None:
    if path.exists():
        kept = [row for row in path.read_bytes().split(b"\n") if 0 <= _step_of(row) <= last_step]
        records.replace_file(path, b"".join(row + b"\n" for row in kept))


def _step_of(row: bytes) -> int:
    """The step of a row of JSON lines; -1 if the row is not whole."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


def _cut_points(path: Path, last_step: int) -> None:
    """Take the points past `last_step` out of a TensorBoard event file, and a record that a crash left unfinished.

    A record is its length (8 bytes, little endian), a checksum (4), an Event message and its checksum (4).
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    content = path.read_bytes()
    kept = []
    begin = 0
    while begin + 12 <= len(content):
        end = begin + 12 + int.from_bytes(content[begin : begin + 8], "little") + 4
        try:
            event = Event.FromString(content[begin + 12 : end - 4])
        except DecodeError:
            break
        if end <= len(content) and (event.step <= last_step or not event.HasField("summary")):
            kept.append(content[begin:end])
        begin = end
    records.replace_file(path, b"".join(kept))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _terms(row: Mapping[str, Any], keys: Iterable[str] = ("rec", "kl", "beta", "tokens_per_s")) -> str:
    shown = [(key, row[key]) for key in keys if _is_number(row.get(key))]
    return "  ".join(f"{v:,.0f} tokens/s" if k == "tokens_per_s" else f"{k} {v:.4g}" for k, v in shown)


def _text_tables(reconstructions: Iterable[tuple[str, str]], samples: Iterable[str]) -> dict[str, str]:
    """Markdown tables by name, of what is there."""
    tables: dict[str, str] = {}
    if pairs := list(reconstructions):
        tables["reconstructions"] = _markdown_table(("source", "reconstruction"), pairs)
    if texts := [(text,) for text in samples]:
        tables["prior_samples"] = _markdown_table(("sample",), texts)
    return tables


def _markdown_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *(tuple(_escape(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """Text as one table cell that Markdown and HTML leave as it is."""
    return re.sub(r"[^\w\s,;'\"?/=$%^@]|_", lambda mark: f"&#{ord(mark[0])};", " ".join(text.split()))
