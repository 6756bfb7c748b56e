"""What each command of the command line does, given its parsed arguments.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vae_ds.errors import CheckpointError, ConfigError, Failed
from vae_ds.exits import EXIT_FAULT, EXIT_STOPPED, own_rank
from vae_ds.stop import listening


def train(arguments: argparse.Namespace) -> None:
    stop = listening()
    from vae_ds import config as configuration
    from vae_ds.settings import RunConfig

    config = configuration.load(RunConfig, arguments.recipe, _overrides(arguments))
    arguments.run_dir = arguments.run_dir or str(Path("runs") / config.name)
    from vae_ds import runtime, trainer

    if arguments.dry_run:
        ranks = runtime.start()
        job = trainer.prepare(config, Path(arguments.run_dir), ranks)
        if ranks.is_main:
            print(configuration.dump(config))
            for plan in job.plans:
                of_epoch = f", {plan.steps_per_epoch} an epoch" if plan.steps_per_epoch else ""
                print(f"# phase {plan.name}: {plan.steps} steps{of_epoch}")
            print(f"# {ranks.world} ranks, {job.precision}, micro batch {job.micro}, accumulation {job.accumulation}")
        return
    how: dict[str, Any] = {name: getattr(arguments, name) for name in ("resume", "changed_data", "until")}
    trainer.train(config, arguments.run_dir, stop=stop, **how)


def pretrain(arguments: argparse.Namespace) -> None:
    stop = listening()
    from vae_ds import config as configuration
    from vae_ds.settings import PretrainConfig

    config = configuration.load(PretrainConfig, arguments.recipe, _overrides(arguments))
    arguments.run_dir = arguments.run_dir or str(Path("runs") / config.name)
    from vae_ds import pretrain

    pretrain.pretrain(config, Path(arguments.run_dir), arguments.resume, arguments.changed_data, stop)


def evaluate(arguments: argparse.Namespace) -> None:
    from vae_ds import jobs

    settings = {
        "iw_samples": arguments.iw_samples,
        "iw_sentences": arguments.iw_sentences,
        "batch": arguments.batch,
        "bleu_sentences": arguments.bleu_sentences,
        "samples": arguments.samples,
    }
    metrics = jobs.evaluate_run(
        Path(arguments.run), arguments.split, settings, recipe=arguments.recipe, yardstick=arguments.yardstick
    )
    if metrics is not None:
        from vae_ds import tables

        tables.print_metrics([arguments.run], arguments.split, units=True)


def compare(arguments: argparse.Namespace) -> None:
    from vae_ds import tables

    tables.print_metrics(arguments.runs, arguments.split)


def report(arguments: argparse.Namespace) -> None:
    from vae_ds import report

    print(report.write(arguments.runs, Path(arguments.to), arguments.split))


def reconstruct(arguments: argparse.Namespace) -> None:
    from vae_ds import generate, jobs

    model, tokenizer = jobs.load_model(Path(arguments.run))
    texts = arguments.text or jobs.sentences(Path(arguments.run), arguments.source, arguments.number)
    drawn = {"sampled": arguments.sampled, "seed": arguments.seed}
    made = generate.reconstruct(model, tokenizer, texts, **drawn, **_decoding(arguments))
    for text, again in zip(texts, made, strict=True):
        print(f"text  {text}\n  ->  {again}\n")


def sample(arguments: argparse.Namespace) -> None:
    from vae_ds import generate, jobs

    model, tokenizer = jobs.load_model(Path(arguments.run))
    print("\n".join(generate.sample(model, tokenizer, arguments.number, arguments.seed, **_decoding(arguments))))


def interpolate(arguments: argparse.Namespace) -> None:
    from vae_ds import generate, jobs

    model, tokenizer = jobs.load_model(Path(arguments.run))
    ends, how = (arguments.first, arguments.last), _decoding(arguments)
    print("\n".join(generate.interpolate(model, tokenizer, *ends, arguments.steps, path=arguments.path, **how)))


def analogy(arguments: argparse.Namespace) -> None:
    from vae_ds import generate, jobs

    model, tokenizer = jobs.load_model(Path(arguments.run))
    print(generate.analogy(model, tokenizer, arguments.a, arguments.b, arguments.c, **_decoding(arguments)))


def traverse(arguments: argparse.Namespace) -> None:
    from vae_ds import generate, jobs

    model, tokenizer = jobs.load_model(Path(arguments.run))
    print("\n".join(generate.traverse(model, tokenizer, arguments.text, arguments.unit, **_decoding(arguments))))


def _decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "beams")}


def submit(arguments: argparse.Namespace) -> None:
    from vae_ds import config as configuration
    from vae_ds import submit as jobs
    from vae_ds.settings import RunConfig

    overrides = _overrides(arguments)
    config = configuration.load(RunConfig, arguments.recipe, overrides)
    run_dir = Path(arguments.run_dir or Path("runs") / config.name)
    wanted = jobs.Wanted(arguments.nodes, arguments.gpus_per_node, arguments.tasks_per_node, arguments.time)
    train = [arguments.recipe, "--run-dir", str(run_dir), *(("--set", *overrides) if overrides else ())]
    text = jobs.batch_file(config, train, run_dir, wanted, jobs.site(arguments.site), arguments.sbatch)
    if arguments.dry_run:
        print(text, end="")
        return
    job = jobs.submit(text, run_dir)
    print(f"job {job.job}: squeue -j {job.job}")
    print(f"log {job.log}\nfollow it: tail -F {job.rank_log}\nsave and end it: scancel {job.job}")


def study(arguments: argparse.Namespace) -> None:
    stop = listening()
    from vae_ds import study as studies

    chosen = {"data.corpus": arguments.corpus, "data.path": arguments.path, "model.base": arguments.base}
    settings = {key: value for key, value in chosen.items() if value is not None}
    config = studies.load(arguments.study, settings, arguments.add, arguments.length, arguments.seeds)
    name = f"{config.name}-{arguments.corpus}" if arguments.corpus else config.name
    root, extra = Path(arguments.runs or Path("runs") / name), arguments.set or ()
    if arguments.run is not None:
        row = studies.row_of(config, arguments.run)
        arguments.run_dir = str(root / row.name)
        studies.run(config, row, root, stop, extra)
        return
    studies.check(config, extra)
    if arguments.here:
        failed = studies.run_all(config, root, stop, extra)
        if own_rank() == "0":
            _report(root)
        if failed:
            raise Failed(f"{len(failed)} of the runs failed: {', '.join(failed)}")
    elif arguments.report:
        _report(root)
    elif left := _listed(studies.states(config, root)):
        _submit_study(arguments, name, root, left)
    else:
        print(f"\nall done; tables and figures: vae-ds {shlex.join(_study_words(arguments, root))} --report")


def _listed(states: Sequence[tuple[Any, str]]) -> list[list[int]]:
    """Print a study's runs; the numbers of those that are not done: first what others are measured against."""
    left: list[list[int]] = [[], []]
    for number, (row, state) in enumerate(states):
        print(f"{number:4} {state:8} {row.name}")
        if state != "done":
            left[row.yardstick is not None].append(number)
    return [numbers for numbers in left if numbers]


def _report(root: Path) -> None:
    from vae_ds import report

    print(f"\n{report.write([root], root / 'report')}")


def _submit_study(arguments: argparse.Namespace, name: str, root: Path, left: Sequence[Sequence[int]]) -> None:
    """Submit the runs that are left, an array for each part of them, which waits for the one before; or say how to."""
    from vae_ds import submit as jobs

    words = _study_words(arguments, root)
    if not arguments.slurm:
        print(f"\nto train what is left, here or on a cluster: vae-ds study {shlex.join(words)} --here, or --slurm")
        return
    wanted = jobs.Wanted(arguments.nodes, arguments.gpus_per_node, arguments.tasks_per_node, arguments.time)
    place = jobs.site(arguments.site)
    options = wanted, place, arguments.parallel, arguments.sbatch
    job = None
    for text in [jobs.array_file(name, words, numbers, root, *options) for numbers in left]:
        if arguments.dry_run:
            print(f"\n{text}", end="")
            continue
        after, file = (f", after {job}", "submit-rest.sbatch") if job else ("", "submit.sbatch")
        job = jobs.submit(text, root, file, after=job).job
        print(f"\narray {job}{after}: squeue -j {job}\nlogs in {root / 'logs'}\nsave and end it: scancel {job}")


def _study_words(arguments: argparse.Namespace, root: Path) -> list[str]:
    """The arguments that make the same study again, without what to do with it."""
    words = [arguments.study, "--runs", str(root)]
    for option in ("corpus", "path", "base", "length"):
        value = getattr(arguments, option)
        words += [f"--{option}", str(value)] if value is not None else []
    words += ["--seeds", *map(str, arguments.seeds)] if arguments.seeds else []
    for row in arguments.add:
        words += ["--add", *row]
    return words + (["--set", *arguments.set] if arguments.set else [])


def bench_soak(arguments: argparse.Namespace) -> None:
    from vae_ds import bench

    result = bench.soak(
        arguments.recipe,
        Path(arguments.run_dir),
        overrides=_overrides(arguments),
        processes=arguments.processes,
        kill_every_s=60 * arguments.kill_every_minutes,
        minutes=arguments.minutes,
        seed=arguments.seed,
        compare=not arguments.no_compare,
    )
    print(json.dumps(asdict(result), indent=2))
    if result.same_weights is False:
        raise RuntimeError("the run that was killed ended with other weights than the undisturbed one")


def export(arguments: argparse.Namespace) -> None:
    from vae_ds import jobs

    jobs.export(Path(arguments.run), Path(arguments.to))
    print(arguments.to)


def status(arguments: argparse.Namespace) -> None:
    from vae_ds import records

    status = records.read_status(Path(arguments.run))
    if status is None:
        raise CheckpointError(f"{arguments.run}: no status.json; not a run directory")
    status = records.of_the_living(status)
    print(json.dumps(status))
    if status["state"] != "done":
        sys.exit({"stopped": EXIT_STOPPED}.get(status["state"], EXIT_FAULT))


def doctor(arguments: argparse.Namespace) -> None:
    from vae_ds import doctor

    if arguments.worker:
        doctor.work(arguments.timeout)
        return
    run_dir = Path(arguments.run_dir or ("runs" if Path("runs").is_dir() else "."))
    how = {"with_ranks": arguments.ranks, "timeout_s": arguments.timeout, "as_json": arguments.json}
    if not doctor.examine(run_dir, **how):
        sys.exit(EXIT_FAULT)


def recipes(arguments: argparse.Namespace) -> None:
    from vae_ds import config as configuration

    if arguments.action == "keys":
        print("\n".join(f"| `{key}` | {default} | {text} |" for key, default, text in configuration.reference()))
        return
    if arguments.action == "show":
        if not arguments.name:
            raise ConfigError("recipes show NAME: which one? `vae-ds recipes list` names them")
        print(configuration.read_recipe(arguments.name)[0], end="")
        return
    for name in configuration.shipped_recipes():
        first = configuration.read_recipe(name)[0].splitlines()[0].removeprefix("# ")
        print(f"{name:16} {first}")


def _overrides(arguments: argparse.Namespace) -> list[str]:
    chosen = list(arguments.set or [])
    return [*chosen, f"deepspeed={arguments.deepspeed}"] if arguments.deepspeed else chosen
