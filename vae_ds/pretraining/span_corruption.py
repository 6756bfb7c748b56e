"""Pretraining examples from token ids: span corruption, denoising and prefix language modelling.

- Span corruption (Raffel et al. 2020, section 3.1.4): each of some spans is replaced by a sentinel. The target lists
  each sentinel with the tokens that it replaces, then one more sentinel.
- Denoising (Lewis et al. 2020, token deletion): the encoder reads the text without some of its tokens; the decoder
  writes the whole text. Each token of the target depends on the source, so the decoder soon learns to use the encoder.
  With span corruption and prefixes of short texts only, it hardly learns this.
- Prefix language modelling (Raffel et al. 2020, section 3.2.3): the text is cut. The encoder reads the part before the
  cut and the first sentinel; the decoder writes that sentinel and the rest. A continuation is thus a span at the end,
  so this task and span corruption support each other. If the part before the cut is empty, there is no sentinel, and
  the decoder is a plain language model of whole texts, as the decoder of a VAE must be.

Shapes: N texts, B texts of a batch, T tokens. Source and target end with the end-of-sentence token, and their lengths
include it.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vae_ds.config import PretrainConfig
from vae_ds.distributed import stream
from vae_ds.errors import DataError

Ints = npt.NDArray[np.int64]

SPANS, DENOISING, PREFIX = 0, 1, 2
IGNORED = -100  # label that torch's cross entropy ignores
SHORTEST_FOR_SPANS = 4
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])")


class Pair(NamedTuple):
    """Input of the encoder and target of the decoder, as tensors of token ids padded on the right."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    labels_BT: torch.Tensor


@dataclass(frozen=True)
class Texts:
    """Token ids of many texts in one array, without end-of-sentence tokens."""

    ids: npt.NDArray[np.int32]
    start_N: Ints

    def __len__(self) -> int:
        return len(self.start_N) - 1

    def __getitem__(self, index: int) -> Ints:
        return self.ids[self.start_N[index] : self.start_N[index + 1]].astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """Hash of the ids and of the start of each text."""
        return hashlib.blake2b(self.ids.tobytes() + self.start_N.tobytes(), digest_size=8).hexdigest()

    @property
    def lengths_N(self) -> Ints:
        """Number of tokens of each text, without the end-of-sentence token."""
        return np.diff(self.start_N)


@dataclass(frozen=True)
class Plan:
    """The kind and sizes of the example made from each text in one epoch; a function of (seed, epoch) only."""

    kind_N: Ints
    cut_N: Ints
    source_N: Ints
    target_N: Ints

    @property
    def order_N(self) -> Ints:
        """Sort key by which adjacent examples have the same kind and similar lengths."""
        return (self.kind_N << 40) + (self.target_N << 20) + self.source_N


def tokenise_texts(texts: Sequence[str], tokenizer: Any, max_tokens: int, block: int = 20_000) -> Texts:
    """Token ids of all texts, each with at most `max_tokens` tokens including its end-of-sentence token.

    Longer texts are cut at ends of sentences. A single sentence that is still too long is dropped: a text that ends
    within a sentence would teach the model to stop there. Raises DataError if nothing is left.
    """
    kept: list[npt.NDArray[np.int32]] = []
    for first in range(0, len(texts), block):
        some = list(texts[first : first + block])
        for text, ids in zip(some, _encode(some, tokenizer), strict=True):
            rows = [ids] if len(ids) < max_tokens else _cut(text, tokenizer, max_tokens)
            kept += [np.asarray(row, np.int32) for row in rows if row]
    if not kept:
        raise DataError(f"none of {len(texts)} texts has 1 to {max_tokens - 1} tokens; increase data.max_tokens")
    return Texts(np.concatenate(kept), np.cumsum([0] + [len(ids) for ids in kept], dtype=np.int64))


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded


def _cut(text: str, tokenizer: Any, max_tokens: int) -> list[list[int]]:
    """Ids of as few parts as possible, each of whole sentences.

    No subword crosses a space, so the ids of sentences can be concatenated.
    """
    rows: list[list[int]] = [[]]
    for ids in _encode(_SENTENCE_END.split(text), tokenizer):
        if len(ids) >= max_tokens:
            rows.append([])
            continue
        if len(rows[-1]) + len(ids) >= max_tokens:
            rows.append([])
        rows[-1] += ids
    return rows


def plan_epoch(lengths_N: Ints, config: PretrainConfig, epoch: int) -> Plan:
    """Draw the kind and the cut of every text for one epoch."""
    draws = stream(config.seed, "examples", epoch)
    count = len(lengths_N)
    kind_draw_N, empty_draw_N, cut_draw_N = draws.random((3, count))
    spans_N = (kind_draw_N < config.span_corruption) & (lengths_N >= SHORTEST_FOR_SPANS)
    denoised_N = ~spans_N & (kind_draw_N < config.span_corruption + config.denoising)
    cut_N = np.where(empty_draw_N < config.empty_prefix, 0, (cut_draw_N * lengths_N).astype(np.int64))
    noise_N, count_N = _noise_sizes(lengths_N, config)
    prefix = cut_texts(lengths_N, cut_N)
    kinds = [spans_N, denoised_N]
    kind_N = np.select(kinds, [SPANS, DENOISING], PREFIX).astype(np.int64)
    sources = [lengths_N - noise_N + count_N + 1, lengths_N - _deletions(lengths_N, config) + 1]
    targets = [noise_N + count_N + 2, lengths_N + 1]
    return Plan(kind_N, cut_N, np.select(kinds, sources, prefix.source_N), np.select(kinds, targets, prefix.target_N))


def cut_texts(lengths_N: Ints, cut_N: Ints) -> Plan:
    """The plan of prefix language modelling with `cut_N` tokens before the cut."""
    sentinel_N = (cut_N > 0).astype(np.int64)
    return Plan(np.full_like(cut_N, PREFIX), cut_N, cut_N + sentinel_N + 1, lengths_N - cut_N + sentinel_N + 1)


def whole_texts(lengths_N: Ints) -> Plan:
    """The plan of plain language modelling: the encoder reads nothing; the decoder writes the whole text."""
    return cut_texts(lengths_N, np.zeros(len(lengths_N), np.int64))


def pairs(
    texts: Texts,
    index_B: Ints,
    plan: Plan,
    config: PretrainConfig,
    *,
    sentinels: Sequence[int],
    eos: int,
    pad: int,
    epoch: int,
) -> Pair:
    """The padded batch of the texts `index_B`, made according to `plan`.

    The replaced or deleted tokens are drawn from a stream of (seed, epoch, text).
    """

    def noise_stream(index: int) -> np.random.Generator:
        return stream(config.seed, "spans", epoch, index)

    sources, targets = [], []
    for index in map(int, index_B):
        ids = texts[index]
        kind = plan.kind_N[index]
        if kind == SPANS:
            noise, count = _noise_sizes(np.asarray([len(ids)]), config)
            source, target = corrupt(ids, int(noise[0]), int(count[0]), sentinels, noise_stream(index))
        elif kind == DENOISING:
            lost = noise_stream(index).choice(len(ids), int(_deletions(len(ids), config)), replace=False)
            source, target = np.delete(ids, lost), ids
        else:
            cut = int(plan.cut_N[index])
            mark = np.asarray(sentinels[: min(cut, 1)], np.int64)
            source, target = np.concatenate([ids[:cut], mark]), np.concatenate([mark, ids[cut:]])
        sources.append(np.append(source, eos))
        targets.append(np.append(target, eos))
    input_ids_BT = _pad(sources, pad)
    lengths_B1 = torch.tensor([[len(source)] for source in sources])
    mask_BT = (torch.arange(input_ids_BT.shape[1])[None, :] < lengths_B1).long()
    return Pair(input_ids_BT, mask_BT, _pad(targets, IGNORED))


def corrupt(
    ids: Ints, noise: int, count: int, sentinels: Sequence[int], draws: np.random.Generator
) -> tuple[Ints, Ints]:
    """Replace `count` spans, `noise` tokens in total, by sentinels. Returns source and target, without end of sentence.

    Spans and the gaps between them have at least one token. In contrast to the code of T5, the text may begin with a
    span and need not end with one: most sentences have one span, which would otherwise always be at their end.
    """
    lost_lengths = _segments(noise, count, draws)
    kept_lengths = _segments(len(ids) - noise + 2, count + 1, draws)
    kept_lengths[[0, -1]] -= 1
    source: list[Ints] = []
    target: list[Ints] = []
    place = 0
    for span, (kept, lost) in enumerate(zip(kept_lengths[:-1], lost_lengths, strict=True)):
        mark = np.asarray([sentinels[span]])
        source += [ids[place : place + kept], mark]
        target += [mark, ids[place + kept : place + kept + lost]]
        place += int(kept + lost)
    source.append(ids[place:])
    target.append(np.asarray([sentinels[count]]))
    return np.concatenate(source), np.concatenate(target)


def _deletions(lengths: Any, config: PretrainConfig) -> Any:
    """Number of tokens to delete from texts of these lengths. At least one token stays."""
    return np.minimum(np.rint(lengths * config.deletion), lengths - 1).astype(np.int64)


def _noise_sizes(lengths_N: Ints, config: PretrainConfig) -> tuple[Ints, Ints]:
    """Number of tokens to replace, and number of their spans."""
    noise_N = np.clip(np.rint(lengths_N * config.noise_density), 1, np.maximum(1, lengths_N - 1)).astype(np.int64)
    most_N = np.maximum(1, np.minimum(noise_N, lengths_N - noise_N))
    count_N = np.clip(np.rint(noise_N / config.mean_span).astype(np.int64), 1, most_N)
    return noise_N, np.minimum(count_N, 99)  # T5 has 100 sentinels, and one closes the target


def _segments(total: int, count: int, draws: np.random.Generator) -> Ints:
    """Random split of `total` into a sum of `count` positive numbers, uniform over all such sums."""
    borders = np.sort(draws.choice(total - 1, size=count - 1, replace=False)) + 1 if count > 1 else np.zeros(0, int)
    return np.diff(np.concatenate([[0], borders, [total]])).astype(np.int64)


def _pad(rows: Iterable[Ints], value: int) -> torch.Tensor:
    tensors = [torch.from_numpy(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
