"""`vae-ds reconstruct`, `sample`, `interpolate`, `analogy`, `traverse` and `shift`: explore the latent space."""

import argparse
import fcntl
import os
import select
import stat
import sys
import termios
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ds.cli.options import SPLITS, above_zero, add_prior, positive
from vae_ds.cli.text_input import add_input, in_parts, lines_of
from vae_ds.cli.text_output import Output, Throughput, add_output, check_output
from vae_ds.cli.using import (
    BATCHES_AT_ONCE,
    Result,
    add_decoding,
    add_using,
    check_run,
    decoding_of,
    divided,
    for_each,
    joined,
    load,
)
from vae_ds.errors import ConfigError, DataError
from vae_ds.runtime import run_dirs

if TYPE_CHECKING:
    from vae_ds.textvae import TextVAE

INPUT_WAIT_S = 0.2


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_using(
        subparsers,
        "reconstruct",
        reconstruct,
        "encode sentences and decode them again",
        [
            'vae-ds reconstruct runs/demo "Return the name of the file."',
            "vae-ds reconstruct runs/demo --file texts.txt --to pairs.csv",
        ],
    )
    parser.add_argument(
        "text",
        nargs="*",
        metavar="TEXT",
        help="the sentences, or - for standard input (default: the first sentences of the run's split)",
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
    _add_files(parser)

    parser = add_using(subparsers, "sample", sample, "decode samples of the prior", ["vae-ds sample runs/demo -n 4"])
    parser.add_argument(
        *("-n", "--number"), type=positive, default=8, metavar="N", help="number of samples (default: %(default)s)"
    )
    add_prior(parser)
    add_decoding(parser)
    add_output(parser)

    parser = add_using(
        subparsers,
        "interpolate",
        interpolate,
        "decode points between the codes of two sentences",
        ['vae-ds interpolate runs/demo "The name of the file." "Returns true if both are equal."'],
    )
    parser.add_argument("text", nargs="*", metavar="TEXT", help="the sentences at the start and at the end")
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
    _add_files(parser, "two sentences with a tab between them per line")

    parser = add_using(
        subparsers,
        "analogy",
        analogy,
        "decode z_c + z_b - z_a: a is to b as c is to the result",
        [
            'vae-ds analogy runs/demo "Return the name." "Return the names." "Return the index."',
            "vae-ds analogy runs/demo --past past.txt --present present.txt --file texts.txt",
        ],
        "With two files, z_b - z_a is the difference of the mean codes of their sentences, times --factor.",
    )
    parser.add_argument("text", nargs="*", metavar="TEXT", help="the sentences a, b and c; with two files, any number")
    _add_direction(parser, "past", "present", required=False)
    _add_files(parser, "sentences, one per line (without two files: a, b and c with tabs between them)")

    parser = add_using(
        subparsers,
        "shift",
        shift,
        "move sentences along the difference of two groups of sentences",
        ["vae-ds shift runs/demo --negative bad.txt --positive good.txt --factor 1.5 --file texts.txt"],
        "Decodes z plus the factor times the mean code of the positive sentences minus that of the negative ones.",
    )
    parser.add_argument("text", nargs="*", metavar="TEXT", help="the sentences to move, or - for standard input")
    _add_direction(parser, "negative", "positive", required=True)
    _add_files(parser)

    parser = add_using(
        subparsers,
        "traverse",
        traverse,
        "vary one latent unit around the code of a sentence",
        ['vae-ds traverse runs/demo "Return the name of the file." --unit 3'],
    )
    parser.add_argument("text", nargs="*", metavar="TEXT", help="the sentence, or several, or - for standard input")
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
    _add_files(parser)


def _add_files(parser: argparse.ArgumentParser, what: str = "the sentences, one per line") -> None:
    add_decoding(parser)
    add_input(parser, what)
    add_output(parser)


def _add_direction(parser: argparse.ArgumentParser, start: str, end: str, required: bool) -> None:
    for name, dest in ((start, "negative"), (end, "positive")):
        parser.add_argument(
            f"--{name}",
            dest=dest,
            metavar="FILE",
            required=required,
            help=f"a file of sentences, one per line: the {'start' if dest == 'negative' else 'end'} of the direction",
        )
    parser.add_argument(
        "--factor", type=float, default=1.0, metavar="F", help="times the difference (default: %(default)g)"
    )


def reconstruct(arguments: argparse.Namespace) -> None:
    texts = arguments.text
    if not texts and arguments.file is None:
        check_run(arguments)
        run = Path(arguments.run)
        if not run_dirs.is_run(run):
            raise ConfigError(f"{run} is an exported model, which has no text of its own; give sentences")
        if _has_unread_input():
            print("standard input is not read; give the texts as arguments", file=sys.stderr, flush=True)
        check_output(arguments)
        from vae_ds.evaluation import finished_run

        texts = finished_run.sentences(run, arguments.source, arguments.number)

    def work(vae: "TextVAE", part: list[str], first: int) -> list[list[Result]]:
        made = vae.reconstruct(part, sampled=arguments.sampled, first=first, **decoding_of(arguments))
        return [
            [(f"text  {text}\n  ->  {one}\n", {"text": text, "reconstruction": one})]
            for text, one in zip(part, made, strict=True)
        ]

    for_each(arguments, texts, work, ("text", "reconstruction"))


def sample(arguments: argparse.Namespace) -> None:
    check_run(arguments)
    check_output(arguments)
    ranks = joined()
    vae, total = load(arguments, ranks), arguments.number
    counted = Throughput(ranks.is_main and arguments.to is not None)

    def made(size: int, first: int) -> list[str]:
        return vae.sample(size, first=first, **decoding_of(arguments))

    most = BATCHES_AT_ONCE * vae.batch
    sizes = (min(most, total - first) for first in range(0, total, most))
    with Output(arguments) if ranks.is_main else nullcontext() as output:
        for _, texts in divided(sizes, int, made, ranks):
            assert output is not None
            for text in texts:
                output.row(text, {"text": text})
            counted.add(len(texts))
    counted.tell(vae.device, skipped=False, world=ranks.world)


def interpolate(arguments: argparse.Namespace) -> None:
    steps = arguments.steps

    def work(vae: "TextVAE", part: list[list[str]], first: int) -> list[list[Result]]:
        from vae_ds import latents

        ends = [vae.encode([pair[side] for pair in part]) for side in range(2)]
        codes = [latents.between(a_L, b_L, steps, arguments.path) for a_L, b_L in zip(*ends, strict=True)]
        shares = [step / (steps - 1) for step in range(steps)]
        return [
            [(f"{share:4.2f}  {text}", {"share": share, "text": text}) for share, text in zip(shares, row, strict=True)]
            for row in _decoded(vae, codes, first, arguments)
        ]

    _each_group(arguments, work, ("share", "text"), 2, "an interpolation needs two sentences")


def analogy(arguments: argparse.Namespace) -> None:
    if (arguments.negative is None) != (arguments.positive is None):
        raise ConfigError("a direction needs two files; give --past FILE and --present FILE")
    if arguments.negative is not None:
        shift(arguments)
        return
    if arguments.factor != 1:
        raise ConfigError("--factor needs the files --past and --present")

    def work(vae: "TextVAE", part: list[list[str]], first: int) -> list[list[Result]]:
        za_NL, zb_NL, zc_NL = (vae.encode([texts[place] for texts in part]) for place in range(3))
        made = vae.decode(zc_NL + zb_NL - za_NL, first=first, **decoding_of(arguments))
        return [
            [(text, dict(zip("abc", texts, strict=True)) | {"text": text})]
            for texts, text in zip(part, made, strict=True)
        ]

    _each_group(arguments, work, ("a", "b", "c", "text"), 3, "an analogy needs three sentences")


def shift(arguments: argparse.Namespace) -> None:
    direction: list[Any] = []
    sides = [(file, lines_of(file, [])) for file in (arguments.negative, arguments.positive)]

    def work(vae: "TextVAE", part: list[str], first: int) -> list[list[Result]]:
        if not direction:
            start_L, end_L = (_mean_code(vae, *side) for side in sides)
            direction.append(end_L - start_L)
        made = vae.shift(part, direction[0], arguments.factor, first=first, **decoding_of(arguments))
        return [
            [(f"text  {source}\n  ->  {text}\n", {"source": source, "text": text})]
            for source, text in zip(part, made, strict=True)
        ]

    for_each(arguments, arguments.text, work, ("source", "text"))


def traverse(arguments: argparse.Namespace) -> None:
    unit = arguments.unit

    def work(vae: "TextVAE", part: list[str], first: int) -> list[list[Result]]:
        from vae_ds import latents

        codes = [latents.around(z_L, unit, arguments.reach, arguments.steps) for z_L in vae.encode(part)]
        return [
            [
                (f"z[{unit}] = {value:6.2f}  {text}", {"unit": unit, "z": value, "text": text})
                for value, text in zip(z_SL[:, unit].tolist(), row, strict=True)
            ]
            for z_SL, row in zip(codes, _decoded(vae, codes, first, arguments), strict=True)
        ]

    for_each(arguments, arguments.text, work, ("unit", "z", "text"))


def _each_group(arguments: argparse.Namespace, work: Any, columns: tuple[str, ...], size: int, lack: str) -> None:
    """`for_each` for lines of several texts; of the arguments, all texts are one group."""
    texts = arguments.text
    if arguments.file is None and texts != ["-"]:
        if len(texts) != size:
            raise ConfigError(f"{lack}; found {len(texts)}")
        check_run(arguments)
        for _ in lines_of(None, texts):
            pass  # an empty text is an error
        texts = ["\t".join(text.replace("\t", " ") for text in texts)]
    for_each(arguments, texts, work, columns, size)


def _decoded(vae: "TextVAE", codes: list[Any], first: int, arguments: argparse.Namespace) -> list[list[str]]:
    """The texts of groups of as many codes each, all decoded together; `first` counts groups."""
    import torch

    steps = len(codes[0])
    texts = vae.decode(torch.cat(codes), first=first * steps, **decoding_of(arguments))
    return [texts[start : start + steps] for start in range(0, len(texts), steps)]


def _mean_code(vae: "TextVAE", file: str, lines: Any) -> Any:
    """The mean code of the lines of a file, float64 (L,); blank lines are left out."""
    total: Any = 0.0
    count = 0
    for part in in_parts(lines, BATCHES_AT_ONCE * vae.batch):
        if texts := [line.text for line in part if line.error is None]:
            total, count = total + vae.encode(texts).double().sum(0), count + len(texts)
    if not count:
        raise DataError(f"{file} has only blank lines")
    return total / count


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
