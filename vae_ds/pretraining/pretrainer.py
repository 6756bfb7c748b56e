"""Pretrain a small T5 from scratch on the corpus of a recipe, with the engine that trains the VAE.

Shapes: B texts of a micro batch, G of a global batch, S steps of an epoch, N texts, T tokens.
The loss is the mean over the target tokens of the global batch, in nats.
"""

import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vae_ds import config as configuration
from vae_ds import distributed
from vae_ds.config import PretrainConfig
from vae_ds.data import Limits, epoch_batches, evaluation_batches, logit_tokens, share
from vae_ds.engine import PhaseEngine
from vae_ds.errors import Stopped
from vae_ds.pretraining.basemodel import TextToText, build_t5, continue_text, export_t5
from vae_ds.pretraining.inputs import Setup, prepare
from vae_ds.pretraining.modelcard import base_card
from vae_ds.pretraining.span_corruption import Plan, cut_texts, plan_epoch, whole_texts
from vae_ds.runtime import StopFlag, heeded, records
from vae_ds.training import (
    LearningRate,
    Monitor,
    Requests,
    Saver,
    Speed,
    Stored,
    Watch,
    check_free,
    checkpoint,
    hold,
    resumption,
    write_headers,
)

MOST_TEXTS = 128  # of a forward pass in a validation

# Settings that may change when a run resumes: logging, storage, and (ENDS) the end of the run.
FREE_ON_RESUME = ("name", "logging.", "timeouts.", "checkpoint.", "validation.", "deepspeed", "batch.micro")
ENDS = ("steps", "minutes")


@dataclass
class PretrainState:
    """The state of a run besides weights and moments. It is stored in each checkpoint."""

    position: int = 0  # consumed global batches, including skipped ones
    step: int = 0  # applied optimizer steps
    skipped: int = 0
    skipped_in_row: int = 0
    tokens: int = 0  # target tokens seen
    duration_s: float = 0.0
    window: dict[str, float] = field(default_factory=dict)  # sums since the last logged row
    held_out: dict[str, float] = field(default_factory=dict)  # the last validation


def pretrain(
    config: PretrainConfig,
    run_dir: str | Path,
    resume: str = "auto",
    changed_data: bool = False,
    stop: StopFlag | None = None,
) -> Path:
    """Train a new T5 and its vocabulary, or resume the run in the run directory. Returns the run directory.

    The model is exported to `run_dir`/model at each validation, in the format of transformers. Call this on every rank.
    `resume`, `changed_data` and `stop` are as in `trainer.train`.
    Raises UserError for wrong input, and Stopped after a signal, when a checkpoint is written.
    """
    config, directory = configuration.absolute(config), Path(run_dir)
    ranks = distributed.start()
    if resumption.is_done(directory, config, FREE_ON_RESUME, ENDS, resume, tell=ranks.is_main):
        return directory
    check_free(directory, ranks)
    setup = prepare(config, directory, ranks)
    with heeded(stop) as flag, hold(directory, ranks):
        Pretrainer(setup, changed_data, flag).run()
    return directory


class Pretrainer:
    """The part of one run on this rank."""

    def __init__(self, setup: Setup, changed_data: bool, stop: StopFlag) -> None:
        self.setup, self.changed_data = setup, changed_data
        self.state = PretrainState()
        self.stop = stop
        self.speed = Speed(None, setup.ranks, setup.precision)
        logging = setup.config.logging
        self.monitor = Monitor(setup.run_dir, setup.ranks, logging.tensorboard, logging.progress, logging.trackers)
        self.saver = Saver(setup.run_dir, setup.ranks, setup.config.checkpoint, self.monitor)
        self.watch = Watch(setup.ranks, self.stop, setup.config.timeouts, partial(self._status, "failed"))
        rate = setup.config.learning_rate
        self.learning_rate = LearningRate(
            rate.schedule, setup.config.optimizer.lr, rate.warmup_steps, setup.config.steps, rate.final
        )

    def run(self) -> None:
        """Train from the newest checkpoint, if there is one, to the last step, and export."""
        distributed.seed_everything(self.setup.config.seed, self.setup.ranks.rank, 0)
        resumed = self._restore()
        write_headers(self.setup.run_dir, self.setup.config, self.setup.ranks)
        self.monitor.begin_run(self.setup.config.model_dump(mode="json", by_alias=True))
        self._status("running")
        with self.watch:
            self._train(resumed)
        self.monitor.end_run()
        self.monitor.close()
        self._status("done")

    def _train(self, resumed: Stored | None) -> None:
        setup = self.setup
        trained = PhaseEngine(
            TextToText(build_t5(setup.config.architecture, setup.tokenizer, setup.config.seed)),
            optimizer=setup.config.optimizer,
            ranks=setup.ranks,
            precision=setup.precision,
            ds_config=setup.ds_config,
        )
        try:
            if resumed is not None:
                trained.load(resumed)
                resumed.close()
            self.monitor.begin_phase("pretrain", setup.config.steps, self.state.step)
            trained.train()
            self.steps(trained)
        finally:
            trained.close()
        self.saver.finish(must=True)

    def steps(self, trained: PhaseEngine) -> None:
        """Step, log, validate and save until the end of the run."""
        config, state = self.setup.config, self.state
        epoch_of_plan, plan, order_SG = -1, whole_texts(self.setup.train.lengths_N), np.empty((0, 0), dtype=np.int64)
        began = time.monotonic()
        before_s = state.duration_s
        while self.progress() < 1.0:
            epoch, number = divmod(state.position, self.setup.steps_per_epoch)
            if epoch != epoch_of_plan:
                epoch_of_plan, (plan, order_SG) = epoch, self._order(epoch)
            with self.speed.step():
                requests = self.step(trained, plan, order_SG[number], epoch)
            if requests.written:
                self.saver.finish()
            # Use the clock of rank 0 on all ranks, so that their decisions below are the same.
            state.duration_s = distributed.broadcast_object(before_s + time.monotonic() - began)
            finished = self.progress() >= 1.0
            fresh = state.skipped_in_row == 0
            if fresh and (finished or state.step % config.logging.every == 0):
                self._log()
            if fresh and (finished or state.step % config.validation.every_steps == 0):
                self.validate(trained)
            due = fresh and (finished or state.step % config.checkpoint.every_steps == 0)
            if due or requests.save or requests.stop:
                self.save(trained, must=requests.stop)
            if requests.stop and not finished:
                self.saver.finish(must=True)
                self._status("stopped")
                self.monitor.close()
                raise Stopped(f"stopped at step {state.step} of {config.steps}; run the same command to resume")

    def progress(self) -> float:
        """Progress of the run, from 0 to 1: the larger of the share of steps and, if limited, the share of time."""
        config = self.setup.config
        by_time = 0.0 if config.minutes is None else self.state.duration_s / (60 * config.minutes)
        return max(self.state.step / config.steps, by_time)

    def step(self, trained: PhaseEngine, plan: Plan, index_G: np.ndarray, epoch: int) -> Requests:
        """Train on one global batch: forward, backward, update. Returns the requests of the ranks after it."""
        setup, state, ranks = self.setup, self.state, self.setup.ranks
        # The warm-up counts steps. The decay follows the progress, so that it ends with the run under either limit.
        warm = state.step < setup.config.learning_rate.warmup_steps
        lr = self.learning_rate.at(state.step if warm else int(self.progress() * setup.config.steps))
        tokens = int(plan.target_N[index_G].sum())
        shares = share(index_G, plan.order_N, ranks.rank, ranks.world, setup.limits)
        sums = distributed.NamedSums(ranks.device, nats=1, positions=1, grad_norm=1, requests=len(Requests._fields))
        outcome = None
        for number, (index_B, weight_B) in enumerate(shares, start=1):
            with self.speed.part("data"):
                batch = setup.batch(setup.train, index_B, plan, epoch)
            self.watch.advance()
            with self.speed.part("forward"):
                nats = (trained.forward(**batch._asdict()) * torch.from_numpy(weight_B).to(ranks.device)).sum()
            # The engine averages over the ranks, but the loss is a mean over the tokens of all.
            with self.speed.part("backward"):
                trained.backward(nats * (ranks.world / tokens), is_last=number == len(shares))
            with self.speed.part("update"):
                outcome = trained.step(lr)
            sums.add(nats=nats, positions=batch.labels_BT.numel())
            if outcome is not None and ranks.is_main:
                sums.add(grad_norm=outcome.grad_norm)  # read with the other sums, in one copy
        self.watch.advance()
        sums.add(requests=self.saver.requests(stop=self.stop.raised is not None))
        with self.speed.part("sums"):
            totals = sums.reduce()
        self.speed.count({"tokens": tokens, "target": totals["positions"]})
        requests = self.saver.agreed(totals["requests"].tolist())
        state.position += 1
        if outcome is None or not outcome.applied:
            self._skip()
            return requests
        state.skipped_in_row = 0
        state.step += 1
        state.tokens += tokens
        adds = {name: float(totals[name]) for name in ("nats", "positions", "grad_norm")}
        for key, value in {**adds, "steps": 1.0, "tokens": tokens, "texts": len(index_G)}.items():
            state.window[key] = state.window.get(key, 0.0) + value
        state.window["lr"] = lr
        self.monitor.advance(1)
        return requests

    def validate(self, trained: PhaseEngine) -> None:
        """Measure the held-out sentences and replace the exported model."""
        trained.eval()
        self.state.held_out = measure(trained.module, self.setup)
        trained.train()
        self.monitor.evaluation(self.state.step, "valid", self.state.held_out)
        self._export(trained)

    def save(self, trained: PhaseEngine, must: bool) -> None:
        """Begin a portable checkpoint. Older ones are deleted when it is complete."""
        progress = {"state": asdict(self.state), "global_step": self.state.step, "data": self._data()}
        self.saver.begin(trained.part, progress, must)

    def _restore(self) -> Stored | None:
        found = checkpoint.resume(self.setup.run_dir, self.setup.ranks, self._data(), self.changed_data)
        if found is None:
            self.monitor.resume_from(0)
            return None
        saved, progress = found
        self.state = PretrainState(**progress["state"])
        self.monitor.resume_from(progress["global_step"])
        return saved

    def _order(self, epoch: int) -> tuple[Plan, np.ndarray]:
        config = self.setup.config
        plan = plan_epoch(self.setup.train.lengths_N, config, epoch)
        size, buckets = config.batch.global_size, config.batch.bucket_batches
        return plan, epoch_batches(plan.order_N, size, buckets, config.seed, 0, epoch)

    def _skip(self) -> None:
        self.state.skipped += 1
        self.state.skipped_in_row += 1
        if self.state.skipped_in_row >= self.setup.config.max_skipped_steps:
            raise RuntimeError(
                f"{self.state.skipped_in_row} steps in a row had non-finite gradients; reduce optimizer.lr"
            )

    def _log(self) -> None:
        window, state, speed = self.state.window, self.state, self.speed.row()
        self.monitor.log(
            {
                "phase": "pretrain",
                "step": state.step,
                "epoch": round(state.position / self.setup.steps_per_epoch, 4),
                "loss": window["nats"] / window["tokens"],
                "lr": window["lr"],
                "grad_norm": window["grad_norm"] / window["steps"],
                **speed,
                "texts_per_s": speed["tokens_per_s"] * window["texts"] / window["tokens"],
                "padding": 1.0 - window["tokens"] / window["positions"],
                "skipped_steps": state.skipped,
            }
        )
        state.window = {}

    def _export(self, trained: PhaseEngine) -> None:
        setup, gathered = self.setup, trained.weights(on_main=True)
        if setup.ranks.is_main:
            model = build_t5(setup.config.architecture, setup.tokenizer, setup.config.seed)
            assert isinstance(trained.module, TextToText)
            weights = trained.module.plain(gathered)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])
            model.eval()
            prefixes = setup.sources["example_prefixes"]
            examples = {prefix: continue_text(model, setup.tokenizer, prefix) for prefix in prefixes}
            card = base_card(
                setup.config,
                setup.sources,
                asdict(self.state),
                setup.ranks,
                setup.precision,
                model.num_parameters(),
                examples,
            )
            export_t5(model, setup.tokenizer, setup.pieces, card, setup.run_dir / "model")
        distributed.barrier()

    def _data(self) -> dict[str, Any]:
        return {"fingerprint": self.setup.train.fingerprint, "texts": len(self.setup.train)}

    def _status(self, state: str, reason: str | None = None, code: int | None = None) -> None:
        if self.setup.ranks.is_main:
            facts = {"step": self.state.step, "total_steps": self.setup.config.steps}
            records.write_status(self.setup.run_dir, state, reason=reason, exit_code=code, **facts)


@torch.no_grad()
def measure(model: torch.nn.Module, setup: Setup) -> dict[str, float]:
    """Held-out losses in nats: whole sentences (plain LM), second halves (prefix LM), corrupted spans, denoising.

    This is a collective operation: all ranks make the same number of forward passes.
    """
    lengths_N = setup.valid.lengths_N
    whole = whole_texts(lengths_N)
    cut_N = lengths_N // 2
    halves = cut_texts(lengths_N, cut_N)
    only_spans = setup.config.model_copy(update={"span_corruption": 1.0, "denoising": 0.0})
    only_denoising = setup.config.model_copy(update={"span_corruption": 0.0, "denoising": 1.0})
    plans = {"lm": whole, "prefix": halves, "spans": plan_epoch(lengths_N, only_spans, 0)}
    plans["denoising"] = plan_epoch(lengths_N, only_denoising, 0)
    sums = torch.zeros(len(plans), dtype=torch.float64, device=setup.ranks.device)
    # A target has at most the tokens of its text, a sentinel and an end. The logits are the largest tensor.
    fitting = logit_tokens("auto", setup.config.architecture.vocab_size) // (setup.config.data.max_tokens + 2)
    limits = Limits(max(1, min(MOST_TEXTS, fitting)))
    for row, plan in enumerate(plans.values()):
        for index_B, weight_B in evaluation_batches(plan.order_N, limits, setup.ranks.rank, setup.ranks.world):
            nats_B = model(**setup.batch(setup.valid, index_B, plan, 0)._asdict())
            sums[row] += (nats_B.double() * torch.from_numpy(weight_B).to(nats_B.device)).sum()
    totals = distributed.all_sum(sums).tolist()
    rates = {
        f"{name}_per_token": total / int(plan.target_N.sum())
        for (name, plan), total in zip(plans.items(), totals, strict=True)
    }
    size = {"sentences": len(setup.valid), "tokens": int(whole.target_N.sum())}
    return {**rates, "lm_per_sentence": totals[0] / len(setup.valid), **size}
