"""Prepare a pretraining before its model is built: checks, the corpus, the vocabulary, token ids.

Shapes: B texts of a micro batch, N texts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vae_ds import distributed, engine
from vae_ds.config import PretrainConfig
from vae_ds.data import Limits, corpora, limits_of, steps_per_epoch
from vae_ds.distributed import Ranks
from vae_ds.pretraining import vocabulary
from vae_ds.pretraining.paragraphs import paragraphs
from vae_ds.pretraining.span_corruption import Pair, Plan, Texts, pairs, tokenise_texts
from vae_ds.training import trackers

SHOWN_TEXTS = 6
MOST_TEXTS = 512  # of a forward pass, with `batch.micro: auto`


@dataclass(frozen=True)
class Setup:
    """Everything that is known before the model is built."""

    config: PretrainConfig
    run_dir: Path
    ranks: Ranks
    precision: str
    ds_config: dict[str, Any]
    limits: Limits
    tokenizer: Any
    pieces: bytes
    train: Texts
    valid: Texts
    sources: dict[str, Any]  # description of the text, for the model card

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.train), self.config.batch.global_size)

    def batch(self, texts: Texts, index_B: np.ndarray, plan: Plan, epoch: int) -> Pair:
        """The tensors of the texts `index_B`, on the device of this rank."""
        made = pairs(
            texts,
            index_B,
            plan,
            self.config,
            sentinels=vocabulary.sentinel_ids(self.tokenizer),
            eos=self.tokenizer.eos_token_id,
            pad=self.tokenizer.pad_token_id,
            epoch=epoch,
        )
        return Pair(*(tensor.to(self.ranks.device) for tensor in made))


def prepare(config: PretrainConfig, run_dir: Path, ranks: Ranks) -> Setup:
    """Check the settings, read the corpus, learn the vocabulary, and tokenise. Raises UserError."""
    trackers.check(config.logging.trackers)
    distributed.rank0_first(lambda: corpora.check(config.data))
    precision = engine.precision_for(config.precision, ranks.device, config.deepspeed, tell=ranks.is_main)
    ds_config = engine.resolve(config.deepspeed, precision, ranks.device.type)
    limits = limits_of(config.batch, ranks.world, config.data.max_tokens)
    # The order of the examples also depends on their kind, so their number bounds a batch, not their tokens.
    limits = Limits(limits.sentences or MOST_TEXTS)
    corpus = distributed.rank0_first(lambda: corpora.load(config.data))
    sentences = [str(text) for text in corpus.splits["train"]["text"]]
    blocks: list[str] = []
    if config.paragraphs and config.data.corpus == "docstrings":
        rows = distributed.rank0_first(lambda: paragraphs(config.data))
        blocks = [str(text) for text in rows["text"]]
    # A sentence that is also in a paragraph counts twice. This is intended: a VAE is trained on single sentences.
    texts = [*sentences, *blocks]
    pieces = distributed.rank0_first(lambda: _vocabulary(texts, config, run_dir))
    tokenizer = vocabulary.tokenizer_from_pieces(pieces)
    train = tokenise_texts(texts, tokenizer, config.data.max_tokens)
    held_out = corpus.splits["valid"].select(range(min(config.validation.sentences, len(corpus.splits["valid"]))))
    valid = tokenise_texts([str(text) for text in held_out["text"]], tokenizer, config.data.max_tokens)
    sources = {
        "corpus": corpus.name,
        "fingerprint": corpus.fingerprint,
        "sentences": len(sentences),
        "paragraphs": len(blocks),
        "texts": len(train),
        "tokens": int(train.lengths_N.sum()) + len(train),
        "example_prefixes": _prefixes(held_out["text"]),
    }
    return Setup(config, run_dir, ranks, precision, ds_config, limits, tokenizer, pieces, train, valid, sources)


def _vocabulary(texts: list[str], config: PretrainConfig, run_dir: Path) -> bytes:
    """The pieces of the run. They are learned once, because a resumed run must use the same pieces."""
    path = run_dir / vocabulary.PIECES_FILE
    if not path.is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(vocabulary.train_pieces(texts, config.architecture.vocab_size))
        part.replace(path)
    return path.read_bytes()


def _prefixes(texts: list[str]) -> list[str]:
    """First halves of some held-out sentences, for the examples of the model card."""
    long = [str(text).split() for text in texts if len(str(text).split()) >= 10]
    return [" ".join(words[: len(words) // 2]) for words in long[:SHOWN_TEXTS]]
