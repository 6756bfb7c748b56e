"""Differences of two runs, paired by sentence.

Most of the variance of a mean over sentences is that of the sentences: long ones have a higher loss than short ones. It
cancels in a difference on the same sentences. Therefore the standard error of a paired difference is much smaller than
those of the two means, and only it says whether two runs differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vae_ds.runtime import evaluations

if TYPE_CHECKING:
    import numpy as np

LIKELIHOODS = ("rec", "nelbo", "iw_nll")
QUANTITIES = ("nelbo", "iw_nll", "rec", "z_gain", "kl")
ERRORS = 2.0  # a difference of more standard errors is marked
MARK = "*"

Values = Mapping[str, "np.ndarray"]


@dataclass(frozen=True)
class Difference:
    """The mean of one run minus the other, in nats per sentence, over `count` sentences or seeds.

    `se` is its standard error over them; None for a single one.
    """

    mean: float
    se: float | None
    count: int

    @property
    def is_clear(self) -> bool:
        """Whether the difference is larger than ERRORS standard errors."""
        return self.se is not None and abs(self.mean) > ERRORS * self.se

    def __str__(self) -> str:
        """The difference with its sign, its error, and MARK if it is clear."""
        sign = "+" if self.mean > 0 else ""
        return f"{sign}{evaluations.with_error(self.mean, self.se)}{f' {MARK}' if self.is_clear else ''}"


def of_sentences(one: Values, other: Values, quantities: Sequence[str] = QUANTITIES) -> dict[str, Difference]:
    """One run minus the other for each quantity that both have, over the sentences that both have.

    `one` and `other` are values of each sentence as `evaluations.read_values` returns them, of the same data.
    """
    found = {}
    for name in quantities:
        one_N, other_N = _values(one, name), _values(other, name)
        if one_N is not None and other_N is not None:
            count = min(len(one_N), len(other_N))
            found[name] = Difference(*evaluations.paired(one_N, other_N), count=count)
    return found


def over_seeds(of_each_seed: Sequence[Mapping[str, Difference]]) -> dict[str, Difference]:
    """The mean over seeds of differences that are paired by seed, with the standard error over the seeds.

    Of one seed: its differences as they are, with the standard error over the sentences.
    """
    first, *others = of_each_seed
    if not others:
        return dict(first)
    shared = [name for name in first if all(name in other for other in others)]
    return {
        name: Difference(*evaluations.estimate([of_seed[name].mean for of_seed in of_each_seed]), len(of_each_seed))
        for name in shared
    }


def to_first(run_dirs: Mapping[str, Path], split: str) -> dict[str, dict[str, Difference]]:
    """By label, each run but the first minus the first, for LIKELIHOODS.

    The values of two runs are in memory at a time. Raises CheckpointError for missing or broken values of a run.
    """
    (_, first), *others = run_dirs.items()
    if not others:
        return {}
    base = evaluations.read_values(first, split)
    return {label: of_sentences(evaluations.read_values(path, split), base, LIKELIHOODS) for label, path in others}


def _values(values: Values, quantity: str) -> np.ndarray | None:
    """A quantity of each sentence; None if the model does not have it."""
    if quantity in LIKELIHOODS:
        return evaluations.nll_of(values, quantity)
    if quantity == "z_gain":
        return values["rec_swapped"] - values["rec"] if "rec_swapped" in values else None
    return values.get(quantity)
