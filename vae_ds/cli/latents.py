"""`vae-ds reconstruct`, `sample`, `interpolate`, `analogy` and `traverse`: what a model's latent space holds."""

import argparse
from pathlib import Path
from typing import Any

from vae_ds.cli.options import SPLITS, Command, add_command, positive


def add(subparsers: Any) -> None:
    """Add the commands of this family."""
    one = _add_generator(subparsers, "reconstruct", reconstruct, "sentences through z and back")
    one.add_argument("text", nargs="*")
    one.add_argument("--from", dest="source", choices=SPLITS, default="test")
    one.add_argument("-n", "--number", type=positive, default=5)
    one.add_argument("--sampled", action="store_true", help="z drawn from the posterior; default its mean")
    one = _add_generator(subparsers, "sample", sample, "sentences from the prior")
    one.add_argument("-n", "--number", type=positive, default=8)
    one = _add_generator(subparsers, "interpolate", interpolate, "sentences between two sentences")
    one.add_argument("first")
    one.add_argument("last")
    one.add_argument("--steps", type=positive, default=7)
    one.add_argument("--path", choices=("linear", "slerp"), default="linear")
    one = _add_generator(subparsers, "analogy", analogy, "a is to b as c is to what?")
    for name in "abc":
        one.add_argument(name)
    one = _add_generator(subparsers, "traverse", traverse, "one latent unit varied around a sentence")
    one.add_argument("text")
    one.add_argument("--unit", type=int, default=0)


def _add_generator(subparsers: Any, name: str, run: Command, text: str) -> argparse.ArgumentParser:
    one = add_command(subparsers, name, run, text)
    one.add_argument("run", metavar="RUN", help="a run directory or an exported model")
    one.add_argument("--max-new-tokens", type=positive, default=64)
    one.add_argument("--temperature", type=float, help="draw tokens at this temperature; default greedy")
    one.add_argument("--top-p", type=float, help="with a temperature: nucleus sampling")
    one.add_argument("--beams", type=positive, default=1)
    one.add_argument("--seed", type=int, default=0)
    return one


def reconstruct(arguments: argparse.Namespace) -> None:
    from vae_ds import latents
    from vae_ds.evaluation import finished_run

    model, tokenizer = finished_run.load_model(Path(arguments.run))
    texts = arguments.text or finished_run.sentences(Path(arguments.run), arguments.source, arguments.number)
    drawn = {"sampled": arguments.sampled, "seed": arguments.seed}
    made = latents.reconstruct(model, tokenizer, texts, **drawn, **_decoding(arguments))
    for text, again in zip(texts, made, strict=True):
        print(f"text  {text}\n  ->  {again}\n")


def sample(arguments: argparse.Namespace) -> None:
    from vae_ds import latents

    texts = latents.sample(*_model(arguments), arguments.number, arguments.seed, **_decoding(arguments))
    print("\n".join(texts))


def interpolate(arguments: argparse.Namespace) -> None:
    from vae_ds import latents

    ends, how = (arguments.first, arguments.last), _decoding(arguments)
    print("\n".join(latents.interpolate(*_model(arguments), *ends, arguments.steps, path=arguments.path, **how)))


def analogy(arguments: argparse.Namespace) -> None:
    from vae_ds import latents

    print(latents.analogy(*_model(arguments), arguments.a, arguments.b, arguments.c, **_decoding(arguments)))


def traverse(arguments: argparse.Namespace) -> None:
    from vae_ds import latents

    print("\n".join(latents.traverse(*_model(arguments), arguments.text, arguments.unit, **_decoding(arguments))))


def _model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from vae_ds.evaluation import finished_run

    return finished_run.load_model(Path(arguments.run))


def _decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "beams")}
