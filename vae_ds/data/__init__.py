"""Convert text into batches: corpora, token ids on disk, global batches and each rank's share of them.

Depends on `distributed`, `config` and `errors`.
"""

from vae_ds.data import corpora
from vae_ds.data.ahead import MicroBatches
from vae_ds.data.batches import (
    Batch,
    collate,
    epoch_batches,
    steps_per_epoch,
)
from vae_ds.data.cache import cache_dir
from vae_ds.data.cuts import Limits, evaluation_batches, limits_of, logit_tokens, share
from vae_ds.data.feed import Feed, Source, Streamed, Whole
from vae_ds.data.fingerprints import tokenizer_fingerprint
from vae_ds.data.progress import Progress
from vae_ds.data.sampling import Sample, sample_train
from vae_ds.data.tokens import TokenSet, from_texts, tokenise

__all__ = [
    "Batch",
    "Feed",
    "Limits",
    "MicroBatches",
    "Progress",
    "Sample",
    "Source",
    "Streamed",
    "TokenSet",
    "Whole",
    "cache_dir",
    "collate",
    "corpora",
    "epoch_batches",
    "evaluation_batches",
    "from_texts",
    "limits_of",
    "logit_tokens",
    "sample_train",
    "share",
    "steps_per_epoch",
    "tokenise",
    "tokenizer_fingerprint",
]
