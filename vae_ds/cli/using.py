"""What the commands that use a model have in common: options, the model, and texts that pass through it in parts.

Several ranks of a launcher divide the parts. Rank 0 writes the results, which do not depend on the number of ranks.
"""

import argparse
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vae_ds.cli.options import Command, add_command, add_json, add_run, positive
from vae_ds.cli.text_input import STDIN, Line, fields_of, in_parts, lines_of, source_of
from vae_ds.cli.text_output import Output, Throughput, check_output
from vae_ds.errors import ConfigError
from vae_ds.runtime import own_rank, run_dirs, slurm

if TYPE_CHECKING:
    from vae_ds.distributed import Ranks
    from vae_ds.textvae import TextVAE

Result = tuple[str, dict[str, Any]]
"""A line for people, and the facts for other programs."""

Part = TypeVar("Part")
Made = TypeVar("Made")

BATCHES_AT_ONCE = 16  # the texts of so many batches are in memory at the same time


def add_using(
    subparsers: Any, name: str, run: Command, summary: str, examples: Sequence[str], details: str = ""
) -> argparse.ArgumentParser:
    """Add a command that uses a model: RUN, `--device`, `--batch` and `--json`."""
    parser = add_command(subparsers, name, run, summary, details, examples)
    add_run(parser, "a run directory, an exported model, or one on the Hugging Face hub (OWNER/NAME)")
    parser.add_argument(
        "--revision", metavar="REV", help="a branch, a tag or a commit of a model on the hub (default: the newest)"
    )
    add_json(parser, "one JSON object per result, each on one line")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (auto: a GPU if there is one; default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="most texts in one forward pass; the results do not depend on it (default: 64 on a CPU, 256 on a GPU)",
    )
    return parser


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose tokens. `decoding_of` returns them."""
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="maximum number of tokens to generate (default: the maximum length of the training)",
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
    add_seed(parser)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add `--seed`."""
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of drawn codes and drawn tokens (default: %(default)s)"
    )


def decoding_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_decoding`, for the methods of `TextVAE`."""
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "beams", "seed")}


def check_run(arguments: argparse.Namespace) -> None:
    """Check that RUN has a model, before torch is loaded. Raises CheckpointError."""
    path = Path(arguments.run)
    if not path.exists() or arguments.revision is not None:
        from vae_ds.config import hub

        path = hub.folder_of(arguments.run, arguments.revision)
    run_dirs.model_of(path)


def load(arguments: argparse.Namespace, ranks: "Ranks | None" = None) -> "TextVAE":
    """The model of RUN on the device of `--device`: of several ranks, each has a GPU of its own."""
    from vae_ds.textvae import TextVAE

    device = arguments.device
    if ranks is not None and ranks.world > 1 and device != "cpu":
        device = str(ranks.device)
    prior, revision = getattr(arguments, "prior", None), arguments.revision
    return TextVAE.from_pretrained(arguments.run, device, arguments.batch, prior=prior, revision=revision)


def check_divisible(source: str | None) -> None:
    """Raise ConfigError if several ranks should read standard input."""
    if source == STDIN and slurm.is_launched(os.environ):
        raise ConfigError("several ranks cannot divide standard input; give a file")


def joined() -> "Ranks":
    """The ranks that a launcher has started, which this process joins; without a launcher, this process alone."""
    import torch

    from vae_ds import distributed

    if slurm.is_launched(os.environ):
        return distributed.start()
    return distributed.Ranks(0, 0, 1, torch.device("cpu"))


def divided(
    parts: Iterator[Part], size_of: Callable[[Part], int], work: Callable[[Part, int], Made], ranks: "Ranks"
) -> Iterator[tuple[Part, Made]]:
    """Apply `work` to the parts, each on one of the ranks. Yields each part with its result on rank 0, in their order.

    size_of: the number of texts of a part. `work` gets the number of texts before its part, which seeds depend on.
    The other ranks yield nothing, but they must exhaust the iterator too: it has a collective for every `world` parts.
    """
    from vae_ds import distributed

    first = 0
    while group := list(itertools.islice(parts, ranks.world)):
        *starts, first = itertools.accumulate(map(size_of, group), initial=first)
        made = work(group[ranks.rank], starts[ranks.rank]) if ranks.rank < len(group) else None
        gathered: list[Any] = distributed.gather_on_main(made)
        if ranks.is_main:
            yield from zip(group, gathered, strict=False)


@contextmanager
def lined_warnings() -> Iterator[None]:
    """Print each warning once, as one line on standard error, on rank 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("once", UserWarning)

        def show(message: Any, *_: Any, **__: Any) -> None:
            if own_rank() == "0":
                print(f"warning: {message}", file=sys.stderr)

        warnings.showwarning = show
        yield


def for_each(
    arguments: argparse.Namespace,
    texts: Sequence[str],
    work: Callable[["TextVAE", list[Any], int], list[list[Result]]],
    columns: Sequence[str],
    fields: int = 1,
    output_of: Callable[[argparse.Namespace, "TextVAE"], Output] | None = None,
) -> None:
    """Apply `work` to the texts, or to the lines of the file, in parts, and write its results.

    work: takes the model, some texts and the number of the first one among all, and returns the results of each text.
        With `fields` above 1, it takes lists of so many texts, which tabs separate in a file.
    columns: the columns of a CSV file.
    output_of: makes another output than `Output`.
    """
    source = source_of(arguments, texts)
    check_divisible(source)
    check_run(arguments)
    check_output(arguments)
    lines = lines_of(source, texts)
    ranks = joined()
    vae = load(arguments, ranks)
    counted = Throughput(ranks.is_main and (source is not None or arguments.to is not None))
    every = [*(["line"] if source else []), *columns]

    def read(part: list[Line]) -> tuple[list[Line], list[Any], list[Any]]:
        """The lines, what each of them has, and the texts among that."""
        found = [_fields(line, fields) for line in part]
        return part, found, [texts for texts in found if not isinstance(texts, Line)]

    parts = map(read, in_parts(lines, BATCHES_AT_ONCE * vae.batch))
    rounds = divided(
        parts, lambda part: len(part[2]), lambda part, first: work(vae, part[2], first) if part[2] else [], ranks
    )
    made_output: Output | nullcontext[None] = nullcontext()
    if ranks.is_main:
        made_output = Output(arguments) if output_of is None else output_of(arguments, vae)
    with made_output as output, lined_warnings():
        for (part, entries, _), results in rounds:
            assert output is not None
            of_texts = iter(results)
            for line, found in zip(part, entries, strict=True):
                number = {"line": line.number} if source else {}
                if not isinstance(found, Line):
                    for plain, facts in next(of_texts):
                        output.row(plain, number | facts, every)
                elif not arguments.skip_bad:
                    output.row(f"error: {found.error}", number | {"error": found.error}, every)
            counted.add(len(results), len(part) - len(results))
    counted.tell(vae.device, arguments.skip_bad, ranks.world)


def _fields(line: Line, count: int) -> Any:
    """The text of a line, its `count` texts, or a line with an error."""
    if line.error is not None:
        return line
    return line.text if count == 1 else fields_of(line, count)
