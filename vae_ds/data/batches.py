"""Convert token ids into batches: global batches of similar lengths; delete tokens, draw eps, collate.

Shapes: N sentences of a split, S steps of an epoch, G sentences of a global batch, B sentences of a micro batch,
T padded tokens, L latent units. Lengths are in subword tokens and include the end-of-sentence token. The target of a
cut sentence has no such token, so it is one token shorter than the input.

The results do not depend on the cluster. Global batches are functions of (seed, phase, epoch). The random numbers of a
sentence are a function of (seed, purpose, keys, sentence). Ranks and micro batches only divide a global batch: see
`cuts`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vae_ds.data.tokens import TokenSet, from_texts, tokenise
from vae_ds.distributed import stream, to_device
from vae_ds.errors import DataError

__all__ = [
    "Batch",
    "TokenSet",
    "collate",
    "epoch_batches",
    "from_texts",
    "steps_per_epoch",
    "tokenise",
]

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.float32]

IGNORED = -100  # label that the cross entropy ignores


def steps_per_epoch(sentences: int, global_batch: int) -> int:
    """Number of global batches in one epoch; the incomplete last one is dropped. Raises DataError if there is none."""
    steps = sentences // global_batch
    if steps == 0:
        raise DataError(
            f"batch.global is {global_batch} but the training split has only {sentences} sentences; reduce batch.global"
        )
    return steps


def epoch_batches(lengths_N: Ints, global_batch: int, bucket_batches: int, seed: int, *keys: int) -> NDArray[np.int64]:
    """Global batches of an epoch, int64 (S, G). Each sentence occurs at most once.

    The result is a function of the arguments only. `keys` identify the epoch: the phase, the number of the epoch in the
    phase and, for a streamed file, the window.

    A permutation of the split is cut into chunks of `bucket_batches` global batches. Each chunk is sorted by length and
    cut into batches of similar length. Then the order of all batches is shuffled. The sentences of the incomplete last
    batch are dropped; each epoch drops a new random selection. Raises DataError if the split is smaller than one batch.
    """
    steps = steps_per_epoch(len(lengths_N), global_batch)
    random = stream(seed, "order", *keys)
    order = random.permutation(len(lengths_N))[: steps * global_batch]
    chunk = bucket_batches * global_batch
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        order[start : start + chunk] = part[np.argsort(lengths_N[part], kind="stable")]
    batches: NDArray[np.int64] = order.reshape(steps, global_batch)[random.permutation(steps)]
    return batches


@dataclass(frozen=True)
class Batch:
    """One micro batch.

    `tokens`: number of target tokens of sentences of weight 1.
    """

    index_B: torch.Tensor
    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    labels_BT: torch.Tensor
    eps_BL: torch.Tensor
    weight_B: torch.Tensor
    tokens: int

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with what a model needs on `device`; `index_B` stays on the host, which does not wait."""
        names = ("input_ids_BT", "attention_mask_BT", "labels_BT", "eps_BL", "weight_B")
        moved: dict[str, Any] = {name: to_device(getattr(self, name), torch.device(device)) for name in names}
        return replace(self, **moved)

    def arguments(self, decodes: bool = True) -> dict[str, torch.Tensor | None]:
        """Keyword arguments of the model's `forward`, without labels if it does not decode."""
        return {
            "input_ids_BT": self.input_ids_BT,
            "attention_mask_BT": self.attention_mask_BT,
            "labels_BT": self.labels_BT if decodes else None,
            "eps_BL": self.eps_BL,
        }


def collate(
    tokens: TokenSet,
    index_B: Ints,
    weight_B: Floats | None = None,
    *,
    pad_id: int,
    latent_dim: int,
    seed: int,
    keys: tuple[int, ...],
    denoise: float = 0.0,
    sample: bool = True,
    eval: bool = False,
    first: int = 0,
) -> Batch:
    """Pad sentences into a batch: noisy encoder input, clean labels, eps ~ N(0, I) for each sentence.

    Noise and eps are functions of (seed, keys, sentence). The input of each sentence ends with the end-of-sentence
    token; the labels have it only for sentences that were not cut.

    denoise: probability of deleting a token of the encoder's input, except the end-of-sentence token
        (docs/method.md, Denoising). Evaluation (`eval`) deletes nothing and draws other eps than training.
    sample: False gives eps 0, so z = mu.
    weight_B: None means weight 1 for each sentence.
    first: number of the first sentence of `tokens`, if these are a part of more sentences.
    """
    stream_keys = tuple(int(key) for key in keys)  # the stream hashes the repr, which differs for a numpy integer
    rows_B: NDArray[np.int64] = np.array(index_B, np.int64)
    lengths_B = tokens.lengths_N[rows_B].astype(np.int64)
    flat = tokens.flat(rows_B)
    weights_B = np.ones(len(rows_B), np.float32) if weight_B is None else np.array(weight_B, np.float32)
    cut_B = tokens.cut(rows_B)
    target_lengths_B = lengths_B - cut_B
    labels_BT = _padded(np.delete(flat, np.cumsum(lengths_B)[cut_B] - 1), target_lengths_B, IGNORED)
    kept, kept_B = flat, lengths_B
    if denoise > 0 and not eval:
        keep = _keep_mask(lengths_B, rows_B + first, denoise, stream(seed, "delete", *stream_keys))
        starts_B = np.cumsum(lengths_B) - lengths_B
        kept, kept_B = flat[keep], np.add.reduceat(keep.astype(np.int64), starts_B)
    eps_BL = np.zeros((len(rows_B), latent_dim), np.float32)
    if sample and latent_dim:
        random = stream(seed, "eval-eps" if eval else "eps", *stream_keys)
        for row, own in enumerate(_sentence_streams(random, rows_B + first)):
            own.standard_normal(out=eps_BL[row], dtype=np.float32)
    input_ids_BT = _padded(kept, kept_B, pad_id)
    mask_BT = np.arange(input_ids_BT.shape[1]) < kept_B[:, None]
    return Batch(
        index_B=torch.from_numpy(rows_B),
        input_ids_BT=torch.from_numpy(input_ids_BT),
        attention_mask_BT=torch.from_numpy(mask_BT.astype(np.int64)),
        labels_BT=torch.from_numpy(labels_BT),
        eps_BL=torch.from_numpy(eps_BL),
        weight_B=torch.from_numpy(weights_B),
        tokens=int(target_lengths_B[weights_B > 0].sum()),
    )


def _padded(flat: NDArray[np.int64], lengths_B: NDArray[np.int64], filler: int) -> NDArray[np.int64]:
    width = int(lengths_B.max(initial=0))
    ids_BT = np.full((len(lengths_B), width), filler, np.int64)
    ids_BT[np.arange(width) < lengths_B[:, None]] = flat
    return ids_BT


def _keep_mask(
    lengths_B: NDArray[np.int64], index_B: NDArray[np.int64], denoise: float, random: np.random.Generator
) -> NDArray[np.bool_]:
    """Mask of the tokens to keep, for the concatenated sentences. End-of-sentence tokens always stay."""
    chances = np.ones(int(lengths_B.sum()))
    ends_B = np.cumsum(lengths_B)
    for start, end, own in zip(ends_B - lengths_B, ends_B - 1, _sentence_streams(random, index_B), strict=True):
        if end > start:
            chance = own.random(end - start)
            # Keep the token with the largest draw, so that at least one token stays.
            chance[chance.argmax()] = 1.0
            chances[start:end] = chance
    return chances >= denoise


def _sentence_streams(random: np.random.Generator, index_B: NDArray[np.int64]) -> Iterator[np.random.Generator]:
    """Yield `random` once per sentence, set to the start of that sentence's own stream.

    Philox is counter-based (Salmon et al. 2011). Its key comes from the hash of seed and keys. The sentence index is
    the highest of the counter's four 64-bit words, so that streams never overlap. Setting the counter takes
    2 microseconds; creating a generator takes 10.
    """
    fresh: Any = random.bit_generator.state
    for sentence in index_B:
        fresh["state"]["counter"] = np.array([0, 0, 0, sentence], np.uint64)
        random.bit_generator.state = fresh
        yield random
