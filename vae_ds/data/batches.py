"""Token ids to batches: bucket by length, divide among ranks, delete tokens, draw eps, collate.

Shapes: N sentences of a split, S steps of an epoch, G sentences of a global batch, B sentences of a micro batch,
T padded tokens, L latent units. Lengths are in subword tokens with the end-of-sentence token counted.

Nothing here depends on the cluster: global batches are functions of (seed, phase, epoch), and what is drawn for a
sentence is a function of (seed, purpose, keys, sentence). Ranks and micro batches only divide a global batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vae_ds.data.tokens import TokenSet, from_texts, tokenise
from vae_ds.distributed import stream
from vae_ds.errors import ConfigError, DataError

__all__ = [
    "Batch",
    "TokenSet",
    "collate",
    "epoch_batches",
    "evaluation_batches",
    "from_texts",
    "micro_batch",
    "share",
    "steps_per_epoch",
    "tokenise",
]

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.float32]

IGNORED = -100  # the label that a cross entropy leaves out


def steps_per_epoch(sentences: int, global_batch: int) -> int:
    """Global batches in one epoch; the incomplete last one is dropped. Raises DataError if there is none."""
    steps = sentences // global_batch
    if steps == 0:
        raise DataError(f"batch.global is {global_batch} but the training split has only {sentences} sentences")
    return steps


def micro_batch(global_batch: int, world: int, micro: int | str, cap: int = 64) -> int:
    """Sentences a rank and forward pass; `auto` is the largest size up to `cap` that divides.

    Raises ConfigError, naming the nearest sizes that do divide, if the ranks or the micro batch do not divide.
    """
    rest = global_batch % world
    if rest:
        near = [size for size in (global_batch - rest, global_batch - rest + world) if size]
        raise ConfigError(
            f"batch.global {global_batch} does not divide over {world} ranks; nearest that do: {_listed(near)}"
        )
    of_rank = global_batch // world
    sizes = [size for size in range(1, of_rank + 1) if of_rank % size == 0]
    if micro == "auto":
        return max(size for size in sizes if size <= cap)
    if micro not in sizes:
        near = [*[size for size in sizes if size < int(micro)][-1:], *[size for size in sizes if size > int(micro)][:1]]
        raise ConfigError(
            f"batch.micro {micro} does not divide the {of_rank} sentences of a rank (batch.global {global_batch} over "
            f"{world} ranks); nearest that do: {_listed(near)}"
        )
    return int(micro)


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))


def epoch_batches(lengths_N: Ints, global_batch: int, bucket_batches: int, seed: int, *keys: int) -> NDArray[np.int64]:
    """The global batches of an epoch, int64 (S, G), each sentence at most once; a function of its arguments alone.

    `keys` name the epoch: the phase, the epoch's number in it, and the window of one that is read as a stream.

    A permutation of the split is cut into chunks of `bucket_batches` global batches, each chunk is sorted by length and
    cut into batches of like length, and the order of all batches is shuffled. What an incomplete last batch would hold
    is drawn anew each epoch. Raises DataError if the split is smaller than one batch.
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


def share(index_G: Ints, lengths_N: Ints, rank: int, world: int, micro: int) -> list[NDArray[np.int64]]:
    """The micro batches of one rank, each int64 (micro,); over all ranks they hold each sentence of the batch once.

    Sorted by length, the longest first (what does not fit into memory fails at once); at each micro step the ranks take
    neighbouring pieces, so that they work for about the same time. Raises ConfigError if it does not divide.
    """
    if len(index_G) % (world * micro):
        raise ConfigError(f"{len(index_G)} sentences do not divide over {world} ranks in micro batches of {micro}")
    order = index_G[np.argsort(-lengths_N[index_G].astype(np.int64), kind="stable")].astype(np.int64)
    return list(order.reshape(-1, world, micro)[:, rank])


def evaluation_batches(lengths_N: Ints, batch: int, rank: int, world: int) -> list[tuple[NDArray[np.int64], Floats]]:
    """One rank's (index_B, weight_B) for an evaluation: over all ranks each sentence has weight 1 exactly once.

    All ranks get the same number of batches, of at most `batch` sentences of like length; a rank for which the last
    ones do not suffice gets a filler of weight 0.
    """
    order = np.argsort(-lengths_N.astype(np.int64), kind="stable")
    batches = []
    for start in range(0, len(order), batch * world):
        piece = np.array_split(order[start : start + batch * world], world)[rank]
        weight_B = np.ones(len(piece), np.float32)
        if not len(piece):
            piece, weight_B = order[-1:], np.zeros(1, np.float32)
        batches.append((piece, weight_B))
    return batches


@dataclass(frozen=True)
class Batch:
    """One micro batch. `tokens`: target tokens of weight 1; `positions`: target positions with padding, B times T."""

    index_B: torch.Tensor
    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    labels_BT: torch.Tensor
    eps_BL: torch.Tensor
    weight_B: torch.Tensor
    tokens: int
    positions: int

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def arguments(self) -> dict[str, torch.Tensor]:
        """What the model's forward takes."""
        return {
            "input_ids_BT": self.input_ids_BT,
            "attention_mask_BT": self.attention_mask_BT,
            "labels_BT": self.labels_BT,
            "eps_BL": self.eps_BL,
        }


def collate(
    tokens: TokenSet,
    index_B: Ints,
    *,
    pad_id: int,
    latent_dim: int,
    seed: int,
    keys: tuple[int, ...],
    denoise: float = 0.0,
    sample: bool = True,
    eval: bool = False,
    weight_B: Floats | None = None,
) -> Batch:
    """Pad some sentences into a batch: noisy encoder input, clean labels, eps ~ N(0, I) of each sentence.

    Noise and eps are functions of (seed, keys, sentence). `denoise`: probability that a token of the encoder's input,
    the end of the sentence excepted, is deleted (README, The method); never in evaluation (`eval`), whose eps are not
    those of training either. `sample` False gives eps 0, so z = mu. `weight_B` None means 1 each.
    """
    names = tuple(int(key) for key in keys)  # a numpy integer's repr, which the stream hashes, differs
    rows_B: NDArray[np.int64] = np.array(index_B, np.int64)
    lengths_B = tokens.lengths_N[rows_B].astype(np.int64)
    flat = tokens.flat(rows_B)
    weights_B = np.ones(len(rows_B), np.float32) if weight_B is None else np.array(weight_B, np.float32)
    labels_BT = _padded(flat, lengths_B, IGNORED)
    kept, kept_B = flat, lengths_B
    if denoise > 0 and not eval:
        keep = _survivors(lengths_B, rows_B, denoise, stream(seed, "delete", *names))
        starts_B = np.cumsum(lengths_B) - lengths_B
        kept, kept_B = flat[keep], np.add.reduceat(keep.astype(np.int64), starts_B)
    eps_BL = np.zeros((len(rows_B), latent_dim), np.float32)
    if sample and latent_dim:
        random = stream(seed, "eval-eps" if eval else "eps", *names)
        for row, own in enumerate(_each_sentence(random, rows_B)):
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
        tokens=int(lengths_B[weights_B > 0].sum()),
        positions=labels_BT.size,
    )


def _padded(flat: NDArray[np.int64], lengths_B: NDArray[np.int64], filler: int) -> NDArray[np.int64]:
    width = int(lengths_B.max(initial=0))
    ids_BT = np.full((len(lengths_B), width), filler, np.int64)
    ids_BT[np.arange(width) < lengths_B[:, None]] = flat
    return ids_BT


def _survivors(
    lengths_B: NDArray[np.int64], index_B: NDArray[np.int64], denoise: float, random: np.random.Generator
) -> NDArray[np.bool_]:
    """Which tokens of the sentences, one after another, the deletion noise leaves; the end of each always stays."""
    chances = np.ones(int(lengths_B.sum()))
    ends_B = np.cumsum(lengths_B)
    for start, end, own in zip(ends_B - lengths_B, ends_B - 1, _each_sentence(random, index_B), strict=True):
        if end > start:
            chance = own.random(end - start)
            # At least one token stays: the last to go as the probability rises.
            chance[chance.argmax()] = max(chance.max(), denoise)
            chances[start:end] = chance
    return chances >= denoise


def _each_sentence(random: np.random.Generator, index_B: NDArray[np.int64]) -> Iterator[np.random.Generator]:
    """`random`, set in turn to the beginning of each sentence's own stream.

    Philox is counter-based (Salmon et al. 2011): the stream's key comes from the hash of seed and keys, and the
    sentence is the highest of the counter's four 64-bit words, so that streams never meet. Setting the counter takes
    2 microseconds where a generator of its own takes 10.
    """
    fresh: Any = random.bit_generator.state
    for sentence in index_B:
        fresh["state"]["counter"] = np.array([0, 0, 0, sentence], np.uint64)
        random.bit_generator.state = fresh
        yield random
