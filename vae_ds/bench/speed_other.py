"""The measures of `vae-ds bench speed` besides training steps: estimates, evaluation, padding, start."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from vae_ds import distributed
from vae_ds.bench.contest import Contestant, Here, Tick, alternate, middle, ratio
from vae_ds.bench.contestants import ours, recipe
from vae_ds.bench.profiles import PROFILES, lengths, texts
from vae_ds.bench.speed_rows import Place, Row, row_of
from vae_ds.config import EvaluationConfig
from vae_ds.data import TokenSet, collate, epoch_batches, from_texts, limits_of, share
from vae_ds.errors import Failed
from vae_ds.evaluation import evaluate, log_likelihoods
from vae_ds.model import T5VAE, gaussian, load_tokenizer

GLOBAL_BATCHES = (64, 128, 256, 512)
WORLDS = (1, 8)  # numbers of ranks, of padding and balance
SENTENCES = 40_000  # about a corpus like PTB
IMPORTS = "import torch, deepspeed"


def iw(place: Place) -> list[Row]:
    """Sentences per second of the importance-weighted likelihood against a loop over sentences and samples."""
    rows = []
    samples = 4 if place.is_quick else 500
    for shape in ("shipped", place.shape):
        spec = place.spec("ours", "ptb", batch=8, shape=shape)
        config = recipe(spec)
        model, tokenizer = T5VAE.from_base(config.model, config.seed), load_tokenizer(config.model.base)
        tokens = from_texts(texts("ptb", 4, 3), tokenizer, spec["max_tokens"])
        settings = EvaluationConfig(iw_samples=samples, iw_sentences=None)
        arguments = (model, tokens, settings, tokenizer.pad_token_id)
        with _one_thread(), Here({"ours": _iw_ours(*arguments), "naive": _iw_naive(*arguments)}) as here:
            rounds = 1 if place.is_quick else 3
            found = alternate({"ours": here, "naive": here}, {"ours": 1, "naive": 1}, rounds, warm=0)
        # A step of the loop is one of the sentences, so it has another mean length.
        faster = ratio(found["naive"], found["ours"], lambda one: one.seconds / one.tokens)
        facts = {
            f"{name}_ms_per_token": middle([1e3 * r.seconds / r.tokens for r in found[name]]).value for name in found
        }
        case = f"K = {samples}, {shape} T5, one thread"
        rows.append(row_of("iw", case, "times the speed", faster, (5.0, None), **facts))
        if place.is_quick:
            break
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _iw_ours(model: T5VAE, tokens: TokenSet, settings: EvaluationConfig, pad_id: int) -> Contestant:
    ranks = distributed.start()
    while True:
        began_s = time.perf_counter()
        log_likelihoods(model, tokens, ranks, settings, seed=0, pad_id=pad_id, is_shown=False)
        yield Tick(time.perf_counter() - began_s, len(tokens), float(tokens.target_tokens))


@torch.no_grad()
def _iw_naive(model: T5VAE, tokens: TokenSet, settings: EvaluationConfig, pad_id: int) -> Contestant:
    """Sentence by sentence, and for each sample once through the encoder and the decoder. One sentence per step."""
    for index in (number % len(tokens) for number in range(1_000_000)):
        batch = collate(
            tokens, np.array([index]), pad_id=pad_id, latent_dim=model.latent_dim, seed=0, keys=(), eval=True
        )
        began_s = time.perf_counter()
        weights = []
        for _ in range(settings.iw_samples):
            mu_BL, logvar_BL = model.encode(batch.input_ids_BT, batch.attention_mask_BT)
            z_BL = gaussian.sample(mu_BL, logvar_BL, torch.randn_like(mu_BL))
            log_p = -model.reconstruction(z_BL, batch.labels_BT) + gaussian.log_prior(z_BL)
            weights.append(log_p - gaussian.log_density(z_BL, mu_BL, logvar_BL))
        torch.logsumexp(torch.cat(weights), 0)
        yield Tick(time.perf_counter() - began_s, 1, float(batch.tokens))


def evaluation(place: Place) -> list[Row]:
    """The time of an evaluation of a split, to that of one training epoch of the same sentences."""
    count = 64 if place.is_quick else 10_000
    spec = place.spec("ours", "ptb", batch=64, shape="shipped")
    config = recipe(spec)
    model, tokenizer = T5VAE.from_base(config.model, config.seed), load_tokenizer(config.model.base)
    tokens = from_texts(texts("ptb", count, 4), tokenizer, spec["max_tokens"])
    ranks = distributed.start()
    with _one_thread():
        contestant = ours(spec)
        next(contestant)
        steps = [next(contestant).seconds for _ in range(1 if place.is_quick else 20)]
        began_s = time.perf_counter()
        evaluate(model, tokens, ranks, config.evaluation, seed=0, pad_id=tokenizer.pad_token_id, full=False, beta=1.0)
        took_s = time.perf_counter() - began_s
    epoch_s = count / spec["batch"] * sum(steps) / len(steps)
    facts = {"evaluation_s": took_s, "epoch_s": epoch_s, "sentences": count}
    case = f"{count:,} sentences: rec, kl, z_gain, mi, au; shipped tiny T5, one thread"
    return [Row("evaluation", case, "training epochs", took_s / epoch_s, pairs=1, goal=(None, 1.0), facts=facts)]


def padding(place: Place) -> list[Row]:
    """Positions that are padding, the balance of the ranks, and whether an epoch favours sentences of some length."""
    rows = []
    count = 2_000 if place.is_quick else SENTENCES
    for profile in PROFILES:
        config = recipe(place.spec("ours", profile, batch=64))
        lengths_N = lengths(profile, count)
        for world in WORLDS:
            padded, behind = {}, {}
            for size in GLOBAL_BATCHES:
                batch = config.batch.model_copy(update={"global_size": size})
                order_SG = epoch_batches(lengths_N, size, batch.bucket_batches, 0, 0, 0)
                limits = limits_of(batch, world, PROFILES[profile].max_tokens)
                padded[str(size)], behind[str(size)] = _cut(order_SG, lengths_N, limits, world)
            where = f"lengths of {profile}, ranks: {world}, worst of global batches of 64 to 512"
            rows.append(_counted_row(f"padding, {where}", padded, 3.0))
            if world > 1:
                rows.append(_counted_row(f"slowest rank above the mean of a step, {where}", behind, 3.0))
        bias = _bias(lengths_N, config.batch.bucket_batches)
        case = (
            f"lengths of {profile}: mean length of the kept sentences and correlation of length and place in an epoch"
        )
        rows.append(Row("padding", case, "% off", bias, goal=(None, 1.0)))
    return rows


def _counted_row(case: str, found: Mapping[str, float], most: float) -> Row:
    """The largest of some counted values. They are exact, so there are no pairs."""
    return Row("padding", case, "% of positions", max(found.values()), goal=(None, most), facts=found)


def _cut(order_SG: np.ndarray, lengths_N: np.ndarray, limits: Any, world: int) -> tuple[float, float]:
    """% of padding, and by how many % the rank with most positions in a step is above the mean, over the epoch."""
    real = positions = most = 0
    for index_G in order_SG:
        of_rank = []
        for rank in range(world):
            pieces = share(index_G, lengths_N, rank, world, limits)
            of_rank.append(sum(len(index_B) * int(lengths_N[index_B].max()) for index_B, _ in pieces))
        real += int(lengths_N[index_G].sum())
        positions += sum(of_rank)
        most += world * max(of_rank)
    return 100 * (1 - real / positions), 100 * (most / positions - 1)


def _bias(lengths_N: np.ndarray, buckets: int) -> float:
    """Over 20 epochs: the larger of |mean length of the sentences that are not dropped - mean| and |correlation|, %."""
    means, correlations = [], []
    for epoch in range(20):
        order_SG = epoch_batches(lengths_N, 64, buckets, 0, 0, epoch)
        mean_S = lengths_N[order_SG].mean(1)
        means.append(mean_S.mean() / lengths_N.mean() - 1)
        correlations.append(np.corrcoef(mean_S, np.arange(len(mean_S)))[0, 1])
    return 100 * max(abs(float(np.mean(means))), abs(float(np.mean(correlations))))


def start(place: Place) -> list[Row]:
    """CPU seconds from the start of a process to its first step, and what a longer text costs."""
    names = {"first step": "the shipped tiny T5, CPU", "lines": "a longer text"}
    if place.is_quick:
        return [Row("start", case, "", reason="not in the quick size") for case in names.values()]
    spec = place.spec("ours", "ptb", batch=64, shape="shipped")
    _first_step(spec)  # fills the caches of token ids and of compiled Python
    imports, steps = [], []
    for _ in range(3):
        imports.append(_cpu_s([sys.executable, "-c", IMPORTS])[0])
        steps.append(_first_step(spec)[0])
    value = middle([step / alone for step, alone in zip(steps, imports, strict=True)])
    facts: dict[str, Any] = {"cpu_s": median(steps), "imports_cpu_s": median(imports)}
    rows = [row_of("start", "first step, " + names["first step"], "times the imports", value, (None, 2.0), **facts)]
    counts = [10**power for power in range(4, 9) if 10**power <= place.lines]
    spent, peaks = {}, {}
    for count in counts:
        data = _long_text(place, count)
        fresh = spec | {"data": str(data), "run_dir": str(place.folder / f"lines-{count}")}
        spent[count], peaks[count] = _first_step(fresh)
    most, least = counts[-1], counts[0]
    per_line = {count: (spent[count] - median(steps)) / count * 1e6 for count in counts}
    facts = {f"cpu_us_per_line_{count}": round(per_line[count], 1) for count in counts}
    facts |= {f"peak_mb_{count}": round(peaks[count]) for count in counts}
    linear = per_line[most] / max(per_line[counts[-2]], 1e-9) if len(counts) > 1 else 1.0
    rows.append(
        Row("start", f"{most:,} lines", "times the cost per line", linear, pairs=1, goal=(None, 1.1), facts=facts)
    )
    grown = (peaks[most] - peaks[least]) / (most - least) * 1e6
    rows.append(Row("start", f"{most:,} lines", "bytes of memory per line", grown, pairs=1, goal=(None, 16.0)))
    return rows


def _long_text(place: Place, count: int) -> Path:
    folder = place.text("snli", 10_000)
    longer = place.folder / "text" / f"lines-{count}"
    longer.mkdir(parents=True, exist_ok=True)
    lines = (folder / "train.txt").read_bytes()
    with (longer / "train.txt").open("wb") as out:
        for _ in range(count // 10_000):
            out.write(lines)
    for split in ("valid.txt", "test.txt"):
        (longer / split).write_bytes((folder / split).read_bytes())
    return longer


FIRST_STEP = """
import json, os, sys, threading
from vae_ds.bench.contestants import ours
from vae_ds.bench.memory_rank import anonymous_bytes

peak, is_over = [0], threading.Event()

def watch():
    while not is_over.wait(0.02):
        peak[0] = max(peak[0], anonymous_bytes())

threading.Thread(target=watch, daemon=True).start()
next(ours(json.loads(sys.argv[1])))
is_over.set()
print(peak[0], flush=True)
os._exit(0)
"""


def _first_step(spec: Mapping[str, Any]) -> tuple[float, float]:
    """CPU seconds and largest anonymous memory in MB of a process that trains one step. Mapped files do not count."""
    spent_s, told = _cpu_s([sys.executable, "-c", FIRST_STEP, json.dumps(spec)])
    return spent_s, int(told.splitlines()[-1]) / 1e6


def _cpu_s(command: Sequence[str]) -> tuple[float, str]:
    """CPU seconds and output of a command, which is no rank of this process's group. Raises Failed if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in distributed.VARIABLES}
    with tempfile.TemporaryFile() as faults, tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=faults)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        faults.seek(0)
        if child.returncode:
            told = faults.read().decode(errors="replace").strip()[-300:]
            raise Failed(f"a process of the measurement ended: {told}")
        return used.ru_utime + used.ru_stime, output.read().decode()
