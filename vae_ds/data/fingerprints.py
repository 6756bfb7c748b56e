"""Hashes of what determines token ids."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of everything that determines the ids of a tokenizer: its vocabulary, its model and its special tokens."""
    parts: list[Any] = [type(tokenizer).__name__, sorted(tokenizer.special_tokens_map.items(), key=str)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Truncation and padding are settings of the most recent call, not of the tokenizer.
        state = json.loads(backend.to_str())
        parts.append({name: value for name, value in state.items() if name not in ("truncation", "padding")})
    else:
        parts.append(sorted(tokenizer.get_vocab().items()))
        vocabulary = getattr(tokenizer, "vocab_file", None)
        if vocabulary and Path(vocabulary).is_file():
            parts.append(hashlib.sha256(Path(vocabulary).read_bytes()).hexdigest())
    return json_digest(*parts)


def json_digest(*parts: Any) -> str:
    """Sixteen digits of a hash of values that JSON can hold; of others, their text counts."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
