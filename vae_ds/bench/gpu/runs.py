"""The trainings that the GPU check measures: short recipes on texts of random words, and their loss curves."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_ds import training
from vae_ds.bench import profiles
from vae_ds.bench.gpu.copies import around_steps
from vae_ds.errors import Stopped
from vae_ds.runtime import records

# A step has several micro batches. The training text is one global batch: after a skipped step, the next one has the
# same sentences, so that the curves still compare.
CURVE = """
name: gpu-check
seed: 0
model: {{base: tiny, latent_dim: 32, pooling: max}}
data: {{corpus: text, path: {text}, max_tokens: 48, cache_dir: {cache}}}
batch: {{global: {sentences}, micro: {micro}}}
phases:
  - name: warmup
    steps: {first}
    freeze: [decoder, embeddings]
    beta: {{schedule: constant, value: 0}}
    denoise: 0.15
    optimizer: {{lr: 1.0e-3, clip: 100}}
    learning_rate: {{schedule: constant, warmup_steps: 2}}
  - name: full
    steps: {second}
    beta: {{schedule: constant, value: 0.5}}
    free_bits: {{mode: per_dim_batch, nats: 0.3}}
    optimizer: {{lr: 1.0e-3, clip: 100}}
    learning_rate: {{schedule: constant, warmup_steps: 2}}
validation: {{every_steps: 1000, sentences: 32}}
checkpoint: {{every_steps: 1000, keep: 1}}
evaluation: {{iw_samples: 8, iw_sentences: 16, mi_train_sentences: 32, bleu_sentences: 8, samples: 8}}
logging: {{every: 1, tensorboard: false, progress: false}}
export: last
"""
# Of one shape at one profile. Its steps are stopped when enough of them are measured.
SHAPED = """
name: gpu-check
seed: 0
model: {{base: {base}, latent_dim: 32, pooling: max}}
data: {{corpus: text, path: {text}, max_tokens: {max_tokens}, cache_dir: {cache}}}
batch: {{global: {sentences}, micro: {micro}}}
phases:
  - {{name: full, steps: 1000, beta: {{schedule: constant, value: 1}}, optimizer: {{lr: 1.0e-4}}}}
validation: {{every_steps: 1000, sentences: 2}}
checkpoint: {{every_steps: 1000, keep: 1}}
logging: {{every: {every}, tensorboard: false, progress: false}}
export: last
"""


@dataclass(frozen=True)
class Scale:
    """The sizes of the trainings on a GPU, or on a CPU (`small`), where the same code runs in a minute."""

    sentences: int  # of a step of the curves
    micro: int
    steps: tuple[int, int]  # of the phases of the curves
    shaped_sentences: int
    rows: int  # of the log at one shape; the first one is not counted
    every: int  # steps of a row


SCALES = {"gpu": Scale(64, 24, (8, 12), 128, 4, 3), "cpu": Scale(12, 6, (1, 2), 6, 3, 1)}


class _Enough(Exception):  # noqa: N818 - the measured steps are over
    pass


def curve_recipe(folder: Path, scale: Scale) -> Path:
    """The recipe of the loss curves, with its text, in `folder`."""
    text = _splits(folder / "text", [profiles.texts("snli", scale.sentences, seed) for seed in range(3)])
    first, second = scale.steps
    return _write(
        folder / "curve.yaml", CURVE, text=text, cache=folder / "cache", sentences=scale.sentences, micro=scale.micro,
        first=first, second=second,
    )  # fmt: skip


def shaped_recipe(folder: Path, scale: Scale, shape: str, texts: Sequence[str], max_tokens: int, micro: Any) -> Path:
    """The recipe of one shape on these texts. The base is written once per `folder`."""
    base = folder / shape
    if not (base / "config.json").is_file():
        profiles.random_base(base, shape)
    few = texts[:4]
    text = _splits(folder / "shaped-text", [texts, few, few])
    return _write(
        folder / "shaped.yaml", SHAPED, base=base, text=text, cache=folder / "cache", max_tokens=max_tokens,
        sentences=scale.shaped_sentences, micro=micro, every=scale.every,
    )  # fmt: skip


def train(recipe: Path, run: Path, *settings: str, is_new: bool = True) -> list[dict[str, Any]]:
    """Train, and return the rows of the log. `is_new` removes what an earlier call has left in `run`."""
    if is_new:
        shutil.rmtree(run, ignore_errors=True)
    training.train(str(recipe), run, settings)
    return rows_of(run)


def train_some(recipe: Path, run: Path, steps: int, *settings: str) -> list[dict[str, Any]]:
    """Train `steps` steps and leave: no validation, no checkpoint, no export. Returns the rows of the log."""
    shutil.rmtree(run, ignore_errors=True)
    left = iter(range(steps))

    @contextmanager
    def counted() -> Iterator[None]:
        if next(left, None) is None:
            raise _Enough
        yield

    with around_steps(counted):
        try:
            training.train(str(recipe), run, settings)
        except _Enough:
            return rows_of(run)
    raise RuntimeError(f"the run ended before {steps} steps")


def train_stopped(recipe: Path, run: Path, steps: int, *settings: str) -> None:
    """Train until a signal in the step number `steps` of the run, after which it saves and stops."""
    shutil.rmtree(run, ignore_errors=True)
    left = iter(range(steps - 1))

    def around() -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return nullcontext()

    with around_steps(around):
        try:
            training.train(str(recipe), run, settings)
        except Stopped:
            return
    raise RuntimeError("the run ended although it was stopped")


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of the log of a run."""
    return records.read_rows(run / "metrics.jsonl")


def losses(rows: Sequence[dict[str, Any]]) -> list[float]:
    """The loss of each step, nats per sentence."""
    return [row["loss"] for row in rows]


def skipped_steps(rows: Sequence[dict[str, Any]]) -> int:
    """The steps that were skipped in all phases: each row has the number of its phase so far."""
    phases = {row["phase"]: row["skipped_steps"] for row in rows}
    return int(sum(phases.values()))


def _splits(folder: Path, texts: Sequence[Sequence[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in zip(("train", "valid", "test"), texts, strict=True):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _write(file: Path, template: str, **values: Any) -> Path:
    quoted: dict[str, Callable[[Any], str] | Any] = {
        key: json.dumps(str(value)) if isinstance(value, Path) else value for key, value in values.items()
    }
    file.write_text(template.format(**quoted), encoding="utf-8")
    return file
