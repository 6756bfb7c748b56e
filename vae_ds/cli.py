"""The command line: `vae-ds COMMAND ...`, `python -m vae_ds COMMAND ...`, `deepspeed --module vae_ds COMMAND ...`.

Exit codes: 0 done; 2 the user's input is wrong; 1 a fault; 75 stopped on request, the same command resumes.
Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from vae_ds.errors import CheckpointError, ConfigError, Stopped, StorageError, UserError

EXIT_FAULT, EXIT_USER, EXIT_STOPPED = 1, 2, 75
WAIT_FOR_RANK0_S = 10.0


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Parse, run, and leave with the documented exit code."""
    code = run(list(sys.argv[1:] if argv is None else argv))
    _note_exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if _distributed():
        # A native thread of the collective library can abort an interpreter that ends in the ordinary way,
        # and that would hide the exit code.
        os._exit(code)
    sys.exit(code)


def run(words: Sequence[str]) -> int:
    """Run one command in this process and return its exit code; wrong arguments raise SystemExit(2)."""
    # DeepSpeed's launcher puts --local_rank=N in front; the environment says the same.
    arguments = _parser().parse_args([word for word in words if not word.startswith("--local_rank")])
    try:
        arguments.command(arguments)
    except UserError as error:
        _say_once(f"error: {error}")
        return EXIT_USER
    except BrokenPipeError:
        # The reader, such as `head`, has enough; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        _say_once("interrupted")
        return EXIT_STOPPED
    except Stopped as stop:
        _say_once(str(stop))
        _leave()
        return EXIT_STOPPED
    except StorageError as error:
        _say_once(f"error: {error}")
        _note_failure(arguments, error)
        return EXIT_FAULT
    except Exception as error:
        traceback.print_exc()
        _note_failure(arguments, error)
        return EXIT_FAULT
    _leave()
    return 0


def _note_exit(code: int) -> None:
    """Leave rank 0's exit code where our launcher asks for it: DeepSpeed's can exit 0 after a failure."""
    place = os.environ.get("VAE_DS_EXIT_FILE")
    if place and os.environ.get("RANK", "0") == "0":
        Path(place).write_text(str(code), encoding="ascii")


def _distributed() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def _leave() -> None:
    """Close the process group, where there is one; only after success, since it waits for every rank."""
    if _distributed():
        from vae_ds import runtime

        runtime.barrier()


def _say_once(message: str) -> None:
    """Print on rank 0. The others wait for it: the launcher ends all when one ends, the message must come first."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(WAIT_FOR_RANK0_S)


def _note_failure(arguments: argparse.Namespace, error: Exception) -> None:
    run_dir = getattr(arguments, "run_dir", None)
    if run_dir and Path(run_dir, "config.yaml").is_file():
        from vae_ds import records

        # On a full disk that is what failed, and there is no place to tell it.
        with suppress(OSError):
            records.write_status(Path(run_dir), "failed", reason=f"{type(error).__name__}: {error}")


# Commands


def _train(arguments: argparse.Namespace) -> None:
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
                print(f"# phase {plan.name}: {plan.steps} steps, {plan.steps_per_epoch} an epoch")
            print(f"# {ranks.world} ranks, {job.precision}, micro batch {job.micro}, accumulation {job.accumulation}")
        return
    trainer.train(config, arguments.run_dir, resume=arguments.resume, changed_data=arguments.changed_data)


def _pretrain(arguments: argparse.Namespace) -> None:
    from vae_ds import config as configuration
    from vae_ds.settings import PretrainConfig

    config = configuration.load(PretrainConfig, arguments.recipe, _overrides(arguments))
    arguments.run_dir = arguments.run_dir or str(Path("runs") / config.name)
    from vae_ds import pretrain

    pretrain.pretrain(config, Path(arguments.run_dir), arguments.resume, arguments.changed_data)


def _evaluate(arguments: argparse.Namespace) -> None:
    from vae_ds import jobs

    settings = {
        "iw_samples": arguments.iw_samples,
        "iw_sentences": arguments.iw_sentences,
        "batch": arguments.batch,
    }
    metrics = jobs.evaluate_run(
        Path(arguments.run), arguments.split, settings, recipe=arguments.recipe, yardstick=arguments.yardstick
    )
    if metrics is not None:
        from vae_ds import tables

        tables.print_metrics([arguments.run], arguments.split)


def _compare(arguments: argparse.Namespace) -> None:
    from vae_ds import tables

    tables.print_metrics(arguments.runs, arguments.split)


def _reconstruct(arguments: argparse.Namespace) -> None:
    from vae_ds import generate, jobs

    model, tokenizer = jobs.load_model(Path(arguments.run))
    texts = arguments.text or jobs.sentences(Path(arguments.run), arguments.source, arguments.number)
    drawn = {"sampled": arguments.sampled, "seed": arguments.seed}
    made = generate.reconstruct(model, tokenizer, texts, **drawn, **_decoding(arguments))
    for text, again in zip(texts, made, strict=True):
        print(f"text  {text}\n  ->  {again}\n")


def _sample(arguments: argparse.Namespace) -> None:
    from vae_ds import generate, jobs

    model, tokenizer = jobs.load_model(Path(arguments.run))
    print("\n".join(generate.sample(model, tokenizer, arguments.number, arguments.seed, **_decoding(arguments))))


def _interpolate(arguments: argparse.Namespace) -> None:
    from vae_ds import generate, jobs

    model, tokenizer = jobs.load_model(Path(arguments.run))
    ends, how = (arguments.first, arguments.last), _decoding(arguments)
    print("\n".join(generate.interpolate(model, tokenizer, *ends, arguments.steps, path=arguments.path, **how)))


def _analogy(arguments: argparse.Namespace) -> None:
    from vae_ds import generate, jobs

    model, tokenizer = jobs.load_model(Path(arguments.run))
    print(generate.analogy(model, tokenizer, arguments.a, arguments.b, arguments.c, **_decoding(arguments)))


def _traverse(arguments: argparse.Namespace) -> None:
    from vae_ds import generate, jobs

    model, tokenizer = jobs.load_model(Path(arguments.run))
    print("\n".join(generate.traverse(model, tokenizer, arguments.text, arguments.unit, **_decoding(arguments))))


def _decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "beams")}


def _bench_soak(arguments: argparse.Namespace) -> None:
    from vae_ds import bench

    result = bench.soak(
        arguments.recipe,
        Path(arguments.run_dir),
        overrides=_overrides(arguments),
        processes=arguments.processes,
        kill_every_s=60 * arguments.kill_every_minutes,
        seed=arguments.seed,
        compare=not arguments.no_compare,
    )
    print(json.dumps(asdict(result), indent=2))
    if result.same_weights is False:
        raise RuntimeError("the run that was killed ended with other weights than the undisturbed one")


def _export(arguments: argparse.Namespace) -> None:
    from vae_ds import jobs

    jobs.export(Path(arguments.run), Path(arguments.to))
    print(arguments.to)


def _status(arguments: argparse.Namespace) -> None:
    from vae_ds import records

    status = records.read_status(Path(arguments.run))
    if status is None:
        raise CheckpointError(f"{arguments.run}: no status.json; not a run directory")
    status = records.of_the_living(status)
    print(json.dumps(status))
    if status["state"] != "done":
        sys.exit({"stopped": EXIT_STOPPED}.get(status["state"], EXIT_FAULT))


def _recipes(arguments: argparse.Namespace) -> None:
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


# Arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vae-ds", description="Turn a pretrained T5 into a text variational autoencoder by finetuning alone."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("train", _train, "train a recipe; run again, it resumes"),
        ("pretrain", _pretrain, "pretrain a small T5 from nothing"),
    ):
        one = _command(commands, name, command, text)
        one.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
        one.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE", help="override a setting")
        one.add_argument("--run-dir", help="where the run is kept; default runs/NAME")
        one.add_argument("--deepspeed", metavar="FILE", help="zero0..zero3, a shipped ds_config's name, or a JSON file")
        one.add_argument("--resume", choices=("auto", "never"), default="auto")
        one.add_argument("--changed-data", action="store_true", help="resume though the training text has changed")
        one.add_argument("--dry-run", action="store_true", help="resolve and check everything, train nothing")

    one = _command(commands, "evaluate", _evaluate, "every metric of a run, on one split")
    one.add_argument("run", metavar="RUN", help="a run directory, or an exported model with --recipe")
    _add_split(one)
    one.add_argument("--iw-samples", type=_positive)
    one.add_argument("--iw-sentences", type=_positive)
    one.add_argument("--batch", type=_positive, help="sentences a forward pass")
    one.add_argument("--recipe", help="where the text comes from, for an exported model")
    one.add_argument("--yardstick", metavar="RUN", help="a run with injection `none`, evaluated on the same split")

    one = _command(commands, "compare", _compare, "one table of evaluated runs")
    one.add_argument("runs", nargs="+", metavar="RUN")
    _add_split(one)

    one = _generator(commands, "reconstruct", _reconstruct, "sentences through z and back")
    one.add_argument("text", nargs="*")
    one.add_argument("--from", dest="source", choices=("train", "valid", "test"), default="test")
    one.add_argument("-n", "--number", type=_positive, default=5)
    one.add_argument("--sampled", action="store_true", help="z drawn from the posterior; default its mean")
    one = _generator(commands, "sample", _sample, "sentences from the prior")
    one.add_argument("-n", "--number", type=_positive, default=8)
    one = _generator(commands, "interpolate", _interpolate, "the way from one sentence to another")
    one.add_argument("first")
    one.add_argument("last")
    one.add_argument("--steps", type=_positive, default=7)
    one.add_argument("--path", choices=("linear", "slerp"), default="linear")
    one = _generator(commands, "analogy", _analogy, "a is to b as c is to what?")
    for name in "abc":
        one.add_argument(name)
    one = _generator(commands, "traverse", _traverse, "one latent unit varied around a sentence")
    one.add_argument("text")
    one.add_argument("--unit", type=int, default=0)

    benches = commands.add_parser("bench", help="measure; see `vae-ds bench --help`").add_subparsers(
        required=True, metavar="BENCH"
    )
    one = _command(
        benches, "soak", _bench_soak, "a run whose ranks are killed again and again; checkpoints must come faster"
    )
    one.add_argument("recipe", nargs="?", default="demo")
    one.add_argument("--run-dir", default="runs/soak")
    one.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE", help="override a setting")
    one.add_argument("--deepspeed", metavar="FILE")
    one.add_argument("--processes", type=_positive, default=2)
    one.add_argument("--kill-every-minutes", type=float, default=3.0)
    one.add_argument("--seed", type=int, default=0, help="of who is killed and when")
    one.add_argument("--no-compare", action="store_true", help="do not train once more undisturbed to compare weights")

    one = _command(commands, "export", _export, "copy a run's model to a directory of its own")
    one.add_argument("run", metavar="RUN")
    one.add_argument("--to", required=True, metavar="DIR")
    one = _command(commands, "status", _status, "what became of a run; exits 0 only if it is done")
    one.add_argument("run", metavar="RUN")
    one = _command(commands, "recipes", _recipes, "list the shipped recipes, show one, or all keys")
    one.add_argument("action", choices=("list", "show", "keys"), nargs="?", default="list")
    one.add_argument("name", nargs="?")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    one: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    one.set_defaults(command=run)
    return one


def _generator(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
    one = _command(commands, name, run, text)
    one.add_argument("run", metavar="RUN", help="a run directory or an exported model")
    one.add_argument("--max-new-tokens", type=_positive, default=64)
    one.add_argument("--temperature", type=float, help="draw tokens; default greedy")
    one.add_argument("--top-p", type=float, help="with a temperature: nucleus sampling")
    one.add_argument("--beams", type=_positive, default=1)
    one.add_argument("--seed", type=int, default=0)
    return one


def _add_split(one: argparse.ArgumentParser) -> None:
    one.add_argument("--split", choices=("train", "valid", "test"), default="test")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
