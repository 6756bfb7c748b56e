"""What each cell of the GPU check measures. A function takes the name of the cell, and returns plain values.

The same functions run on a CPU, at a smaller scale; what only a GPU has is None there.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vae_ds import authoring, distributed, evaluation, latents
from vae_ds import config as configuration
from vae_ds.bench import profiles
from vae_ds.bench.gpu import copies, runs
from vae_ds.bench.gpu.cells import REFERENCE, TOLERANCES, Cell, difference
from vae_ds.config import RunConfig
from vae_ds.data import from_texts
from vae_ds.distributed import Ranks
from vae_ds.model import T5VAE, load_tokenizer

Values = dict[str, Any]
SPEEDS = ("tokens_per_s", "positions_per_s", "tflops", "mfu", "padding")
METRICS = ("rec", "kl", "iw_nll")
TEXTS = 16
LONGEST = (128, 32)  # tokens of a sentence and sentences of a micro batch for the peak of memory
WATCHED = 2  # the last steps, when kernels and buffers are ready


@dataclass(frozen=True)
class Place:
    """Where the cells of a process work: a directory of their own, and the scale of their trainings."""

    folder: Path
    scale: runs.Scale

    @cached_property
    def recipe(self) -> Path:
        """The recipe of the loss curves."""
        return runs.curve_recipe(self.folder, self.scale)

    def run(self, name: str) -> Path:
        """The run directory of a training."""
        return self.folder / "runs" / name


def measure(cell: Cell, place: Place) -> Values:
    """Measure one cell. Frees the memory of the GPU that it has used."""
    try:
        return _of(cell.part)(cell.name, place)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _of(part: str) -> Callable[[str, Place], Values]:
    if part.startswith("curves-") or part == REFERENCE:
        return curve
    return {"speed": speed, "waits": waits, "memory": memory, "resume": resume, "evaluation": evaluate}[part]


def curve(name: str, place: Place) -> Values:
    """The loss of each step of both phases, and what the last validation says."""
    ds_config = name.split()[0]
    rows = runs.train(place.recipe, place.run("curve"), *_engine(ds_config))
    return {
        "losses": runs.losses(rows),
        "steps": len(rows),
        "skipped_steps": runs.skipped_steps(rows),
        "grad_norms": [row["grad_norm"] for row in rows],
    }


def resume(name: str, place: Place) -> Values:
    """An undisturbed run, and one that is stopped in the second phase and resumed at another stage."""
    precision, before, _, after = name.split()
    whole = runs.train(place.recipe, place.run("whole"), f"precision={precision}", f"deepspeed={before}")
    first, second = place.scale.steps
    run = place.run("stopped")
    stop = first + second // 2
    runs.train_stopped(place.recipe, run, stop, f"precision={precision}", f"deepspeed={before}")
    rows = runs.train(place.recipe, run, f"precision={precision}", f"deepspeed={after}", is_new=False)
    return {
        "difference": difference(runs.losses(rows), runs.losses(whole)),
        "tolerance": TOLERANCES[precision],
        "stopped_after": stop,
        "steps": len(rows),
        "skipped_steps": runs.skipped_steps(rows),
    }


def evaluate(name: str, place: Place) -> Values:
    """Metrics, or greedy texts, of a trained model on the device and on the CPU, both in float32."""
    run = place.run("evaluated")
    if not (run / "model" / "config.json").is_file():
        runs.train(place.recipe, run, "precision=fp32", "deepspeed=zero1")
    texts = profiles.texts("snli", place.scale.sentences, 2)
    both = distributed.start(), Ranks(0, 0, 1, torch.device("cpu"))
    return _texts(run, texts, both) if name == "texts" else _metrics(run, texts, both, place)


def _texts(run: Path, texts: list[str], both: tuple[Ranks, Ranks]) -> Values:
    model, tokenizer = T5VAE.from_pretrained(run), load_tokenizer(str(run / "model"))
    one, other = (
        latents.reconstruct(model.to(ranks.device), tokenizer, texts[:TEXTS], max_new_tokens=32) for ranks in both
    )
    return {"texts": len(one), "equal_texts": sum(map(str.__eq__, one, other))}


def _metrics(run: Path, texts: list[str], both: tuple[Ranks, Ranks], place: Place) -> Values:
    model, tokenizer = T5VAE.from_pretrained(run), load_tokenizer(str(run / "model"))
    settings = configuration.load(RunConfig, str(place.recipe)).evaluation
    tokens = from_texts(texts, tokenizer, 48)
    one, other = (
        evaluation.evaluate(
            model.to(ranks.device), tokens, ranks, settings, seed=0, pad_id=tokenizer.pad_token_id
        ).metrics
        for ranks in both
    )
    # Everything of `vae-ds evaluate`, with the metrics of texts.
    whole = evaluation.finished_run.evaluate_run(run, "test", {}) or {}
    values = {key: one[key] for key in METRICS}
    found, expected = ([metrics[key] for key in METRICS] for metrics in (one, other))
    tolerance = TOLERANCES["fp32"]
    return {"difference": difference(found, expected), "tolerance": tolerance, **values, "bleu": whole.get("bleu")}


def waits(name: str, place: Place) -> Values:
    """Copies between host and device and waits for the device in a step, outside of the engine's own step."""
    # Only the first step of a row of the log is timed in parts, which waits.
    settings = [*_engine(name), "logging.every=1000"]
    with copies.watched_steps() as steps:
        runs.train_some(place.recipe, place.run("waits"), sum(place.scale.steps) // 2 + 1, *settings)
    last = steps[-WATCHED:]
    outside = sum((step.found for step in last), Counter[copies.Copy]())
    of_engine = sum((step.of_engine for step in last), Counter[copies.Copy]())
    waited = sum((step.waits for step in last), Counter[str]())
    sent = {copy: n for copy, n in outside.items() if copy.direction == copies.TO_DEVICE}
    has_gpu = torch.cuda.is_available()
    return {
        "to_host": copies.count(outside, copies.TO_HOST) / len(last),
        "to_host_engine": sum(n for copy, n in of_engine.items() if copy.direction == copies.TO_HOST) / len(last),
        "to_device": sum(sent.values()) / len(last),
        "to_device_without_waiting": sum(n for copy, n in sent.items() if copy.is_async) / len(last),
        "waits": waited.total() / len(last) if has_gpu else None,
        "waits_at": dict(waited) if has_gpu else None,
        "copies_at": copies.lines(outside + of_engine),
    }


def memory(name: str, place: Place) -> Values:
    """The peak of a step with sentences of the greatest length, beside what `vae-ds plan` expects."""
    shape, ds_config = name.split()
    longest, sentences = LONGEST if torch.cuda.is_available() else (32, 4)
    texts = profiles.longest_texts(longest, 2 * place.scale.shaped_sentences)
    recipe = runs.shaped_recipe(place.folder, place.scale, shape, texts, longest, sentences)
    peaks: list[int] = []

    @contextmanager
    def around() -> Iterator[None]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        yield
        if torch.cuda.is_available():
            peaks.append(torch.cuda.max_memory_allocated())

    with copies.around_steps(around):
        runs.train_some(recipe, place.run("memory"), 3, *_engine(ds_config))
    config = configuration.load(RunConfig, str(recipe), _engine(ds_config))
    (need,) = authoring.needs(config, config.precision, 1, sentences)
    expected = need.states_bytes + need.activations_bytes
    return {
        "parameters": need.parameters,
        "sentences": sentences,
        "tokens": longest,
        "plan_gb": expected / 1e9,
        "peak_gb": max(peaks) / 1e9 if peaks else None,
        "ratio": max(peaks) / expected if peaks else None,
    }


def speed(name: str, place: Place) -> Values:
    """The median speed over some rows of the log, without the first row."""
    shape, profile, precision = name.split()
    scale = place.scale
    steps = scale.rows * scale.every
    texts = profiles.texts(profile, scale.shaped_sentences * steps)
    longest = profiles.PROFILES[profile].max_tokens
    recipe = runs.shaped_recipe(place.folder, scale, shape, texts, longest, "auto")
    rows = runs.train_some(recipe, place.run("speed"), steps, f"precision={precision}", "deepspeed=zero1")[1:]
    shares = [key for key in rows[0] if key.startswith("share_")]
    values: Values = {key: median(row[key] for row in rows) for key in (*SPEEDS, *shares) if key in rows[0]}
    return values | {"sentences": scale.shaped_sentences, "steps": steps, "peak_gb": rows[-1]["peak_memory_gb"]}


def _engine(ds_config: str) -> list[str]:
    return [f"deepspeed={ds_config}", f"precision={ds_config.split('_')[1]}"]
