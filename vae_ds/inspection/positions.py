"""Which part of a sentence the code decides: z_gain by the position of the token (Bosc & Vincent 2020).

Shapes: N texts, B in a batch, T tokens, L latent units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vae_ds import latents
from vae_ds.data import Limits, collate, evaluation_batches, from_texts, logit_tokens
from vae_ds.distributed import stream
from vae_ds.errors import DataError
from vae_ds.textvae import TextVAE


@dataclass(frozen=True)
class Gains:
    """The mean rise of the loss of a token if z is that of another text, nats, by the position from the start.

    gain_T, se_T, count_T: of the tokens at each position, without the ends; the standard error is over the texts, and
        NaN for a single one. `end`, `end_se`, `ends`: of the end-of-sentence tokens.
    total: the mean rise per text, which is `z_gain` of docs/metrics.md, with its standard error.
    """

    gain_T: np.ndarray
    se_T: np.ndarray
    count_T: np.ndarray
    end: float
    end_se: float
    ends: int
    total: float
    total_se: float


def gains(vae: TextVAE, texts: Sequence[str], seed: int = 0) -> Gains:
    """z_gain by position, with one sample of each posterior, and the samples of the others in a random cycle.

    The end of a text that was cut does not count. Raises DataError for fewer than two texts.
    """
    if len(texts) < 2:
        raise DataError("z_gain needs the code of another text; give at least two texts")
    z_NL = vae.encode(texts, sampled=True, seed=seed)
    order_N = stream(seed, "positions").permutation(len(texts))
    mate_N = np.empty(len(texts), np.int64)
    mate_N[order_N] = np.roll(order_N, -1)
    tokens = from_texts(texts, vae.tokenizer, vae.max_tokens)
    longest, end_id = int(tokens.lengths_N.max()), vae.tokenizer.eos_token_id
    # Of each position, and of the ends in the last place: number, sum, sum of squares.
    sums_3T, total_N = np.zeros((3, longest + 1)), np.zeros(len(texts))
    limits = Limits(vae.batch, logit_tokens("auto", vae.model.t5.config.vocab_size))
    with latents.inference(vae.model):
        for index_B, _ in evaluation_batches(tokens.lengths_N, limits, 0, 1):
            batch = collate(
                tokens, index_B, pad_id=vae.tokenizer.pad_token_id, latent_dim=vae.latent_dim, seed=seed, keys=(),
                sample=False, eval=True,
            ).to(vae.device)  # fmt: skip
            own_BT, other_BT = (
                vae.model.token_losses(z_NL[torch.from_numpy(rows_B)].to(vae.device), batch.labels_BT).double()
                for rows_B in (np.asarray(index_B), mate_N[index_B])
            )
            gain_BT, labels_BT = (other_BT - own_BT).cpu().numpy(), batch.labels_BT.cpu().numpy()
            total_N[index_B] = gain_BT.sum(1)
            place_BT = np.broadcast_to(np.arange(gain_BT.shape[1]), gain_BT.shape)
            place_BT = np.where(labels_BT == end_id, longest, place_BT)
            is_token_BT = labels_BT != -100
            for power in range(3):
                np.add.at(sums_3T[power], place_BT[is_token_BT], gain_BT[is_token_BT] ** power)
    count_T, mean_T, se_T = _estimates(*sums_3T)
    ends, last = int(count_T[longest]), np.flatnonzero(count_T[:longest]).max(initial=0) + 1
    return Gains(
        mean_T[:last], se_T[:last], count_T[:last].astype(int), float(mean_T[longest]), float(se_T[longest]), ends,
        float(total_N.mean()), float(total_N.std(ddof=1)) / math.sqrt(len(texts)),
    )  # fmt: skip


def _estimates(count_T: np.ndarray, sum_T: np.ndarray, square_T: np.ndarray) -> tuple[np.ndarray, ...]:
    """Number, mean and standard error at each position; NaN where there are too few."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_T = sum_T / count_T
        variance_T = np.maximum(square_T / count_T - mean_T**2, 0) * count_T / (count_T - 1)
        return count_T, mean_T, np.sqrt(variance_T / count_T)
