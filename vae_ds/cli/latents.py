"""`vae-ds reconstruct`, `sample`, `interpolate`, `analogy` and `traverse`: explore the latent space of a model."""

import argparse
import fcntl
import json
import os
import select
import stat
import sys
import termios
from pathlib import Path
from typing import Any

from vae_ds.cli.options import SPLITS, Command, above_zero, add_command, add_json, add_run, positive
from vae_ds.errors import ConfigError
from vae_ds.runtime import run_dirs

INPUT_WAIT_S = 0.2


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
    parser.add_argument(
        "--steps", type=positive, default=7, metavar="N", help="number of values of the unit (default: %(default)s)"
    )
    parser.add_argument(
        "--reach",
        type=above_zero,
        default=3.0,
        metavar="R",
        help="distance of the first and last value from that of the sentence, in standard deviations of the prior "
        "(default: %(default)g)",
    )


def _add_generator(subparsers: Any, name: str, run: Command, summary: str, example: str) -> argparse.ArgumentParser:
    parser = add_command(subparsers, name, run, summary, examples=[example])
    add_run(parser, "a run directory or an exported model")
    add_json(parser, "one JSON object per result, each on one line")
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
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of drawn codes and drawn tokens (default: %(default)s)"
    )
    return parser


def reconstruct(arguments: argparse.Namespace) -> None:
    run = _run_of(arguments)
    if not arguments.text:
        if not run_dirs.is_run(run):
            raise ConfigError(f"{run} is an exported model, which has no text of its own; give sentences")
        if _has_unread_input():
            print("standard input is not read; give the texts as arguments", file=sys.stderr, flush=True)
    from vae_ds import latents
    from vae_ds.evaluation import finished_run

    model, tokenizer = finished_run.load_model(run)
    texts = arguments.text or finished_run.sentences(run, arguments.source, arguments.number)
    decoded = latents.reconstruct(model, tokenizer, texts, sampled=arguments.sampled, **_decoding(arguments))
    for text, reconstruction in zip(texts, decoded, strict=True):
        _show(arguments, f"text  {text}\n  ->  {reconstruction}\n", text=text, reconstruction=reconstruction)


def sample(arguments: argparse.Namespace) -> None:
    model = _model(arguments)
    from vae_ds import latents

    for text in latents.sample(*model, arguments.number, **_decoding(arguments)):
        _show(arguments, text, text=text)


def interpolate(arguments: argparse.Namespace) -> None:
    model = _model(arguments)
    from vae_ds import latents

    ends, decoding = (arguments.first, arguments.last), _decoding(arguments)
    texts = latents.interpolate(*model, *ends, arguments.steps, path=arguments.path, **decoding)
    for number, text in enumerate(texts):
        share = number / (len(texts) - 1)
        _show(arguments, f"{share:4.2f}  {text}", share=share, text=text)


def analogy(arguments: argparse.Namespace) -> None:
    model = _model(arguments)
    from vae_ds import latents

    text = latents.analogy(*model, arguments.a, arguments.b, arguments.c, **_decoding(arguments))
    _show(arguments, text, a=arguments.a, b=arguments.b, c=arguments.c, text=text)


def traverse(arguments: argparse.Namespace) -> None:
    model = _model(arguments)
    from vae_ds import latents

    how = {"reach": arguments.reach, "steps": arguments.steps, **_decoding(arguments)}
    for value, text in zip(*latents.traversal(*model, arguments.text, arguments.unit, **how), strict=True):
        _show(arguments, f"z[{arguments.unit}] = {value:6.2f}  {text}", unit=arguments.unit, z=value, text=text)


def _show(arguments: argparse.Namespace, line: str, **facts: Any) -> None:
    """Print a result: a line, or with `--json` its facts as one JSON object on one line."""
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else line)


def _has_unread_input() -> bool:
    """Whether a pipe or a file with data is connected to standard input. Batch systems connect /dev/null instead."""
    try:
        kind = os.fstat(0)
        if stat.S_ISREG(kind.st_mode):
            return kind.st_size > os.lseek(0, 0, os.SEEK_CUR)
        if not stat.S_ISFIFO(kind.st_mode):
            return False
        # The program at the other end of the pipe may have started later than this one.
        ready, _, _ = select.select([0], [], [], INPUT_WAIT_S)
        waiting = fcntl.ioctl(0, termios.FIONREAD, bytes(4))
        return bool(ready) and int.from_bytes(waiting, sys.byteorder) > 0
    except (OSError, ValueError):
        return False


def _run_of(arguments: argparse.Namespace) -> Path:
    """The RUN. Raises CheckpointError if it has no model, before torch is loaded."""
    run_dirs.model_of(Path(arguments.run))
    return Path(arguments.run)


def _model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    run = _run_of(arguments)
    from vae_ds.evaluation import finished_run

    return finished_run.load_model(run)


def _decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "beams", "seed")}
