"""Means with standard errors, as entries of an evaluation's JSON.

Shapes: N sentences.
"""

import math
import sys

import numpy as np

from vae_ds.runtime import evaluations


def with_errors(**values: np.ndarray | None) -> dict[str, float | None]:
    """For each quantity `x` with one value per sentence: its mean `x` and its standard error `x_se`.

    Both are None for a quantity that does not exist. The error is None for a single sentence.
    """
    found: dict[str, float | None] = {}
    for name, values_N in values.items():
        mean, error = (None, None) if values_N is None else evaluations.estimate(values_N)
        found |= {name: mean, f"{name}_se": error}
    return found


def perplexity(name: str, nll_N: np.ndarray | None, units_N: np.ndarray) -> dict[str, float | None]:
    """`name`: exp(total nats / total units) of N sentences, and its standard error `name_se`.

    A perplexity is infinite if a float cannot represent it, or if there are no units. The error is that of a ratio of
    two sums over sentences, to first order: exp(r) * sd(nll - r * units) / (sqrt(N) * mean(units)), with the ratio r.
    """
    if nll_N is None:
        return {name: None, f"{name}_se": None}
    units_N = np.asarray(units_N, dtype=np.float64)
    units = float(units_N.sum())  # 0 if every sentence was cut within its first word
    ratio = float(nll_N.sum()) / units if units else math.inf
    if not ratio < math.log(sys.float_info.max):
        return {name: math.inf, f"{name}_se": None}
    value = math.exp(ratio)
    _, error = evaluations.estimate(nll_N - ratio * units_N)
    return {name: value, f"{name}_se": None if error is None else value * error / float(units_N.mean())}
