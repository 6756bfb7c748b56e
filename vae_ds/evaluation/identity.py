"""What an evaluation was computed on: a fingerprint of the sentences, their kept lengths and the tokenizer."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vae_ds import distributed
from vae_ds.data import Progress, TokenSet, tokenizer_fingerprint
from vae_ds.errors import ConfigError
from vae_ds.model import read_export
from vae_ds.runtime import evaluations, run_dirs

DIGITS = 16
PART = 10_000  # sentences between two lines of progress


def data_fingerprint(tokens: TokenSet, tokenizer: Any) -> dict[str, str]:
    """The fingerprint of a split, with the parts of `evaluations.PARTS`.

    `texts` covers the uncut sentences in order, `lengths` the kept tokens and words of each. It does not depend on the
    files that the sentences come from, nor on other splits. Reading the sentences takes about 20 seconds per million.
    """
    lengths = hashlib.sha256()
    for counts_N in (tokens.lengths_N, tokens.words_N, tokens.truncated_N):
        lengths.update(np.ascontiguousarray(counts_N, dtype=np.int64).tobytes())
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "texts": _hash(_texts(tokens)),
        "lengths": lengths.hexdigest()[:DIGITS],
    }


def agreed_fingerprint(tokens: TokenSet, tokenizer: Any) -> dict[str, str]:
    """`data_fingerprint` on every rank. Only rank 0 reads the sentences. A collective."""
    ranks = distributed.start()
    found = distributed.rank0_first(lambda: data_fingerprint(tokens, tokenizer) if ranks.is_main else {})
    return distributed.broadcast_object(found)


def yardstick_values(run: Path, split: str, fingerprint: dict[str, str], label: str) -> np.ndarray:
    """The negative log-likelihood of each sentence of the split under an evaluated plain language model, nats, (N,).

    Raises CheckpointError if the evaluation of `run` is missing, broken or of an older version, ConfigError if `run`
    has a latent code, and DataError if it was evaluated on other data than `label`, whose fingerprint is given.
    """
    require_language_model(run)
    values = evaluations.read_values(run, split)
    found = evaluations.fingerprint_of(run, split, evaluations.read(run, split))
    evaluations.require_same_data(found, fingerprint, f"the yardstick {run}", label)
    return values["rec"]


def require_language_model(run: Path) -> None:
    """Raise ConfigError unless `run` is a plain language model, by its exported model."""
    injection = read_export(run_dirs.model_of(run)).get("model", {}).get("injection")
    if injection != "none":
        raise ConfigError(
            f"{run} has injection `{injection}`; a yardstick must be a run with `none`, a plain language model"
        )


def _texts(tokens: TokenSet) -> Iterable[str]:
    with Progress("Fingerprinting", len(tokens)) as shown:
        for start in range(0, len(tokens), PART):
            yield from tokens.texts(start, start + PART)
            shown.add(min(PART, len(tokens) - start))


def _hash(texts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        # With the length, two lists of sentences cannot give the same bytes.
        found.update(len(content).to_bytes(8, "little"))
        found.update(content)
    return found.hexdigest()[:DIGITS]
