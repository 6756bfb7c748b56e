"""`vae-ds bench latents`: encode, decode and log_prob in sentences a second, beside the stock T5 doing the same work.

Both are in this process, with the same weights of the base, texts, batches, precision and threads. They take turns, so
that a change of the machine's load meets both, and each ratio is of two neighbours in time.

Shapes: B texts in a batch, T tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from vae_ds.bench.contest import middle
from vae_ds.config import DataConfig, ModelConfig
from vae_ds.data import corpora
from vae_ds.model import T5VAE, load_t5, load_tokenizer
from vae_ds.textvae import TextVAE

WORKS = ("encode", "decode", "log_prob")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Row:
    """One kind of work. The rates are in sentences a second; `ratio` is vae / stock of the same round."""

    work: str
    vae: Spread
    stock: Spread
    ratio: Spread


@dataclass(frozen=True)
class Result:
    """The rows, and what was measured: sentences in a round, tokens that each becomes, samples of log_prob."""

    rows: list[Row]
    base: str
    device: str
    threads: int
    sentences: int
    batch: int
    new_tokens: int
    samples: int
    rounds: int
    versions: dict[str, str]


def latents(
    base: str = "tiny",
    *,
    device: str = "auto",
    sentences: int = 256,
    batch: int | None = None,
    new_tokens: int = 24,
    samples: int = 8,
    rounds: int = 7,
) -> Result:
    """Measure each of WORKS `rounds` times, after one round that does not count.

    encode: texts to codes, from strings; the stock T5 tokenizes, and runs its encoder. decode: `new_tokens` greedy
    tokens from each code, with a cache and no early end; the stock T5 decodes as many from its encoder's states, which
    are computed before. log_prob: `samples` importance samples of each text; the stock T5 runs the encoder once, and
    the decoder on the text as often. Raises ConfigError if the base cannot be used.
    """
    texts = _texts(sentences)
    vae = TextVAE(T5VAE.from_base(ModelConfig(base=base)), load_tokenizer(base), 64, device, batch)
    stock = _Stock(base, vae)
    z_NL = vae.encode(texts)
    states = stock.encode(texts)
    longer = {"min_new_tokens": new_tokens}
    works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "encode": (lambda: vae.encode(texts), lambda: stock.encode(texts)),
        "decode": (lambda: _decode(vae, z_NL, new_tokens, longer), lambda: stock.decode(states, new_tokens, longer)),
        "log_prob": (lambda: vae.log_prob(texts, samples), lambda: stock.log_prob(texts, samples)),
    }
    rows = [_measure(name, *pair, len(texts), rounds) for name, pair in works.items()]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Result(
        rows,
        base,
        str(vae.device),
        torch.get_num_threads(),
        len(texts),
        vae.batch,
        new_tokens,
        samples,
        rounds,
        versions,
    )


def table(result: Result) -> str:
    """The result for people, as a Markdown table."""
    lines = ["| work | vae_ds | stock T5 | ratio |", "|---|---|---|---|"]
    for row in result.rows:
        cells = [_told(row.vae, 0), _told(row.stock, 0), _told(row.ratio, 2)]
        lines.append("| " + " | ".join([row.work, *cells]) + " |")
    note = (
        f"sentences a second: median (quartiles) of {result.rounds} rounds of {result.sentences} sentences; base"
        f" {result.base}, {result.device}, {result.threads} threads, batches of {result.batch}, {result.new_tokens} new"
        f" tokens, {result.samples} importance samples"
    )
    return "\n".join([*lines, "", note])


class _Stock:
    """The stock T5 of a base, on the device, with the tokenizer and the batches of the VAE."""

    def __init__(self, base: str, vae: TextVAE) -> None:
        self._vae = vae
        self._t5: Any = load_t5(ModelConfig(base=base)).to(vae.device).eval()

    def _batches(self, texts: Sequence[str]) -> list[Any]:
        """Padded inputs in the order of the lengths, which is the least padding."""
        vae = self._vae
        ids = vae.tokenizer(list(texts), truncation=True, max_length=vae.max_tokens)["input_ids"]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
        parts = [order[start : start + vae.batch] for start in range(0, len(order), vae.batch)]
        return [
            vae.tokenizer.pad({"input_ids": [ids[row] for row in part]}, return_tensors="pt").to(vae.device)
            for part in parts
        ]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The states of the encoder and the mask of each batch."""
        return [
            (self._t5.encoder(**batch).last_hidden_state, batch["attention_mask"]) for batch in self._batches(texts)
        ]

    @torch.no_grad()
    def decode(
        self, states: Sequence[tuple[torch.Tensor, torch.Tensor]], new_tokens: int, longer: dict[str, int]
    ) -> list[str]:
        """Greedy texts from states of the encoder."""
        made: list[str] = []
        for states_BTH, mask_BT in states:
            # The cache that transformers 5 makes has the depth of the encoder, which may be another.
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            ids_BT = self._t5.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=states_BTH), attention_mask=mask_BT,
                max_new_tokens=new_tokens, do_sample=False, num_beams=1, past_key_values=cache, **longer,
            )  # fmt: skip
            made += self._vae.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        return made

    @torch.no_grad()
    def log_prob(self, texts: Sequence[str], samples: int) -> list[float]:
        """The log likelihood of each text given itself, computed `samples` times; nats."""
        found: list[float] = []
        for batch in self._batches(texts):
            states = BaseModelOutput(last_hidden_state=self._t5.encoder(**batch).last_hidden_state)
            labels_BT = batch["input_ids"].masked_fill(batch["attention_mask"].eq(0), -100)
            inputs_BT = self._t5.prepare_decoder_input_ids_from_labels(labels_BT)
            for _ in range(samples):
                logits_BTV = self._t5(
                    encoder_outputs=states, attention_mask=batch["attention_mask"], decoder_input_ids=inputs_BT,
                    use_cache=False,
                ).logits  # fmt: skip
                nll_N = torch.nn.functional.cross_entropy(
                    logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=-100, reduction="none"
                )
            found += (-nll_N.view_as(labels_BT).sum(1)).tolist()
        return found


def _decode(vae: TextVAE, z_NL: torch.Tensor, new_tokens: int, longer: dict[str, int]) -> list[str]:
    made: list[str] = []
    with torch.no_grad():
        for z_BL in z_NL.to(vae.device).split(vae.batch):
            ids_BT = vae.model.generate(z_BL, new_tokens, **longer)
            made += vae.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
    return made


def _measure(name: str, vae: Callable[[], Any], stock: Callable[[], Any], count: int, rounds: int) -> Row:
    pairs = []
    for number in range(rounds + 1):
        # The first of a pair changes, so that what one leaves in the caches serves both.
        order = (vae, stock) if number % 2 else (stock, vae)
        took = {work: _duration_s(work) for work in order}
        if number:  # the first round compiles and fills caches
            pairs.append((count / took[vae], count / took[stock]))
    return Row(
        name,
        _spread([own for own, _ in pairs]),
        _spread([other for _, other in pairs]),
        _spread([own / other for own, other in pairs]),
    )


def _duration_s(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the end of the work, and the start of the next
    return time.perf_counter() - begun


def _spread(values: Sequence[float]) -> Spread:
    found = middle(values)
    return Spread(found.value, found.low, found.high)


def _told(spread: Spread, digits: int) -> str:
    return f"{spread.median:,.{digits}f} ({spread.lower:,.{digits}f} to {spread.upper:,.{digits}f})"


def _texts(count: int) -> list[str]:
    """Sentences of the grammar, which every machine has."""
    data = DataConfig(corpus="grammar", sentences={"train": 1, "valid": 1, "test": count})
    return [str(text) for text in np.array(corpora.load(data).splits["test"]["text"][:])]
