"""Assign sentences to splits. The split is a function of the text only; near-duplicates are always in one split."""

import hashlib
import re
import unicodedata
from typing import Literal

Split = Literal["train", "valid", "test"]

_DIGITS = re.compile(r"\d+")
_NEITHER_LETTER_NOR_DIGIT = re.compile(r"[\W_]+")
_FINAL_S = re.compile(r"(?<=\w\w[^s])s$")
_ARTICLES = frozenset({"a", "an", "the"})
_VALID_PERCENT = 5
_TEST_PERCENT = 5


def near_key(text: str) -> str:
    """The near-duplicate key: lower case, a run of digits as one symbol, punctuation and whitespace as one space.

    Articles and a final s are removed too: "Return the value." and "Returns a value." have the same key.
    """
    folded = _DIGITS.sub("0", unicodedata.normalize("NFKC", text).lower())
    words = _NEITHER_LETTER_NOR_DIGIT.sub(" ", folded).split()
    return " ".join(_FINAL_S.sub("", word) for word in words if word not in _ARTICLES)


def split_of_key(key: str) -> Split:
    """The split of a near-duplicate key: 90 % train, 5 % valid, 5 % test, by a hash that is equal on all machines."""
    percent = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 100
    if percent < _TEST_PERCENT:
        return "test"
    return "valid" if percent < _TEST_PERCENT + _VALID_PERCENT else "train"


def split_of(text: str) -> Split:
    """The split of a sentence. It does not depend on the other sentences of the corpus."""
    return split_of_key(near_key(text))
