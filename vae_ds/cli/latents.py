"""`vae-ds reconstruct`, `sample`, `interpolate`, `analogy` and `traverse`: explore the latent space of a model."""

import argparse
from pathlib import Path
from typing import Any

from vae_ds.cli.options import SPLITS, Command, add_command, positive


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = _add_generator(
        subparsers,
        "reconstruct",
        reconstruct,
        "encode sentences and decode them again",
        'vae-ds reconstruct runs/demo "Return the name of the file."',
    )
    parser.add_argument(
        "text", nargs="*", metavar="TEXT", help="the sentences (default: the first sentences of the run's split)"
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=SPLITS,
        default="test",
        help="the split of the sentences without TEXT (default: %(default)s)",
    )
    parser.add_argument(
        *("-n", "--number"),
        type=positive,
        default=5,
        metavar="N",
        help="number of sentences without TEXT (default: %(default)s)",
    )
    parser.add_argument("--sampled", action="store_true", help="draw z from the posterior instead of taking its mean")

    parser = _add_generator(subparsers, "sample", sample, "decode samples of the prior", "vae-ds sample runs/demo -n 4")
    parser.add_argument(
        *("-n", "--number"), type=positive, default=8, metavar="N", help="number of samples (default: %(default)s)"
    )

    parser = _add_generator(
        subparsers,
        "interpolate",
        interpolate,
        "decode points between the codes of two sentences",
        'vae-ds interpolate runs/demo "The name of the file." "Returns true if both are equal."',
    )
    parser.add_argument("first", metavar="FIRST", help="the sentence at the start")
    parser.add_argument("last", metavar="LAST", help="the sentence at the end")
    parser.add_argument(
        "--steps",
        type=positive,
        default=7,
        metavar="N",
        help="number of points, with both ends (default: %(default)s)",
    )
    parser.add_argument(
        "--path",
        choices=("linear", "slerp"),
        default="linear",
        help="along a line or along an arc, by spherical interpolation (default: %(default)s)",
    )

    parser = _add_generator(
        subparsers,
        "analogy",
        analogy,
        "decode z_c + z_b - z_a: a is to b as c is to the result",
        'vae-ds analogy runs/demo "Return the name." "Return the names." "Return the index."',
    )
    for name in "abc":
        parser.add_argument(name, metavar=name.upper(), help=f"the sentence {name}")

    parser = _add_generator(
        subparsers,
        "traverse",
        traverse,
        "vary one latent unit around the code of a sentence",
        'vae-ds traverse runs/demo "Return the name of the file." --unit 3',
    )
    parser.add_argument("text", metavar="TEXT", help="the sentence")
    parser.add_argument(
        "--unit", type=int, default=0, metavar="N", help="the latent unit, counted from 0 (default: %(default)s)"
    )


def _add_generator(subparsers: Any, name: str, run: Command, summary: str, example: str) -> argparse.ArgumentParser:
    parser = add_command(subparsers, name, run, summary, examples=[example])
    parser.add_argument("run", metavar="RUN", help="a run directory or an exported model")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="maximum number of tokens to generate (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sample tokens at this temperature (default: greedy decoding)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="nucleus sampling with this probability; needs --temperature (default: all tokens)",
    )
    parser.add_argument(
        "--beams",
        type=positive,
        default=1,
        metavar="N",
        help="width of the beam search, 1 for none (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    return parser


def reconstruct(arguments: argparse.Namespace) -> None:
    from vae_ds import latents
    from vae_ds.evaluation import finished_run

    model, tokenizer = finished_run.load_model(Path(arguments.run))
    texts = arguments.text or finished_run.sentences(Path(arguments.run), arguments.source, arguments.number)
    posterior = {"sampled": arguments.sampled, "seed": arguments.seed}
    decoded = latents.reconstruct(model, tokenizer, texts, **posterior, **_decoding(arguments))
    for text, reconstruction in zip(texts, decoded, strict=True):
        print(f"text  {text}\n  ->  {reconstruction}\n")


def sample(arguments: argparse.Namespace) -> None:
    from vae_ds import latents

    texts = latents.sample(*_model(arguments), arguments.number, arguments.seed, **_decoding(arguments))
    print("\n".join(texts))


def interpolate(arguments: argparse.Namespace) -> None:
    from vae_ds import latents

    ends, decoding = (arguments.first, arguments.last), _decoding(arguments)
    texts = latents.interpolate(*_model(arguments), *ends, arguments.steps, path=arguments.path, **decoding)
    print("\n".join(texts))


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
