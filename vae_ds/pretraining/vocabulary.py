"""A vocabulary learned from text, in T5's layout: pad 0, end of sentence 1, unknown 2, pieces, then 100 sentinels.

The sentinels are in the order of T5: `<extra_id_0>` has the highest id, `<extra_id_99>` follows the last piece. Case
and characters of the text do not change, except that a run of whitespace becomes one space, as in T5's tokenizer.
"""

import io
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vae_ds.errors import ConfigError, DataError

SENTINELS = 100
PIECES_FILE = "spiece.model"

# The most frequent characters that cover this share of the text become pieces; all others become <unk>. Otherwise rare
# scripts would use many of the few pieces.
CHARACTER_COVERAGE = 0.9998


def train_pieces(texts: Iterable[str], vocab_size: int) -> bytes:
    """Learn a SentencePiece unigram model (Kudo 2018). The same texts give the same bytes.

    Args:
        texts: sentences or paragraphs; the result depends on their order.
        vocab_size: number of pieces, with pad, end of sentence and unknown, without the sentinels.

    Returns the serialised model, the content of `spiece.model`.
    Raises DataError if the text is too small for so many pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=CHARACTER_COVERAGE,
            required_chars=string.printable.strip(),
            normalization_rule_name="identity",
            split_digits=True,
            byte_fallback=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            input_sentence_size=0,
            max_sentence_length=1_000_000,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1]
        raise DataError(f"cannot learn {vocab_size} pieces from this text ({reason}); reduce vocab_size") from None
    return model.getvalue()


def tokenizer_from_pieces(pieces: bytes) -> Any:
    """A transformers T5 tokenizer for a serialised SentencePiece model, with T5's sentinels."""
    import sentencepiece
    from transformers import T5Tokenizer

    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    vocab = [(processor.id_to_piece(i), float(processor.get_score(i))) for i in range(processor.get_piece_size())]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    return T5Tokenizer(vocab=vocab, extra_ids=SENTINELS, model_max_length=512)


def save_tokenizer(tokenizer: Any, pieces: bytes, folder: Path) -> None:
    """Write the hub's layout: `tokenizer.json`, `tokenizer_config.json` and `spiece.model`."""
    tokenizer.save_pretrained(folder)
    # A fast tokenizer does not write the SentencePiece file, which older loaders need.
    (folder / PIECES_FILE).write_bytes(pieces)


def sentinel_ids(tokenizer: Any) -> list[int]:
    """Ids of <extra_id_0>, <extra_id_1>, ...

    Raises ConfigError if the tokenizer has none.
    """
    ids = [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(SENTINELS)]
    if len(set(ids)) != SENTINELS or tokenizer.unk_token_id in ids:
        raise ConfigError("the tokenizer has no <extra_id_N> tokens, which span corruption needs; use a T5 tokenizer")
    return ids
