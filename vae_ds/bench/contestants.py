"""The contestants of `vae-ds bench speed`: this package, and what it is compared with, each as an iterator of steps.

- `ours`: the steps of `vae_ds.train`.
- `bare`: a plain PyTorch loop with the same model, batches and objective. Its batches are made before it starts. With
  `compile`, torch.compile compiles each block of both stacks.
- `published`: a plain loop that works as the code published with the paper does (docs/published-code.md): every
  sentence padded to 256 tokens, z as a prefix of the self-attention, whole logits, PyTorch's AdamW.
- `huggingface`: the Trainer of transformers with DeepSpeed on the stock T5, which learns to repeat its input.

All train the same sentences with dropout 0.1, in float32. Settings: `base` (a directory), `data` (a directory with
train.txt), `max_tokens`, `batch` (sentences), `phase` (0 or 1 of the recipe `ptb`), `stage` (of ZeRO), `run_dir`.
Shapes: B sentences, T tokens, L latent units.
"""

import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vae_ds import config as configuration
from vae_ds import distributed, engine
from vae_ds.bench.contest import Contestant, Tick
from vae_ds.config import RunConfig
from vae_ds.data import Batch, TokenSet, collate, epoch_batches, from_texts
from vae_ds.model import T5VAE, Operations, count_operations, extents, gaussian, load_tokenizer
from vae_ds.training import Steps, phases

PUBLISHED_TOKENS = 256
MATRIX_SIDE = 1024
PREPARED = 64  # batches that a plain loop makes before it starts: enough for its steps, so it trains on those of `ours`


def make(settings: Mapping[str, Any]) -> Contestant:
    """The contestant of the kind `settings["kind"]`. It is built when its first step is asked for."""
    kinds: dict[str, Callable[[Mapping[str, Any]], Contestant]] = {
        **{"ours": ours, "bare": bare, "published": published, "huggingface": huggingface, "matrix": matrix}
    }
    return kinds[settings["kind"]](settings)


def recipe(settings: Mapping[str, Any]) -> RunConfig:
    """The recipe `ptb` on the base, sentences and batch of the measurement."""
    overrides = [
        *(f"model.base={settings['base']}", "model.dropout=0.1", "data.corpus=text", f"data.path={settings['data']}"),
        *(f"data.max_tokens={settings['max_tokens']}", f"batch.global={settings['batch']}", "precision=fp32"),
        *(f"data.cache_dir={settings['run_dir']}/cache", f"deepspeed=zero{settings.get('stage', 1)}"),
        *settings.get("set", ()),
    ]
    return configuration.load(RunConfig, "ptb", overrides)


def ours(settings: Mapping[str, Any]) -> Contestant:
    """The package itself."""
    steps = Steps(recipe(settings), settings["phase"], Path(settings["run_dir"]))
    try:
        while True:
            step = steps.step()
            yield Tick(step.seconds, step.sentences, step.tokens, step.operations, step.shares)
    finally:
        steps.close()


def bare(settings: Mapping[str, Any]) -> Contestant:
    """The least that a training of this model can be."""
    config, batches = _prepared(settings)
    model = T5VAE.from_base(config.model, config.seed)
    operations = _freeze(model, config, settings["phase"])
    if settings.get("compile"):
        for block in (*model.t5.encoder.block, *model.t5.decoder.block):
            block.compile(dynamic=True)
    plan = config.phases[settings["phase"]]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, eps=1e-3, fused=True)
    for batch in itertools.cycle(batches):
        began_s = time.perf_counter()
        terms = model(**batch.arguments())
        loss_B = terms.rec_B + 0.1 * gaussian.thresholded_kl(terms.kl_BL, plan.free_bits.mode, plan.free_bits.nats)
        forward_s = time.perf_counter()
        loss_B.mean().backward()
        backward_s = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        yield _tick(batch, operations, began_s, forward_s, backward_s, time.perf_counter())


def matrix(settings: Mapping[str, Any]) -> Contestant:
    """Products of two large float32 matrices: the rate that a training cannot exceed. A step is ten of them."""
    one = torch.randn(MATRIX_SIDE, MATRIX_SIDE, generator=torch.Generator().manual_seed(0))
    while True:
        began_s = time.perf_counter()
        for _ in range(10):
            one @ one
        yield Tick(time.perf_counter() - began_s, 0, 0, 10 * 2.0 * MATRIX_SIDE**3)


def published(settings: Mapping[str, Any]) -> Contestant:
    """What the published code does in a step, without its faults that do not change what is computed."""
    config, batches = _prepared(settings)
    model_settings = config.model.model_copy(update={"injection": "self_attention"})
    model = T5VAE.from_base(model_settings, config.seed)
    operations = _freeze(model, config, settings["phase"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, eps=1e-3)
    width = settings.get("width", PUBLISHED_TOKENS)
    padded = [_padded(batch, width) for batch in batches]
    for batch in itertools.cycle(padded):
        began_s = time.perf_counter()
        loss = published_loss(model, batch)
        optimizer.zero_grad()
        forward_s = time.perf_counter()
        loss.backward()
        backward_s = time.perf_counter()
        optimizer.step()
        yield _tick(batch, operations, began_s, forward_s, backward_s, time.perf_counter())


def _tick(
    batch: Batch, operations: Operations, began_s: float, forward_s: float, backward_s: float, ended_s: float
) -> Tick:
    """A step of a plain loop, from the times at which its parts ended."""
    seconds = ended_s - began_s
    parts = {"forward": forward_s - began_s, "backward": backward_s - forward_s, "update": ended_s - backward_s}
    counted = operations.of(extents(batch.input_ids_BT.shape, batch.labels_BT.shape))
    shares = {f"share_{name}": spent / seconds for name, spent in parts.items()}
    return Tick(seconds, len(batch.index_B), batch.tokens, counted, shares)


def published_loss(model: T5VAE, batch: Batch) -> torch.Tensor:
    """The mean over all positions of the cross entropy from whole logits, and the KL of a sentence; a scalar."""
    mu_BL, logvar_BL = model.encode(batch.input_ids_BT, batch.attention_mask_BT)
    z_BL = gaussian.sample(mu_BL, logvar_BL, batch.eps_BL)
    decoded = model.t5(
        encoder_outputs=(z_BL.unsqueeze(1),),
        decoder_input_ids=model.t5.prepare_decoder_input_ids_from_labels(batch.labels_BT),
        use_cache=False,
    )
    rec = functional.cross_entropy(decoded.logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=-100)
    return rec + 0.1 * gaussian.kl_per_dim(mu_BL, logvar_BL).sum(1).mean()


def huggingface(settings: Mapping[str, Any]) -> Contestant:
    """The Trainer of transformers. It calls us, so it runs in a thread that stops after each step until the next one.

    `by_length`: with its `group_by_length`. The sizes of the batches, the DeepSpeed configuration and the optimizer are
    the same. `group_by_length` sorts each 50 batches by length, the longest first, and a measurement takes fewer steps
    than that. So the batches come in a random order.
    """
    pause, ticks = threading.Semaphore(0), queue.Queue[Tick | BaseException]()
    threads = torch.get_num_threads()

    def run() -> None:
        torch.set_num_threads(threads)  # a setting of each thread
        try:
            _train_huggingface(settings, pause, ticks.put)
        except BaseException as error:  # the reader raises it
            ticks.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while True:
        pause.release()
        told = ticks.get()
        if isinstance(told, BaseException):
            raise told
        yield told


def _train_huggingface(settings: Mapping[str, Any], pause: threading.Semaphore, tell: Callable[[Tick], None]) -> None:
    from transformers import (
        AutoModelForSeq2SeqLM,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    config = recipe(settings)
    distributed.start()
    tree = engine.resolve(config.deepspeed, "fp32")
    tokenizer = load_tokenizer(config.model.base)
    tokens = _tokens(settings, tokenizer)
    flat, ends_N = tokens.flat(np.arange(len(tokens))), np.cumsum(tokens.lengths_N)
    rows = [ids.tolist() for ids in np.split(flat, ends_N[:-1])]
    data = [{"input_ids": ids, "labels": ids, "length": len(ids)} for ids in rows]
    model = AutoModelForSeq2SeqLM.from_pretrained(
        _directory(config.model.base), dtype=torch.float32, dropout_rate=config.model.dropout
    )

    class Pace(TrainerCallback):
        """Tells what a step took. The time includes the wait for its batch, and not the pause."""

        def __init__(self) -> None:
            self.began_s, self.tokens, self.sentences = 0.0, 0, 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.began_s:  # of the first step; the data of the others is loaded after `on_step_end`
                pause.acquire()
                self.began_s = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tell(Tick(time.perf_counter() - self.began_s, self.sentences, self.tokens))
            self.tokens = self.sentences = 0
            pause.acquire()
            self.began_s = time.perf_counter()

    class Mixed(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            """Its sampler, with the batches as they are and in a random order."""
            sampler = super()._get_train_sampler(*args)
            assert sampler is not None  # the data has a length
            order = list(sampler)
            size = settings["batch"]
            batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
            random.Random(0).shuffle(batches)
            return list(itertools.chain.from_iterable(batches))

        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            # Not where the batch is made: that is while the device computes the batch before.
            pace.sentences += len(inputs["labels"])
            pace.tokens += int((inputs["labels"] != -100).sum())
            return super().training_step(model, inputs, *args)

    pace = Pace()
    padded = DataCollatorForSeq2Seq(tokenizer, model=model)

    def collated(features: list[dict[str, Any]]) -> Any:
        return padded([{key: row[key] for key in ("input_ids", "labels")} for row in features])

    by_length: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if settings.get("by_length") else {}
    arguments = TrainingArguments(
        output_dir=f"{settings['run_dir']}/huggingface",
        per_device_train_batch_size=settings["batch"],
        max_steps=1_000_000,
        deepspeed=tree,
        optim="adamw_torch_fused",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **by_length,
    )
    Mixed(model=model, args=arguments, train_dataset=data, data_collator=collated, callbacks=[pace]).train()


def _directory(base: str) -> str:
    return str(resources.files("vae_ds") / base) if base == "tiny" else base


def _tokens(settings: Mapping[str, Any], tokenizer: Any) -> TokenSet:
    lines = (Path(settings["data"]) / "train.txt").read_text(encoding="utf-8").splitlines()
    return from_texts(lines, tokenizer, settings["max_tokens"])


def _prepared(settings: Mapping[str, Any]) -> tuple[RunConfig, list[Batch]]:
    """The first batches of the recipe's phase, as `ours` makes them."""
    config = recipe(settings)
    tokenizer = load_tokenizer(config.model.base)
    tokens = _tokens(settings, tokenizer)
    size, phase = config.batch.global_size, settings["phase"]
    order_SG = epoch_batches(tokens.lengths_N, size, config.batch.bucket_batches, config.seed, phase, 0)
    batches = [
        collate(
            tokens,
            index_G,
            pad_id=tokenizer.pad_token_id,
            latent_dim=config.model.latent_dim,
            seed=config.seed,
            keys=(phase, 0),
            denoise=config.phases[phase].denoise,
        )
        for index_G in order_SG[:PREPARED]
    ]
    return config, batches


def _freeze(model: T5VAE, config: RunConfig, phase: int) -> Operations:
    """Freeze as the phase does, set the mode, and return the operations of a step."""
    phases.freeze(model, config.phases[phase].freeze)
    phases.train_mode(model)
    return count_operations(model)


def _padded(batch: Batch, width: int) -> Batch:
    """The batch with `width` positions."""

    def wide(ids_BT: torch.Tensor, filler: int) -> torch.Tensor:
        return functional.pad(ids_BT, (0, width - ids_BT.shape[1]), value=filler)

    return Batch(
        batch.index_B,
        wide(batch.input_ids_BT, 0),
        wide(batch.attention_mask_BT, 0),
        wide(batch.labels_BT, -100),
        batch.eps_BL,
        batch.weight_B,
        batch.tokens,
    )
