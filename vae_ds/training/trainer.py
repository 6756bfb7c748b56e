"""The training loop: a run is a list of phases, a phase is an engine, a step is a global batch.

Shapes: B sentences of a micro batch, G of a global batch, L latent units.
Losses are in nats per sentence, means over the global batch (README, The method).
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vae_ds import config as configuration
from vae_ds import distributed, latents
from vae_ds.config import RunConfig
from vae_ds.data import Feed, collate, share
from vae_ds.engine import PhaseEngine, PhaseState
from vae_ds.errors import Stopped
from vae_ds.evaluation import evaluate
from vae_ds.model import T5VAE, gaussian
from vae_ds.runtime import StopFlag, heeded, records
from vae_ds.training import checkpoint, phases
from vae_ds.training.aggressive import Aggressive, half_of
from vae_ds.training.monitor import Monitor
from vae_ds.training.phases import PhasePlan
from vae_ds.training.preparation import Job, prepare, write_headers
from vae_ds.training.saver import Saver, Wishes
from vae_ds.training.schedules import Target
from vae_ds.training.watch import Watch

# What a resumed run may set anew: how it is watched and stored, not what it computes.
WATCHED = ("name", "logging.", "timeouts.", "checkpoint.", "validation.", "evaluation.")
FREE_ON_RESUME = (*WATCHED, "deepspeed", "batch.micro", "data.cache_dir")
SHOWN_TEXTS = 8


@dataclass
class TrainState:
    """Everything that changes in a run but the weights and moments; goes into each checkpoint."""

    phase: int = 0
    place: list[int] = field(default_factory=lambda: [0, 0, 0])  # of the next global batch: epoch, window, number
    step: int = 0  # applied optimizer steps in this phase
    skipped: int = 0
    skipped_in_row: int = 0
    beta: float | None = None  # carried by the schedule `target`
    aggressive: Aggressive | None = None  # the alternation of a phase that has one
    held_kl: list[float] | None = None  # last step's global mean KL of each unit
    best: float | None = None  # lowest valid nelbo so far
    best_kept: float | None = None  # highest score of a validation by `checkpoint.keep_best`
    window: dict[str, float] = field(default_factory=dict)  # sums since the last logged row

    def begin_phase(self, index: int) -> None:
        self.phase, self.place = index, [0, 0, 0]
        self.step, self.skipped_in_row = 0, 0
        self.beta, self.held_kl, self.aggressive, self.window = None, None, None, {}

    def __post_init__(self) -> None:
        if isinstance(self.aggressive, dict):  # as checkpoints have it
            self.aggressive = Aggressive(**self.aggressive)


def train(
    recipe: str | RunConfig,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    changed_data: bool = False,
    until: str | None = None,
    stop: StopFlag | None = None,
) -> Path:
    """Run a recipe to its end, or on from where its run directory stands. Returns the run directory.

    Start it on every rank. A run that is done returns at once, unless its last phase is longer now. `changed_data`
    lets a run go on though its text is not what it was. `until` names the last phase to train now; a later start
    goes on from there; `stop` is a flag that listens already. Raises UserError for wrong input, before any model is
    loaded, and Stopped after a signal, once a checkpoint is safe.
    """
    config = recipe if isinstance(recipe, RunConfig) else configuration.load(RunConfig, recipe, overrides)
    directory = Path(run_dir or Path("runs") / config.name)
    ranks = distributed.start()
    last = len(config.phases) - 1
    ends = (f"phases.{last}.steps", f"phases.{last}.epochs")
    if records.is_done(directory, config, FREE_ON_RESUME, ends, resume, tell=ranks.is_main):
        return directory
    if until is not None:
        last = phases.number_of(until, [phase.name for phase in config.phases])
    job = prepare(config, directory, ranks)
    with heeded(stop) as flag:
        Trainer(job, changed_data, flag).run(last)
    return directory


class Trainer:
    """One run on this rank; `run` reads like the method."""

    def __init__(self, job: Job, changed_data: bool, stop: StopFlag) -> None:
        self.job, self.changed_data = job, changed_data
        self.state = TrainState()
        self.stop = stop
        logging = job.config.logging
        self.monitor = Monitor(job.run_dir, job.ranks, logging.tensorboard, logging.progress)
        self.saver = Saver(job.run_dir, job.ranks, job.config.checkpoint, self.monitor)
        self.watch = Watch(job.ranks, self.stop, job.config.timeouts, lambda reason: self._status("failed", reason))

    def run(self, last_phase: int) -> None:
        """Up to and with a phase, from the newest checkpoint if there is one; after the last of all, the export."""
        resumed, weights = self._restore()
        if self.state.phase > last_phase:
            self.monitor.close()
            return
        # Only now: a resumption that is refused leaves the run as it is.
        write_headers(self.job.run_dir, self.job.config, self.job.ranks)
        self._status("running")
        with self.watch:
            self._phases(resumed, weights, last_phase)
        self.monitor.close()
        if last_phase == len(self.job.plans) - 1:
            self._status("done")
        else:
            self._status("stopped", f"after phase {self.job.plans[last_phase].name}, as asked")

    def _phases(self, resumed: PhaseState | None, weights: dict[str, torch.Tensor] | None, last_phase: int) -> None:
        for plan in self.job.plans[self.state.phase : last_phase + 1]:
            if plan.index != self.state.phase:
                self.state.begin_phase(plan.index)
            weights = self.run_phase(plan, weights, resumed)
            resumed = None
        assert weights is not None, "a run has at least one phase"
        self.saver.finish(must=True)
        if last_phase == len(self.job.plans) - 1:
            self._export(weights)

    def run_phase(
        self, plan: PhasePlan, weights: dict[str, torch.Tensor] | None, resumed: PhaseState | None
    ) -> dict[str, torch.Tensor]:
        """Train one phase on an engine of its own. Returns the float32 weights that the next phase starts from."""
        if self.state.step >= plan.steps and weights is not None:
            return weights
        job = self.job
        model = self.build(plan, weights if any(self.state.place) or resumed else self._reset(plan, weights))
        trainer_engine = PhaseEngine(
            model,
            optimizer=plan.settings.optimizer,
            micro=job.micro,
            accumulation=job.accumulation,
            ranks=job.ranks,
            precision=job.precision,
            ds_config=job.ds_config,
            half_of=half_of if plan.settings.aggressive else None,
        )
        if plan.settings.aggressive and self.state.aggressive is None:
            self.state.aggressive = Aggressive()
        # After the engine, since building one draws numbers, too.
        distributed.seed_everything(job.config.seed, job.ranks.rank, plan.index)
        if resumed is not None:
            trainer_engine.load(resumed)
        self.monitor.begin_phase(plan.name, plan.steps, self.state.step)
        phases.train_mode(trainer_engine.module)
        try:
            self.steps(plan, trainer_engine)
            return trainer_engine.state().weights
        finally:
            trainer_engine.close()

    def steps(self, plan: PhasePlan, trainer_engine: PhaseEngine) -> None:
        """The loop of one phase: step, log, validate, save, until its applied steps are done."""
        config, state = self.job.config, self.state
        feed = Feed(self.job.train, config.batch, config.seed, plan.index, state.place)
        clock = time.monotonic()
        while state.step < plan.steps:
            wishes = self.step(plan, trainer_engine, feed)
            if wishes.written:
                self.saver.finish()
            finished = state.step == plan.steps
            fresh = state.skipped_in_row == 0
            if fresh and (finished or state.step % config.logging.every == 0):
                now = time.monotonic()
                self._log(plan, feed.epoch, now - clock)
                clock = now
            valid: dict[str, Any] = {}
            if fresh and (finished or state.step % config.validation.every_steps == 0):
                valid = self.validate(plan, trainer_engine)
                if state.aggressive:
                    state.aggressive.after_validation(valid.get("mi"))
                clock = time.monotonic()
            improved = self._improves(valid)
            due = fresh and (finished or state.step % config.checkpoint.every_steps == 0 or improved)
            if due or wishes.save or wishes.stop:
                self.save(plan, trainer_engine, valid, must=wishes.stop)
                clock = time.monotonic()
            if wishes.stop:
                self.saver.finish(must=True)
                self._status("stopped", self.stop.raised)
                self.monitor.close()
                raise Stopped(f"stopped in phase {plan.name} at step {state.step} of {plan.steps}; rerun to resume")

    def step(self, plan: PhasePlan, trainer_engine: PhaseEngine, feed: Feed) -> Wishes:
        """One global batch: forward, backward, update, what the schedules carry on. What the ranks wish after it."""
        index_G = feed.take()
        job, state, settings = self.job, self.state, plan.settings
        beta = plan.beta.at(state.step, state.beta)
        lr, half = plan.learning_rate.at(state.step), state.aggressive.half() if state.aggressive else None
        units = _model_of(trainer_engine).latent_dim
        held_L = None if state.held_kl is None else torch.tensor(state.held_kl, device=job.ranks.device)
        # Loss, rec, thresholded KL, tokens, positions, 3 wishes, then the KL of each unit: one reduction a step.
        sums = torch.zeros(8 + units, dtype=torch.float64, device=job.ranks.device)
        outcome = None
        shares = share(index_G, feed.tokens.lengths_N, job.ranks.rank, job.ranks.world, job.micro)
        for index_B in shares:
            batch = collate(
                feed.tokens,
                index_B,
                pad_id=job.tokenizer.pad_token_id,
                latent_dim=units,
                seed=job.config.seed,
                keys=feed.keys,
                denoise=settings.denoise,
                sample=settings.sample_posterior,
            ).to(job.ranks.device)
            self.watch.advance()
            terms = trainer_engine.forward(**batch.arguments())
            floor_B = gaussian.thresholded_kl(terms.kl_BL, settings.free_bits.mode, settings.free_bits.nats, held_L)
            loss_B = terms.rec_B + beta * floor_B
            trainer_engine.backward(loss_B.mean())
            outcome = trainer_engine.step(lr, half)
            with torch.no_grad():
                parts = [loss_B.sum(), terms.rec_B.sum(), floor_B.sum()]
                sums[:3] += torch.stack(parts).double()
                sums[3:5] += torch.tensor([batch.tokens, batch.positions], dtype=torch.float64, device=sums.device)
                sums[8:] += terms.kl_BL.sum(0).double()
        self.watch.advance()
        sums[5:8] = torch.tensor(self.saver.wishes(stop=self.stop.raised is not None))
        totals = distributed.all_sum(sums).cpu()
        wishes = self.saver.agreed(totals[5:8].tolist())
        if outcome is None or not outcome.applied:
            self._skip()
            return wishes
        state.skipped_in_row = 0
        state.step += 1
        kl_L = totals[8:] / len(index_G)
        state.held_kl = kl_L.tolist()
        if isinstance(plan.beta, Target):
            state.beta = plan.beta.carry(beta, float(kl_L.sum()))
        if state.aggressive and settings.aggressive:
            state.aggressive.after_step(settings.aggressive, float(totals[0]), float(totals[3]))
        self._count(totals, kl_L, len(index_G), beta, lr, outcome.grad_norm)
        self.monitor.advance(1)
        return wishes

    def build(self, plan: PhasePlan, weights: dict[str, torch.Tensor] | None) -> T5VAE:
        """A fresh float32 module on the CPU with this phase's freezing, ready for an engine (a phase is an engine)."""
        model = T5VAE.from_base(self.job.config.model, self.job.config.seed)
        if weights is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])
        phases.freeze(model, plan.settings.freeze, f"phases.{plan.index}.freeze")
        return model

    def validate(self, plan: PhasePlan, trainer_engine: PhaseEngine) -> dict[str, Any]:
        """Measure the valid split's first sentences; the best nelbo so far becomes model/. Returns the metrics."""
        job = self.job
        model = _model_of(trainer_engine)
        metrics = evaluate(
            model,
            job.valid,
            job.ranks,
            job.config.evaluation,
            seed=job.config.seed,
            full=False,
            beta=plan.beta.at(self.state.step, self.state.beta),
            pad_id=job.tokenizer.pad_token_id,
        )
        sources = [job.valid.text(i) for i in range(min(SHOWN_TEXTS, len(job.valid)))]
        pairs, samples = latents.shown(model, job.tokenizer, sources, job.config.seed, job.config.data.max_tokens)
        step = plan.first_step + self.state.step
        self.monitor.evaluation(step, "valid", metrics, metrics.get("kl_per_dim"), pairs, samples)
        if self.state.best is None or metrics["nelbo"] < self.state.best:
            self.state.best = metrics["nelbo"]
            if job.config.export == "best":
                self._export(trainer_engine.state().weights)
        return metrics

    def save(self, plan: PhasePlan, trainer_engine: PhaseEngine, valid: dict[str, Any], must: bool) -> None:
        """Begin a portable checkpoint; `valid`, this step's validation if there was one, says how good it is."""
        progress = {
            "state": asdict(self.state),
            "global_step": plan.first_step + self.state.step,
            "data": self._data(),
            "valid": {key: valid[key] for key in checkpoint.BETTER if key in valid},
        }
        self.saver.begin(lambda: trainer_engine.state(share=True), progress, must)

    def _improves(self, valid: dict[str, Any]) -> bool:
        """Whether a validation beats all before it in the metric by which the best checkpoint is kept; it is noted."""
        metric = self.job.config.checkpoint.keep_best
        if metric is None or valid.get(metric) is None:
            return False
        score = checkpoint.BETTER[metric] * valid[metric]
        if self.state.best_kept is not None and score <= self.state.best_kept:
            return False
        self.state.best_kept = score
        return True

    def _restore(self) -> tuple[PhaseState | None, dict[str, torch.Tensor] | None]:
        found = checkpoint.resume(self.job.run_dir, self.job.ranks, self._data(), self.changed_data)
        if found is None:
            self.monitor.resume_from(0)
            return None, None
        saved, progress = found
        self.state = TrainState(**progress["state"])
        self.monitor.resume_from(progress["global_step"])
        return saved, saved.weights

    def _reset(self, plan: PhasePlan, weights: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        """The weights a phase starts from: with `reset_decoder`, the decoder group is the base's again (Li 2019)."""
        if weights is None or not plan.settings.reset_decoder:
            return weights
        base = T5VAE.from_base(self.job.config.model, self.job.config.seed)
        fresh = {name: p.detach() for name, p in base.named_parameters() if phases.group_of(name) == "decoder"}
        return weights | fresh

    def _skip(self) -> None:
        state, limit = self.state, self.job.config.max_skipped_steps
        state.skipped += 1
        state.skipped_in_row += 1
        if state.skipped_in_row >= limit:
            raise RuntimeError(f"{limit} steps in a row had non-finite gradients and were skipped; a lower lr may do")

    def _count(
        self, totals: torch.Tensor, kl_L: torch.Tensor, sentences: int, beta: float, lr: float, grad_norm: float
    ) -> None:
        window = self.state.window
        loss, rec, floor, tokens, positions = (totals[:5]).tolist()
        adds = {
            "steps": 1.0,
            "loss": loss / sentences,
            "rec": rec / sentences,
            "kl": float(kl_L.sum()),
            "kl_weighted": beta * floor / sentences,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "positions": positions,
        }
        for key, value in adds.items():
            window[key] = window.get(key, 0.0) + value
        window["beta"], window["lr"] = beta, lr

    def _log(self, plan: PhasePlan, epoch: float, duration_s: float) -> None:
        window, state = self.state.window, self.state
        steps = window["steps"]
        row: dict[str, Any] = {"phase": plan.name, "step": plan.first_step + state.step}
        row["epoch"] = round(epoch, 4)
        row |= {key: window[key] / steps for key in ("rec", "kl", "kl_weighted", "loss", "grad_norm")}
        row["nelbo"] = row["rec"] + row["kl"]
        row |= {"beta": window["beta"], "lr": window["lr"], "tokens_per_s": window["tokens"] / max(duration_s, 1e-9)}
        row["padding"] = 1.0 - window["tokens"] / window["positions"]
        row["skipped_steps"] = state.skipped
        if state.aggressive:
            row["aggressive"] = float(state.aggressive.is_on)
        state.window = {}
        self.monitor.log(row)

    def _export(self, weights: dict[str, torch.Tensor]) -> None:
        job = self.job
        target = job.run_dir / "model"
        last = self.state.phase == len(job.plans) - 1 and self.state.step == job.plans[-1].steps
        if job.ranks.is_main and not (job.config.export == "best" and last and target.exists()):
            model = T5VAE.from_base(job.config.model, job.config.seed)
            model.save_pretrained(target, job.tokenizer, weights=weights)
        distributed.barrier()

    def _data(self) -> dict[str, Any]:
        return self.job.train.facts

    def _status(self, state: str, reason: str | None = None) -> None:
        if self.job.ranks.is_main:
            facts = {"phase": self.state.phase, "step": self.state.step, "total_steps": self.job.total_steps}
            records.write_status(self.job.run_dir, state, reason=reason, **facts)


def _model_of(trainer_engine: PhaseEngine) -> T5VAE:
    model = trainer_engine.module
    assert isinstance(model, T5VAE)
    return model
