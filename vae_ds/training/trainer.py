"""The training loop: a run is a list of phases, a phase is an engine, a step is a global batch.

Read `train`, then `Trainer.run`, `run_phase`, `steps` and `step`: they follow the method from the recipe down to one
optimizer step. Shapes: B sentences of a micro batch, G of a global batch, L latent units. Losses are in nats per
sentence, means over the global batch (docs/method.md).
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vae_ds import config as configuration
from vae_ds import distributed, latents
from vae_ds.config import RunConfig
from vae_ds.data import Batch, Feed, MicroBatches
from vae_ds.engine import PhaseEngine, StepOutcome
from vae_ds.errors import Stopped
from vae_ds.evaluation import evaluate
from vae_ds.model import EXTENTS, T5VAE, extents
from vae_ds.runtime import StopFlag, heeded
from vae_ds.training import base_weights, checkpoint, objective, phases, resumption, window
from vae_ds.training.aggressive import Aggressive
from vae_ds.training.build import build_engine, build_model
from vae_ds.training.export import Exporter
from vae_ds.training.handover import Start, hand_over
from vae_ds.training.holding import check_free, hold
from vae_ds.training.memory import STEP_ADVICE, explain_out_of_memory, limits_for
from vae_ds.training.monitor import Monitor
from vae_ds.training.objective import StepSettings
from vae_ds.training.phases import PhasePlan
from vae_ds.training.preparation import Setup, prepare, write_headers
from vae_ds.training.saver import Requests, Saver
from vae_ds.training.schedules import Target
from vae_ds.training.speed import speed_of
from vae_ds.training.state import TrainState
from vae_ds.training.status import Status
from vae_ds.training.watch import Watch

SHOWN_TEXTS = 8


def train(
    recipe: str | RunConfig,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    changed_data: bool = False,
    until: str | None = None,
    stop: StopFlag | None = None,
) -> Path:
    """Train a recipe to its end, or resume the run in `run_dir`. Returns the run directory.

    Call it on every rank. A run that is done returns at once, unless its last phase is longer now.

    Args:
        recipe: a YAML file, the name of a shipped recipe, or a configuration.
        run_dir: the run directory; None is runs/NAME.
        overrides: `KEY=VALUE` settings that replace those of the recipe.
        resume: `auto`, or `never` to refuse a directory that holds a run.
        changed_data: resume although the training text has changed.
        until: the last phase to train now, by name or by number from 1; a later call continues after it.
        stop: a flag that already listens to signals; None makes a new one.

    Raises UserError for wrong input, before any model is loaded, and Stopped after a signal, once a checkpoint is
    written.
    """
    config = recipe if isinstance(recipe, RunConfig) else configuration.load(RunConfig, recipe, overrides)
    config = configuration.absolute(config)
    directory = Path(run_dir or Path("runs") / config.name)
    ranks = distributed.start()
    last = resumption.last_phase(config, until)
    if resumption.is_done(directory, config, resumption.FREE, resumption.ends(config), resume, tell=ranks.is_main):
        return directory
    check_free(directory, ranks)
    setup = prepare(config, directory, ranks)
    with heeded(stop) as flag, hold(directory, ranks):
        Trainer(setup, changed_data, flag).run(last)
    return directory


class Trainer:
    """One run on this rank."""

    def __init__(self, setup: Setup, changed_data: bool, stop: StopFlag) -> None:
        self.setup, self.changed_data, self.limits, self.stop = setup, changed_data, setup.limits, stop
        self.state = TrainState()
        self.left_out: dict[str, str] = {}  # of checkpoints (base_weights.py)
        self.has_prior, self.decodes = setup.config.model.has_prior, True
        logging = setup.config.logging
        self.monitor = Monitor(setup.run_dir, setup.ranks, logging.tensorboard, logging.progress, logging.trackers)
        self.saver = Saver(setup.run_dir, setup.ranks, setup.config.checkpoint, self.monitor)
        self.status = Status(setup.run_dir, setup.ranks, setup.plans)
        self.exporter = Exporter(setup, self.status)
        self.watch = Watch(setup.ranks, stop, setup.config.timeouts, partial(self._write_status, "failed"))

    # A run

    def run(self, last_phase: int) -> None:
        """Train from the newest checkpoint to the end of a phase; after the last phase of all, export the model."""
        start = self.restore()
        if self.state.phase > last_phase:
            self.monitor.close()
            return
        # Only now: a resumption that is refused leaves the run as it is.
        write_headers(self.setup.run_dir, self.setup.config, self.setup.ranks)
        self.monitor.begin_run(self.setup.config.model_dump(mode="json", by_alias=True))
        self._write_status("running")
        with self.watch:
            end = self._run_phases(start, last_phase)
            if self._is_last(last_phase):
                self.exporter.finish(end, self.state)
                self.monitor.end_run()
            end.close()
        self.monitor.close()
        if self._is_last(last_phase):
            self._write_status("done")
        else:
            self._write_status("stopped", f"after phase {self.setup.plans[last_phase].name}, as requested", code=0)

    def _run_phases(self, start: Start, last_phase: int) -> Start:
        for plan in self.setup.plans[self.state.phase : last_phase + 1]:
            if plan.index != self.state.phase:
                self.state.begin_phase(plan.index)
            start = self.run_phase(plan, start, must=plan.index == last_phase)
        return start

    def run_phase(self, plan: PhasePlan, start: Start, must: bool) -> Start:
        """Train one phase on an engine of its own. Returns what the next phase starts from, in float32.

        After the last phase this is what to export, if model/ is not chosen already: if gathered, on rank 0 alone.
        With `must`, the checkpoint at the end has to be written. Closes `start`, unless the phase is complete already.
        """
        if self.state.step >= plan.steps and start.source is not None:
            return Start(start.stored, gathered=start.gathered)
        engine, facts = self.build(plan, start)
        if plan.settings.aggressive and self.state.aggressive is None:
            self.state.aggressive = Aggressive()
        self.state.choice = self.state.choice or self.exporter.begin(plan)
        if start.stored is not None and start.resumes:
            engine.load(start.stored)
        start.close()
        self.monitor.begin_phase(plan.name, plan.steps, self.state.step, facts)
        self.status.begin_phase(self.state)
        try:
            self.steps(plan, engine)
            gather = partial(self.exporter.gather, engine, self.state, self._is_last(plan.index))
            # The checkpoint of a phase's end must exist before the next phase can fail.
            return hand_over(self.saver, plan.first_step + plan.steps, gather, must)
        finally:
            self.speed.close()
            engine.close()

    # A phase

    def build(self, plan: PhasePlan, start: Start) -> tuple[PhaseEngine, str]:
        """The engine of a phase, ready to train, and its sizes in words. Sets what depends on the phase here."""
        is_start = not start.resumes and not any(self.state.place)
        model, weights = build_model(self.setup, plan, start.source, is_start)
        self.left_out = base_weights.left_out(weights, self.setup, start, self.left_out)
        self.decodes = phases.decodes(name for name, one in model.named_parameters() if one.requires_grad)
        facts, self.speed = phases.sizes(model), speed_of(self.setup, plan, self.state.step, model)
        engine = build_engine(self.setup, plan, model, weights)  # it may divide the parameters
        self.limits = limits_for(self.setup, engine)
        # After the engine: building one draws random numbers, too.
        distributed.seed_everything(self.setup.config.seed, self.setup.ranks.rank, plan.index)
        phases.train_mode(engine.module)
        return engine, facts

    def steps(self, plan: PhasePlan, engine: PhaseEngine) -> None:
        """The loop of one phase: step, log, validate, save, until all its optimizer steps are applied."""
        config, state = self.setup.config, self.state
        with closing(self.batches(plan, engine)) as batches:
            while state.step < plan.steps:
                with self.speed.step():
                    requests = self.step(plan, engine, batches)
                if requests.written:
                    self.saver.finish()
                is_finished = state.step == plan.steps
                was_applied = state.skipped_in_row == 0
                if was_applied and (is_finished or state.step % config.logging.every == 0):
                    self.log(plan, batches.feed.epoch)
                valid: dict[str, Any] = {}
                if was_applied and (is_finished or state.step % config.validation.every_steps == 0):
                    valid = self.validate(plan, engine)
                has_improved = self._improves(valid)
                is_regular = is_finished or state.step % config.checkpoint.every_steps == 0
                is_due = was_applied and (is_regular or has_improved)
                if is_due or requests.save or requests.stop:
                    self.save(plan, engine, valid, must=requests.stop)
                if requests.stop:
                    self._end_stopped(plan)

    def batches(self, plan: PhasePlan, engine: PhaseEngine) -> MicroBatches:
        """The micro batches of a phase from the place of this run on."""
        setup, state = self.setup, self.state
        return MicroBatches(
            Feed(setup.train, setup.config.batch, setup.config.seed, plan.index, state.place, state.bad_lines),
            setup.ranks,
            self.limits,
            pad_id=setup.tokenizer.pad_token_id,
            latent_dim=_model_of(engine).latent_dim,
            seed=setup.config.seed,
            denoise=plan.settings.denoise,
            sample=plan.settings.sample_posterior,
        )

    def step(self, plan: PhasePlan, engine: PhaseEngine, batches: MicroBatches) -> Requests:
        """One optimizer step on a global batch. Returns what the ranks request after it."""
        with self.speed.part("data"):
            sentences, micro_batches = batches.take()
        self.state.bad_lines = batches.feed.bad_lines
        now = self._step_settings(plan, sentences)
        sums = self._new_sums(engine)
        outcome = None
        for number in range(1, micro_batches + 1):
            with self.speed.part("data"):
                batch = batches.next()
            self.watch.advance()
            with explain_out_of_memory(f"a step of phase {plan.name}", STEP_ADVICE.format(self.limits)):
                outcome = self.forward_backward_update(engine, batch, now, sums, number == micro_batches)
        self.watch.advance()
        with self.speed.part("sums"):
            totals, requests = self.reduce(sums)
        self.speed.count(totals)
        if outcome is None or not outcome.applied:
            self.state.count_skipped(self.setup.config.max_skipped_steps)
        else:
            self._count_applied(plan, totals, now)
        return requests

    def forward_backward_update(
        self, engine: PhaseEngine, batch: Batch, now: StepSettings, sums: distributed.NamedSums, is_last: bool
    ) -> StepOutcome | None:
        """One micro batch: its loss (objective.py), the gradient, and, after the last of a step, the update.

        Adds this rank's terms to `sums`. Returns the outcome of the update, None inside an accumulation.
        """
        with self.speed.part("forward"):
            terms = engine.forward(**batch.arguments(decodes=now.decodes), prior_pull=now.prior_pull)
            found = objective.loss_of(terms, batch.weight_B, now)
        # The engine averages over the ranks. Micro batches may differ in size, but each sentence counts the same.
        with self.speed.part("backward"):
            engine.backward(found.loss * (self.setup.ranks.world / now.sentences), is_last)
        with self.speed.part("update"):
            outcome = engine.step(now.lr, now.half)
        if outcome is not None and self.setup.ranks.is_main:
            sums.add(grad_norm=outcome.grad_norm)  # read with the other sums, in one copy
        sums.add(**found.sums, tokens=batch.tokens, **extents(batch.input_ids_BT.shape, batch.labels_BT.shape))
        return outcome

    def reduce(self, sums: distributed.NamedSums) -> tuple[dict[str, torch.Tensor], Requests]:
        """The sums over all ranks, and what the ranks request. The one collective of a step outside the engine."""
        sums.add(requests=self.saver.requests(stop=self.stop.raised is not None))
        totals = sums.reduce()
        return totals, self.saver.agreed(totals["requests"].tolist())

    def validate(self, plan: PhasePlan, engine: PhaseEngine) -> dict[str, Any]:
        """Measure the first sentences of the valid split; the best becomes model/ (export.py). Returns the metrics."""
        setup, state = self.setup, self.state
        model = _model_of(engine)
        with explain_out_of_memory("a validation", f"lower evaluation.tokens (now {setup.config.evaluation.tokens})"):
            metrics = evaluate(
                model,
                setup.valid,
                setup.ranks,
                setup.config.evaluation,
                seed=setup.config.seed,
                full=False,
                beta=plan.beta.at(state.step, state.beta),
                pad_id=setup.tokenizer.pad_token_id,
                yardstick_N=setup.yardstick_N,
            ).metrics
        sources = [setup.valid.text(i) for i in range(min(SHOWN_TEXTS, len(setup.valid)))]
        pairs, samples = latents.shown(model, setup.tokenizer, sources, setup.config.seed, setup.config.data.max_tokens)
        step = plan.first_step + state.step
        self.monitor.evaluation(step, "valid", metrics, metrics.get("kl_per_dim"), pairs, samples)
        self.status.validated(step, metrics)
        if state.aggressive:
            state.aggressive.after_validation(metrics.get("mi"))
        self.exporter.validated(plan, engine, state, metrics)
        return metrics

    # What is kept

    def save(self, plan: PhasePlan, engine: PhaseEngine, valid: dict[str, Any], must: bool) -> None:
        """Begin a checkpoint. `valid` is the validation at this step, if there was one: it rates the checkpoint."""
        progress = {
            "state": asdict(self.state),
            "global_step": plan.first_step + self.state.step,
            "data": self.setup.train.facts,
            "valid": {key: valid[key] for key in checkpoint.BETTER if key in valid},
        }
        self.saver.begin(partial(engine.part, self.left_out), progress, must)

    def restore(self) -> Start:
        """Continue from the newest checkpoint, if there is one."""
        setup = self.setup
        found = checkpoint.resume(setup.run_dir, setup.ranks, setup.train.facts, self.changed_data)
        if found is None:
            self.monitor.resume_from(0)
            return Start()
        stored, progress = found
        self.state = TrainState.read(progress["state"])
        plan = setup.plans[self.state.phase]
        resumption.check_length(plan, self.state.step)
        self.state.choice = self.exporter.resume(plan, self.state.choice)
        self.monitor.resume_from(progress["global_step"])
        self.saver.newest = checkpoint.name_of(progress["global_step"])
        return Start(stored, resumes=True)

    def log(self, plan: PhasePlan, epoch: float) -> None:
        """Report the means over the steps since the last row."""
        state = self.state
        row: dict[str, Any] = {"phase": plan.name, "step": plan.first_step + state.step, "epoch": round(epoch, 4)}
        row |= window.row_of(state.window, self.decodes) | self.speed.row()
        row["skipped_steps"] = state.skipped
        if state.aggressive:
            row["aggressive"] = float(state.aggressive.is_on)
        state.window = {}
        self.monitor.log(row)
        self._write_status("running", epoch=row["epoch"])

    # Parts of a step

    def _step_settings(self, plan: PhasePlan, sentences: int) -> StepSettings:
        state = self.state
        return StepSettings(
            sentences=sentences,
            free_bits=plan.settings.free_bits,
            beta=plan.beta.at(state.step, state.beta),
            lr=plan.learning_rate.at(state.step),
            half=state.aggressive.half() if state.aggressive else None,
            held_L=None if state.held_kl is None else distributed.to_device(state.held_kl, self.setup.ranks.device),
            held_nats=None if state.held_kl is None else sum(state.held_kl),
            decodes=self.decodes,
        )

    def _new_sums(self, engine: PhaseEngine) -> distributed.NamedSums:
        sizes = objective.sizes_of_sums(_model_of(engine).latent_dim, self.has_prior)
        sizes |= dict.fromkeys(("tokens", "grad_norm", *EXTENTS), 1)
        return distributed.NamedSums(self.setup.ranks.device, **sizes, requests=len(Requests._fields))

    def _count_applied(self, plan: PhasePlan, totals: dict[str, torch.Tensor], now: StepSettings) -> None:
        """Advance the schedules by an applied step and add it to the next row of the log."""
        state = self.state
        kl_L = totals["kl_L"] / now.sentences
        kl = float(totals["kl_sampled"]) / now.sentences if self.has_prior else float(kl_L.sum())
        sums = {name: float(total) for name, total in totals.items() if total.numel() == 1}
        state.skipped_in_row = 0
        state.step += 1
        state.held_kl = kl_L.tolist()
        if isinstance(plan.beta, Target):
            state.beta = plan.beta.carry(now.beta, kl)
        if state.aggressive and plan.settings.aggressive:
            state.aggressive.after_step(plan.settings.aggressive, sums["loss"], sums["tokens"])
        to_normal = float(kl_L.sum()) if self.has_prior else None
        window.add_step(state.window, sums, now.sentences, kl, now.beta, now.lr, to_normal)
        self.monitor.advance(1)

    def _improves(self, valid: dict[str, Any]) -> bool:
        """Whether a validation is better than all before it by `checkpoint.keep_best`; its score is recorded."""
        metric = self.setup.config.checkpoint.keep_best
        if metric is None or valid.get(metric) is None:
            return False
        score = checkpoint.BETTER[metric] * valid[metric]
        if self.state.best_kept is not None and score <= self.state.best_kept:
            return False
        self.state.best_kept = score
        return True

    def _end_stopped(self, plan: PhasePlan) -> None:
        self.saver.finish(must=True)
        self._write_status("stopped", self.stop.raised or "a signal to another rank")
        self.monitor.close()
        raise Stopped(
            f"stopped in phase {plan.name} at step {self.state.step} of {plan.steps}; run the same command to resume"
        )

    def _is_last(self, phase: int) -> bool:
        return phase == len(self.setup.plans) - 1

    def _write_status(
        self, word: str, reason: str | None = None, code: int | None = None, epoch: float | None = None
    ) -> None:
        self.status.write(word, self.state, reason=reason, code=code, epoch=epoch, checkpoint=self.saver.newest)


def _model_of(engine: PhaseEngine) -> T5VAE:
    model = engine.module
    assert isinstance(model, T5VAE)
    return model
