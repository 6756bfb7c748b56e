"""`vae-ds encode`, `decode`, `neighbours` and `logprob`: the codes of texts and their probabilities."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ds.cli.options import add_prior, positive
from vae_ds.cli.text_input import add_input, in_parts, lines_of
from vae_ds.cli.text_output import ROWS, Output, Throughput, add_output, check_output
from vae_ds.cli.using import (
    BATCHES_AT_ONCE,
    Result,
    add_decoding,
    add_seed,
    add_using,
    check_divisible,
    check_run,
    decoding_of,
    divided,
    for_each,
    joined,
    load,
)
from vae_ds.errors import DataError
from vae_ds.runtime import records

if TYPE_CHECKING:
    import numpy as np

    from vae_ds.textvae import TextVAE

ARRAYS = (".npz", ".safetensors")


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_using(
        subparsers,
        "encode",
        encode,
        "print or store the codes of texts",
        ["vae-ds encode runs/demo --file texts.txt --to codes.safetensors"],
        "A file of codes has the fingerprint of the model, and the mean and scale of each unit.",
    )
    _add_texts(parser)
    parser.add_argument("--sampled", action="store_true", help="draw z from the posterior instead of taking its mean")
    add_seed(parser)
    add_output(parser, ARRAYS)

    parser = add_using(
        subparsers,
        "decode",
        decode,
        "decode stored codes",
        ["vae-ds decode runs/demo codes.safetensors --to texts.txt"],
    )
    parser.add_argument(
        "codes",
        metavar="CODES",
        help="a file (.npz, .safetensors, .jsonl, .csv), or - for JSON lines on standard input",
    )
    add_decoding(parser)
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out lines without a finite code (default: they keep their place in the output, with an error)",
    )
    add_output(parser)

    parser = add_using(
        subparsers,
        "neighbours",
        neighbours,
        "find the texts of a corpus with the nearest codes",
        ['vae-ds neighbours runs/demo "Return the name of the file." --corpus texts.txt -k 5'],
    )
    _add_texts(parser)
    parser.add_argument("--corpus", metavar="FILE", required=True, help="the texts to search, one per line")
    parser.add_argument(
        "--codes",
        metavar="CODES",
        help="the codes of these texts, as `vae-ds encode --file FILE --to CODES` writes them (default: encode them)",
    )
    parser.add_argument(
        "-k", type=positive, default=5, metavar="N", help="number of neighbours of each text (default: %(default)s)"
    )
    parser.add_argument(
        "--metric",
        choices=("euclidean", "cosine"),
        default="euclidean",
        help="the distance of two codes; cosine is 1 minus the cosine (default: %(default)s)",
    )
    add_output(parser)

    parser = add_using(
        subparsers,
        "logprob",
        logprob,
        "estimate the log probability of texts",
        ['vae-ds logprob runs/demo "Return the name of the file." --samples 500'],
        "In nats, by importance sampling: a lower bound on average, tighter for more samples.",
    )
    _add_texts(parser)
    parser.add_argument(
        "--samples", type=positive, default=100, metavar="N", help="codes per text (default: %(default)s)"
    )
    add_prior(parser)
    add_seed(parser)
    add_output(parser)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="*", metavar="TEXT", help="the texts, or - for standard input")
    add_input(parser)


def encode(arguments: argparse.Namespace) -> None:
    def work(vae: TextVAE, part: list[str], first: int) -> list[list[Result]]:
        z_CL = vae.encode(part, sampled=arguments.sampled, seed=arguments.seed, first=first)
        return [
            [(f"text  {text}\n  z   {_shown(row)}\n", {"text": text, "z": row, "model": vae.fingerprint})]
            for text, row in zip(part, z_CL.numpy(), strict=True)
        ]

    for_each(arguments, arguments.text, work, ("text", "z", "model"), output_of=CodeOutput)


class CodeOutput(Output):
    """Codes as lines for people, as rows, or as arrays. The facts of `row` have an array `z`, or an error."""

    def __init__(self, arguments: argparse.Namespace, vae: TextVAE) -> None:
        from vae_ds.textvae import code_files

        super().__init__(arguments)
        self._files, self._vae, self._count = code_files, vae, 0
        self._units = code_files.Units(vae.latent_dim)
        self._arrays = None
        if self.path is not None and self.suffix in ARRAYS:
            self._arrays = code_files.ArrayFile(self.path.parent, vae.latent_dim, vae.fingerprint)
        self._waiting: list[tuple[int, Any]] = []

    def row(self, plain: str, facts: dict[str, Any], columns: Sequence[str] = ()) -> None:
        """Store a code, or write it as a line."""
        z_L = facts.get("z")
        self._count += 1
        if self.path is not None:
            self._waiting.append((facts.get("line", self._count), z_L))
            if len(self._waiting) == self._files.AT_ONCE:
                self._store()
        if self._arrays is not None:
            return
        if z_L is not None:
            facts = facts | {"z": [float(f"{value:.9g}") for value in z_L]}
        if self.suffix == ".csv":
            names = [f"z{unit}" for unit in range(self._vae.latent_dim)]
            facts = {key: value for key, value in facts.items() if key != "z"} | dict(
                zip(names, facts.get("z", ()), strict=False)
            )
            columns = [name for column in columns for name in (names if column == "z" else [column])]
        super().row(plain, facts, columns)

    def finish(self) -> None:
        """Write the arrays, or the facts about the units beside the rows."""
        self._store()
        if self._arrays is not None:
            self._arrays.write(self.file, self.suffix)
        elif self.suffix in ROWS and self.path is not None:
            facts = {"dimension": self._vae.latent_dim, "model": self._vae.fingerprint, "codes": self._units.count}
            records.write_json(self.path.with_suffix(".units.json"), facts | self._units.facts())

    def _store(self) -> None:
        import numpy as np

        if not self._waiting:
            return
        line, z = zip(*self._waiting, strict=True)
        nothing_L = np.full(self._vae.latent_dim, np.nan, np.float32)
        z_CL = np.stack([nothing_L if z_L is None else z_L for z_L in z])
        self._waiting = []
        if self._arrays is not None:
            self._arrays.add(self._files.Part(np.array(line), z_CL))
        else:
            self._units.add(z_CL)


def decode(arguments: argparse.Namespace) -> None:
    check_divisible(arguments.codes)
    check_run(arguments)
    check_output(arguments)
    if arguments.codes != "-" and not Path(arguments.codes).is_file():
        raise DataError(f"{arguments.codes}: no such file; write codes with `vae-ds encode {arguments.run} --to FILE`")
    ranks = joined()
    vae = load(arguments, ranks)
    import numpy as np

    from vae_ds.textvae import code_files

    def made(part: tuple[np.ndarray, np.ndarray, np.ndarray], first: int) -> list[str]:
        _, good_C, z_CL = part
        return vae.decode(z_CL[good_C], first=first, **decoding_of(arguments)) if good_C.any() else []

    counted = Throughput(ranks.is_main)
    stored = code_files.read_codes(arguments.codes, vae.latent_dim, vae.fingerprint)
    parts = ((part.line_C, np.isfinite(part.z_CL).all(axis=1), part.z_CL) for part in stored)
    with Output(arguments) if ranks.is_main else nullcontext() as output:
        for (line_C, good_C, _), decoded in divided(parts, lambda part: int(part[1].sum()), made, ranks):
            assert output is not None
            texts = iter(decoded)
            for line, is_good in zip(line_C.tolist(), good_C.tolist(), strict=True):
                if is_good:
                    text = next(texts)
                    output.row(text, {"line": line, "text": text}, ("line", "text"))
                elif not arguments.skip_bad:
                    error = f"line {line} has no finite code"
                    output.row(f"error: {error}", {"line": line, "error": error}, ("line", "text"))
            counted.add(len(decoded), len(line_C) - len(decoded))
    counted.tell(vae.device, arguments.skip_bad, ranks.world)


def neighbours(arguments: argparse.Namespace) -> None:
    lines_of(arguments.corpus, [])  # a missing file is found before the model is loaded

    def work(vae: TextVAE, part: list[str], first: int) -> list[list[Result]]:
        import numpy as np

        from vae_ds.textvae import Nearest

        nearest = Nearest(vae.encode(part), arguments.k, arguments.metric)
        lines: list[np.ndarray] = [np.zeros(0, np.int64)]
        for line_C, z_CL in _corpus_codes(vae, arguments):
            nearest.add(z_CL)
            lines.append(line_C)
        if len(lines) == 1:
            raise DataError(f"{arguments.codes or arguments.corpus} has only blank lines")
        index_QK, distance_QK = nearest.found()
        line_QK = np.concatenate(lines)[index_QK.numpy()]
        wanted = set(line_QK.flatten().tolist())
        texts = {line.number: line.text for line in lines_of(arguments.corpus, []) if line.number in wanted}
        return [
            [
                _neighbour(rank, text, number, distance, texts)
                for rank, (number, distance) in enumerate(zip(numbers, distances, strict=True), start=1)
            ]
            for text, numbers, distances in zip(part, line_QK.tolist(), distance_QK.tolist(), strict=True)
        ]

    for_each(arguments, arguments.text, work, ("text", "rank", "distance", "corpus_line", "neighbour"))


def logprob(arguments: argparse.Namespace) -> None:
    def work(vae: TextVAE, part: list[str], first: int) -> list[list[Result]]:
        found = vae.log_prob(part, arguments.samples, seed=arguments.seed, first=first).tolist()
        return [
            [(f"{nats:10.2f}  {text}", {"text": text, "log_prob": nats})]
            for text, nats in zip(part, found, strict=True)
        ]

    for_each(arguments, arguments.text, work, ("text", "log_prob"))


def _corpus_codes(vae: TextVAE, arguments: argparse.Namespace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lines and codes of the corpus in parts: from the file of codes if there is one, otherwise encoded."""
    import numpy as np

    if arguments.codes is not None:
        from vae_ds.textvae import code_files

        for stored in code_files.read_codes(arguments.codes, vae.latent_dim, vae.fingerprint):
            good_C = np.isfinite(stored.z_CL).all(axis=1)
            if good_C.any():
                yield stored.line_C[good_C], stored.z_CL[good_C]
        return
    for part in in_parts(lines_of(arguments.corpus, []), BATCHES_AT_ONCE * vae.batch):
        if good := [line for line in part if line.error is None]:
            yield np.array([line.number for line in good]), vae.encode([line.text for line in good]).numpy()


def _neighbour(rank: int, text: str, number: int, distance: float, texts: dict[int, str]) -> Result:
    if number not in texts:
        raise DataError(f"the codes have a line {number}, which the corpus does not have; they are of another file")
    head = f"text  {text}\n" if rank == 1 else ""
    facts = {"text": text, "rank": rank, "distance": distance, "corpus_line": number, "neighbour": texts[number]}
    return f"{head}{distance:7.3f}  {texts[number]}", facts


def _shown(z_L: np.ndarray) -> str:
    return " ".join(f"{value:6.2f}" for value in z_L)
