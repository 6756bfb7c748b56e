"""Does the model use its latent code? One word and a sentence, from the metrics of a validation or an evaluation.

All thresholds stand here. In nats per sentence:

- `collapsed`: KL below NATS. The KL bounds the mutual information, so the code cannot tell three sentences apart.
- `unused KL`: there is a KL, but the code tells less than NATS about its sentence (`mi`: the posterior is the same for
  all, as free bits alone can make it), or the decoder does not read it (`z_gain` below NATS, or below SHARE of the KL
  that is paid for, beta times KL). If posterior and decoder were exact, another sentence's z would cost at least the
  mutual information, and that would be nearly the KL; so half of it leaves room for what is not exact.
- `healthy`: none of these.
- `language model`: injection `none`, without a code.

Active units (`au`) are told but decide nothing: their 0.01 is in units of the prior's variance, and few units can hold
all that there is to tell.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

NATS = 1.0
SHARE = 0.5
FEW_SENTENCES = 0.5  # of mi's ceiling ln(sentences), where that is below 2 NATS: 7 sentences or fewer

Word = Literal["collapsed", "unused KL", "healthy", "language model"]


class Verdict(NamedTuple):
    """`word` is the verdict, `reason` a sentence with the numbers and the thresholds that decided."""

    word: Word
    reason: str


def verdict(metrics: Mapping[str, Any], beta: float | None = None) -> Verdict | None:
    """What the metrics `kl`, `mi`, `mi_ceiling`, `au`, `kl_per_dim` and `z_gain` say together; None if one is missing.

    beta: the weight of the KL in training at this time, of which no more than 1 counts: in a phase with beta 0 no KL is
    paid for. None is 1, the evidence bound, by which a finished model is judged.
    """
    if "kl" in metrics and metrics["kl"] is None:
        return Verdict("language model", "it has no latent code")
    if any(metrics.get(key) is None for key in ("kl", "mi", "mi_ceiling", "au", "kl_per_dim", "z_gain")):
        return None
    kl, mi, z_gain = metrics["kl"], metrics["mi"], metrics["z_gain"]
    units = f"{metrics['au']} of {len(metrics['kl_per_dim'])} units active"
    if not kl >= NATS:
        return Verdict("collapsed", f"KL {kl:.2f} nats, below {NATS:g}: the code tells nothing; {units}")
    told = min(NATS, FEW_SENTENCES * metrics["mi_ceiling"])
    if not mi >= told:
        return Verdict("unused KL", f"KL {kl:.2f} nats, but the code tells {mi:.2f}, below {told:.2g}; {units}")
    paid = kl if beta is None else min(beta, 1.0) * kl
    needed = max(NATS, SHARE * paid)
    why = f"{needed:.2f}, {SHARE:.0%} of the KL paid for" if needed > NATS else f"{NATS:g}"
    costs = f"another sentence's z costs {z_gain:.2f}"
    if not z_gain >= needed:
        return Verdict("unused KL", f"KL {kl:.2f} nats, but {costs}, below {why}; {units}")
    return Verdict("healthy", f"KL {kl:.2f} nats; {costs}, at least {why}; {units}")
