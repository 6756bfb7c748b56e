"""Decide whether a model uses its latent code, from the metrics of a validation or an evaluation.

This file contains all thresholds. In nats per sentence:

- `collapsed`: the KL is below NATS. The KL is an upper bound on the mutual information, so the code cannot distinguish
  three sentences.
- `unused KL`: there is a KL, but the code does not identify the sentence, or the decoder does not use the code. In the
  first case `mi` is below NATS: the posterior is nearly the same for all sentences, which free bits alone can cause. In
  the second case `z_gain` is below NATS, or below SHARE of the weighted KL, beta * KL. With an exact posterior and
  decoder, `z_gain` would be at least the mutual information, which would be nearly the KL. SHARE is a tolerance for
  inexact models.
- `uses z`: none of these.
- `language model`: injection `none`, without a latent code.

Active units (`au`) are reported but not used: their threshold 0.01 is in units of the prior's variance, and a few units
can contain all of the information.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

NATS = 1.0
SHARE = 0.5
FEW_SENTENCES = 0.5  # share of the ceiling of `mi`, ln(sentences), if it is below 2 NATS: for 7 sentences or fewer

Word = Literal["collapsed", "unused KL", "uses z", "language model"]


class Verdict(NamedTuple):
    """`word` is the verdict. `reason` gives the numbers and the thresholds."""

    word: Word
    reason: str


def verdict(metrics: Mapping[str, Any], beta: float | None = None) -> Verdict | None:
    """The verdict from `kl`, `mi`, `mi_ceiling`, `au`, `kl_per_dim` and `z_gain`; None if one of them is missing.

    beta: the current weight of the KL in training, at most 1. In a phase with beta 0 the loss does not contain the KL,
    so the verdict does not compare `z_gain` with it. None means 1, the weight in the ELBO, for a finished model.
    """
    if "kl" in metrics and metrics["kl"] is None:
        return Verdict("language model", "the model has no latent code")
    if any(metrics.get(key) is None for key in ("kl", "mi", "mi_ceiling", "au", "kl_per_dim", "z_gain")):
        return None
    kl, mi, z_gain = metrics["kl"], metrics["mi"], metrics["z_gain"]
    paid = f"the code costs KL {kl:.2f} nats"
    units = f"{metrics['au']} of {len(metrics['kl_per_dim'])} units active"
    if not kl >= NATS:
        return Verdict(
            "collapsed", f"the code is nearly the same for all sentences: KL {kl:.2f} nats, below {NATS:g}; {units}"
        )
    needed_mi = min(NATS, FEW_SENTENCES * metrics["mi_ceiling"])
    if not mi >= needed_mi:
        why = f"it does not identify the sentence: mi {mi:.2f} nats, below {needed_mi:.2g}"
        return Verdict("unused KL", f"{paid}, but {why}; {units}")
    weighted_kl = kl if beta is None else min(beta, 1.0) * kl
    needed = max(NATS, SHARE * weighted_kl)
    of_what = "KL" if weighted_kl == kl else "beta * KL"
    limit = f"{needed:.2f}, {SHARE:.0%} of {of_what}" if needed > NATS else f"{NATS:g}"
    gain = f"with the z of another sentence, rec is {z_gain:.2f} nats higher (z_gain)"
    if not z_gain >= needed:
        return Verdict("unused KL", f"{paid}, but the decoder hardly uses it: {gain}, below {limit}; {units}")
    return Verdict("uses z", f"the decoder uses the code: {gain}, at least {limit}; {paid}; {units}")
