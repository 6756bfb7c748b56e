"""A start without a training: every check of a start, and what the run would be."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vae_ds import config as configuration
from vae_ds import distributed
from vae_ds.config import RunConfig
from vae_ds.data import TokenSet
from vae_ds.model import is_adapter, skeleton
from vae_ds.training import checkpoint, phases, resumption
from vae_ds.training.memory import describe_limits
from vae_ds.training.preparation import Setup, prepare

PERCENTILES = (50, 95, 99)


def dry_run(
    recipe: str | RunConfig,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    changed_data: bool = False,
    until: str | None = None,
    memory: Callable[[RunConfig, str, int, int], list[str]] | None = None,
) -> str:
    """Check what `train` would check with the same arguments. Returns the recipe and the facts of the run as YAML.

    The facts are comments: sentences and tokens of each split, parameters, steps and epochs, ranks. The data are
    prepared, as for a training. A collective. Raises UserError.

    memory: gives further facts, from the resolved recipe, precision, number of ranks and micro batch.
    """
    config = recipe if isinstance(recipe, RunConfig) else configuration.load(RunConfig, recipe, overrides)
    config = configuration.absolute(config)
    directory = Path(run_dir or Path("runs") / config.name)
    ranks = distributed.start()
    last = resumption.last_phase(config, until)
    is_done = resumption.is_done(
        directory, config, resumption.FREE, resumption.ends(config), resume, tell=ranks.is_main
    )
    setup = prepare(config, directory, ranks)
    sizes = {name: parameter.numel() for name, parameter in skeleton(setup.config.model).named_parameters()}
    of_run = [_start(setup, is_done, changed_data), *_data(setup)]
    facts = [*of_run, _model(sizes), *_adapters(sizes), *_phases(setup, last, sizes), _ranks(setup)]
    if memory is not None:
        share = -(-setup.config.batch.global_size // ranks.world)
        micro = setup.limits.count(setup.config.data.max_tokens, share)
        facts += memory(setup.config, setup.precision, ranks.world, micro)
    return "\n".join([configuration.dump(config).rstrip(), *(f"# {fact}" for fact in facts)])


def _start(setup: Setup, is_done: bool, changed_data: bool) -> str:
    """Where the run would start, checked against its newest checkpoint."""
    found = checkpoint.newest(setup.run_dir, verify=False)
    if is_done:
        return f"start: nothing to do, the run in {setup.run_dir} is done"
    if found is None:
        return f"start: a new run in {setup.run_dir}"
    progress = found.manifest["progress"]
    checkpoint.check_data(found.path, progress["data"], setup.train.facts, changed_data)
    state = progress["state"]
    plan = setup.plans[state["phase"]]
    resumption.check_length(plan, state["step"])
    return f"start: resumes from {found.path}, phase {plan.name}, step {state['step']} of {plan.steps}"


def _data(setup: Setup) -> list[str]:
    splits = {"train": setup.train_tokens, "valid": setup.valid}
    return [
        f"{name}: {'a stream, whose sentences are not counted' if tokens is None else describe(tokens)}"
        for name, tokens in splits.items()
    ]


def describe(tokens: TokenSet) -> str:
    """One line on a split: sentences, tokens per sentence, the share of sentences cut and of tokens unknown."""
    shown = np.percentile(tokens.lengths_N, PERCENTILES).round().astype(int)
    lengths = ", ".join(f"{percent}%: {length}" for percent, length in zip(PERCENTILES, shown, strict=True))
    unknown = tokens.unknown / tokens.target_tokens
    return (
        f"{len(tokens):,} sentences, {np.mean(tokens.lengths_N):.1f} tokens per sentence ({lengths}), "
        f"{np.mean(tokens.truncated_N):.2%} of the sentences cut, {unknown:.2%} of the tokens unknown"
    )


def _model(sizes: dict[str, int]) -> str:
    counts: dict[str, int] = {}
    for name, size in sizes.items():
        group = phases.group_of(name)
        counts[group] = counts.get(group, 0) + size
    parts = ", ".join(f"{group} {count:,}" for group, count in counts.items())
    return f"model: {sum(counts.values()):,} parameters: {parts}"


def _adapters(sizes: dict[str, int]) -> list[str]:
    of_stacks: dict[str, list[int]] = {}
    for name, size in sizes.items():
        if is_adapter(name):
            of_stacks.setdefault(phases.group_of(name), []).append(size)
    # An adapter is two matrices.
    parts = [f"{stack} {sum(found):,} in {len(found) // 2} layers" for stack, found in of_stacks.items()]
    return [f"adapters: {', '.join(parts)}; the other weights of these stacks and the embeddings stay"] if parts else []


def _phases(setup: Setup, last: int, sizes: dict[str, int]) -> list[str]:
    told = []
    for plan in setup.plans:
        frozen = phases.frozen_names(sizes, plan.settings.freeze)
        epochs = f", {plan.steps / plan.steps_per_epoch:.2f} epochs" if plan.steps_per_epoch else ""
        trained = sum(count for name, count in sizes.items() if name not in frozen)
        left_out = "" if plan.index <= last else ", not in this start (--until)"
        told.append(f"phase {plan.name}: {plan.steps} steps{epochs}, trains {trained:,} parameters{left_out}")
    return told


def _ranks(setup: Setup) -> str:
    return (
        f"ranks: {setup.ranks.world}, {setup.precision}, {setup.config.batch.global_size} sentences per step, at most "
        f"{describe_limits(setup)} per rank and forward pass"
    )
