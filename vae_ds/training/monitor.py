"""The records of a run: rows of metrics, TensorBoard events, samples, and its progress on standard error.

Rank 0 alone writes; a Monitor on another rank does nothing. A step is a global APPLIED optimizer step, counted over
all phases: the x axis of each curve and the `step` of each row.

Files of a run directory written here:

- `metrics.jsonl`: one JSON object per logging step. `evaluations.jsonl`: one per validation. `checkpoints.jsonl`: one
  per checkpoint. All JSON is strict: a number that is not finite is null (TensorBoard shows it as it is).
- `events.out.tfevents.*`: TensorBoard's event files, see `tensorboard.py`.
- `trackers/<name>.json`: the name of this run in a tracker, see `trackers.py`.
- `samples/<split>-step-<step>.txt`: reconstructions and prior samples of a validation, as plain text.

On resume, everything after the checkpoint is cut from the rows and from the event files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vae_ds.runtime import records
from vae_ds.training.display import Bar, Lines, is_number, terms_of
from vae_ds.training.tensorboard import Events, escape, table
from vae_ds.training.trackers import Trackers

if TYPE_CHECKING:
    from vae_ds.distributed import Ranks

ROWS = ("metrics.jsonl", "evaluations.jsonl", "checkpoints.jsonl")


class Monitor:
    """Records a run in `run_dir` and shows its progress.

    `tensorboard`, `progress` and `trackers` are those of the recipe's `logging`. What is off is not even imported. The
    progress bar needs a terminal on standard error; elsewhere plain lines are printed there.
    Order of calls: `resume_from` at most once, before anything is logged; `begin_run`; `begin_phase`; `log`, `advance`,
    `evaluation` and `checkpoint`; `end_run` if the run is complete; `close`.
    """

    def __init__(
        self,
        run_dir: str | Path,
        ranks: Ranks,
        tensorboard: bool = True,
        progress: bool = True,
        trackers: Sequence[str] = (),
    ) -> None:
        self._run_dir = Path(run_dir)
        self._active = ranks.is_main
        self._metrics: TextIO | None = None
        self._events = Events(self._run_dir) if tensorboard and self._active else None
        self._trackers = Trackers(trackers, self._run_dir) if trackers and self._active else None
        self._sent = dict.fromkeys(ROWS, -1)  # the last step that an earlier start of the run has sent to the trackers
        self._is_done = False
        self._progress: Bar | Lines | None = None
        if progress and self._active:
            self._progress = Bar() if sys.stderr.isatty() else Lines()

    def resume_from(self, step: int) -> None:
        """Cut everything that was recorded after the checkpoint of global step `step`; 0 cuts the whole run.

        Rows and curves past it are cut, and so is a last row that a crash left unfinished. It is safe to call this for
        a directory without records.
        """
        if not self._active:
            return
        if self._metrics is not None or (self._events and self._events.is_open):
            raise RuntimeError("call resume_from before anything is logged")
        last_step = step if step > 0 else -1
        for name in ROWS:
            self._sent[name] = _cut_rows(self._run_dir / name, last_step)
        if self._events:
            self._events.resume_after(last_step)

    def begin_run(self, recipe: Mapping[str, Any]) -> None:
        """Write the run's entry on TensorBoard's HParams page: the settings of `recipe`, a tree, that a study varies.

        Call it once per process, after `resume_from`. A resumed run replaces its entry.
        """
        if self._events:
            self._events.begin_run(recipe)
        if self._trackers:
            self._trackers.begin_run(recipe)

    def end_run(self) -> None:
        """Mark the run as complete on TensorBoard's HParams page and, with `close`, in the trackers."""
        self._is_done = True
        if self._events:
            self._events.end_run()

    def begin_phase(self, name: str, total_steps: int, done: int = 0, facts: str = "") -> None:
        """Start the progress of a phase of `total_steps` applied steps, of which `done` are already done.

        `facts` is printed once, before the first step.
        """
        if self._progress:
            self._progress.begin(name, total_steps, done)
            if facts:
                self._progress.say(f"{name}: {facts}")

    def log(self, row: Mapping[str, Any]) -> None:
        """Record one logging step.

        `row` needs `step`, the global applied step. The other keys are the method's symbols: `rec`, raw `kl`,
        `kl_weighted` and `loss` in nats per sentence, `beta`, `lr`, `grad_norm`, `tokens_per_s`, `padding` and so on.
        The row is on the disk before this returns. Each number in it becomes a point of a curve with the tag
        `<group>/<key>/train`. The curve of `nelbo` is rec + kl if the row does not have it.
        """
        if not self._active:
            return
        values = records.unpacked(row)
        if self._metrics is None:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._metrics = (self._run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(records.strict_json(values) + "\n")
        self._metrics.flush()
        if self._progress:
            self._progress.show(values)
        if is_number(values.get("rec")) and is_number(values.get("kl")):
            values = {"nelbo": values["rec"] + values["kl"]} | values
        self._track("metrics.jsonl", values, "train", int(values["step"]))
        if self._events:
            self._events.scalars(values, "train", int(values["step"]))
            # If the process died after the next checkpoint and before a later flush, the curve would keep a gap.
            self._events.flush()

    def advance(self, steps: int = 1) -> None:
        """Advance the progress of the phase by `steps` applied steps."""
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

        `metrics` has the keys of docs/metrics.md (nats per sentence; null where the model has none). `kl_per_dim` is
        the mean KL of each of the L units in nats, `reconstructions` are pairs (source, reconstruction), and `samples`
        are texts decoded from prior draws. TensorBoard gets curves `<group>/<key>/<split>`, a histogram, and texts
        `<split>/<name>`. The texts are also written to samples/. A `verdict` with its `verdict_reason` and the `cost`
        is a text too. The verdict ends the line of progress, with the cost if there is a yardstick.
        """
        if not self._active:
            return
        values = records.unpacked(metrics)
        pairs, texts = list(reconstructions), list(samples)
        _append(self._run_dir / "evaluations.jsonl", {"step": step, "split": split, **values})
        if self._progress:
            terms = terms_of(values, ("nelbo", "rec", "kl", "mi", "au", "z_gain"))
            verdict = f"  {values['verdict']}" if values.get("verdict") else ""
            cost = f", {values['cost']}" if values.get("nelbo_above_yardstick") is not None else ""
            self._progress.say(f"{split} at step {step}: {terms}{verdict}{cost}")
        if pairs or texts:
            path = self._run_dir / "samples" / f"{split}-step-{step:08d}.txt"
            records.replace_file(path, _plain(f"{split}, step {step}", pairs, texts).encode())
        self._track("evaluations.jsonl", values, split, step)
        if self._events is None:
            return
        self._events.scalars(values, split, step)
        self._events.histogram("kl_per_dim", records.unpacked(kl_per_dim) or (), split, step)
        if values.get("verdict"):
            reason, cost = escape(values.get("verdict_reason") or ""), escape(values.get("cost") or "")
            told = f"**{values['verdict']}**: {reason}" + (f"\n\ncost: {cost}" if cost else "")
            self._events.text("verdict", told, split, step)
        if pairs:
            self._events.text("reconstructions", table(("source", "reconstruction"), pairs), split, step)
        if texts:
            self._events.text("prior_samples", table(("sample",), ((text,) for text in texts)), split, step)
        self._events.flush()

    def checkpoint(self, step: int, *, size_bytes: int, copy_s: float, stall_s: float, write_s: float) -> None:
        """Record a checkpoint of global step `step`: how long training waited for it, and how long writing it took.

        `copy_s` is the part of `stall_s` until the state was copied; the rest is the wait for the disk. It becomes a
        row of `checkpoints.jsonl`, curves `8_checkpoint/<key>`, and a line of progress.
        """
        if not self._active:
            return
        values = {"size_bytes": size_bytes, "copy_s": copy_s, "stall_s": stall_s, "write_s": write_s}
        _append(self._run_dir / "checkpoints.jsonl", {"step": step, **values})
        if self._progress:
            cost = f"{size_bytes / 1e6:.1f} MB, written in {write_s:.2f} s, training waited {stall_s:.2f} s"
            self._progress.say(f"checkpoint at step {step}: {cost}")
        self._track("checkpoints.jsonl", values, None, step)
        if self._events:
            self._events.scalars(values, None, step)
            self._events.flush()

    def close(self) -> None:
        """Flush and close everything. A second call does nothing."""
        if self._progress:
            self._progress.close()
        if self._metrics:
            self._metrics.close()
            self._metrics = None
        if self._events:
            self._events.close()
        if self._trackers:
            self._trackers.close(self._is_done)
            self._trackers = None

    def _track(self, name: str, values: Mapping[str, Any], split: str | None, step: int) -> None:
        """Send points to the trackers, unless they have them: a resumed run makes the same steps again."""
        if self._trackers and step > self._sent[name]:
            self._trackers.scalars(values, split, step)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as rows:
        rows.write(records.strict_json(row) + "\n")


def _cut_rows(path: Path, last_step: int) -> int:
    """Returns the last step that the file had."""
    if not path.exists():
        return -1
    steps = [(_step_of(row), row) for row in path.read_bytes().split(b"\n")]
    records.replace_file(path, b"".join(row + b"\n" for step, row in steps if 0 <= step <= last_step))
    return max(step for step, _ in steps)


def _step_of(row: bytes) -> int:
    """The step of a row of JSON lines; -1 if the row is incomplete."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


def _plain(title: str, pairs: list[tuple[str, str]], texts: list[str]) -> str:
    """Reconstructions and samples as plain text, each sentence on one line."""
    parts = [title]
    if pairs:
        parts.append("RECONSTRUCTIONS")
        parts += [
            f"source:         {_line(source)}\nreconstruction: {_line(result)}".rstrip() for source, result in pairs
        ]
    if texts:
        parts += ["PRIOR SAMPLES", "\n".join(_line(text) for text in texts)]
    return "\n\n".join(parts) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())
