"""Disentanglement: whether single units of the code have single factors of the grammar. MIG, DCI and SAP.

The packages with these scores are no longer kept (disentanglement-lib, for TensorFlow 1), or have them for their own
data sets of images only (disent). The formulas are those of the papers that are named below.

Shapes: N texts, L latent units, F factors, V values of a factor, C bins of a unit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vae_ds.distributed import stream
from vae_ds.errors import DataError
from vae_ds.inspection import targets
from vae_ds.inspection.targets import Labelled
from vae_ds.runtime import require

BINS = 20  # of a unit, for MIG (Locatello et al. 2019)
GROUPS = 5  # of the jackknife
HELD_OUT = 0.25  # of the texts, for the scores of the classifiers
TREES = 20
DEPTH = 10


@dataclass(frozen=True)
class Scores:
    """The scores, each from 0 to 1, higher is better, and their standard errors by a jackknife over five groups."""

    scores: dict[str, float]
    errors: dict[str, float]
    texts: int
    factors: tuple[str, ...]


def scores(mu_NL: np.ndarray, labelled: Labelled, seed: int = 0) -> Scores:
    """MIG, DCI and SAP of the factors of the grammar.

    The standard error is the delete-a-group jackknife: each of five random groups of texts is left out once.
    Raises DataError if there are fewer than two factors with two classes, ConfigError without scikit-learn.
    """
    require("look", "scikit-learn", "sklearn", "a disentanglement score")
    factors = {name: _numbered(labelled.targets[name]) for name in labelled.factors}
    factors = {name: value_N for name, value_N in factors.items() if value_N.max(initial=0) > 0}
    if len(factors) < 2:
        raise DataError(f"disentanglement needs at least two factors with two values; found {len(factors)}")
    order_N = stream(seed, "disentanglement").permutation(len(mu_NL))
    mu_NL = mu_NL[order_N]
    factors = {name: value_N[order_N] for name, value_N in factors.items()}
    whole = _all(mu_NL, factors)
    group_N = np.arange(len(mu_NL)) % GROUPS
    parts = [
        _all(mu_NL[keep_N], {name: value_N[keep_N] for name, value_N in factors.items()})
        for keep_N in (group_N != group for group in range(GROUPS))
    ]
    errors = {name: _jackknife([part[name] for part in parts]) for name in whole}
    return Scores(whole, errors, len(mu_NL), tuple(factors))


def mig(mu_NL: np.ndarray, factors: Mapping[str, np.ndarray]) -> float:
    """The mutual information gap: mean over the factors of (I(z_1; v) - I(z_2; v)) / H(v).

    z_1 and z_2 are the units with the largest and the second largest mutual information (Chen et al. 2018, equation 6),
    by counts in 20 bins of equal width (Locatello et al. 2019). Factors with many values need many texts: the counts
    overestimate each mutual information, those of both units alike.
    """
    binned_NL = np.stack([_binned(unit_N) for unit_N in mu_NL.T], axis=1)
    gaps = []
    for value_N in factors.values():
        gains = sorted((mutual_information(unit_N, value_N) for unit_N in binned_NL.T), reverse=True)
        second = gains[1] if len(gains) > 1 else 0.0
        gaps.append((gains[0] - second) / _entropy(np.bincount(value_N)))
    return float(np.mean(gaps))


def dci(mu_NL: np.ndarray, factors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`disentanglement`, `completeness` and `informativeness` (Eastwood & Williams 2018, section 2).

    The importance R of unit i for factor j is that of a random forest that classifies the factor from all units.
    Disentanglement: 1 - H_F(row i of R, normalized), weighted by the sum of the row. Completeness: 1 - H_L(column j,
    normalized), weighted by the sum of the column. H_K is the entropy to the base K. Informativeness: the mean accuracy
    of the forests on a quarter of the texts, on which they were not trained.
    """
    from sklearn.ensemble import RandomForestClassifier

    cut = _cut(len(mu_NL))
    columns, accuracies = [], []
    for value_N in factors.values():
        # Each split may use every unit: a random choice of units would make noise important where it lacks the best.
        forest = RandomForestClassifier(TREES, max_depth=DEPTH, max_features=None, random_state=0)
        forest.fit(mu_NL[:cut], value_N[:cut])
        columns.append(forest.feature_importances_)
        accuracies.append(forest.score(mu_NL[cut:], value_N[cut:]))
    importance_LF = np.stack(columns, axis=1)
    return {
        "disentanglement": _concentration(importance_LF),
        "completeness": _concentration(importance_LF.T),
        "informativeness": float(np.mean(accuracies)),
    }


def sap(mu_NL: np.ndarray, factors: Mapping[str, np.ndarray]) -> float:
    """Separated attribute predictability: mean over the factors of the gap between the two best units.

    The score of a unit is the balanced accuracy with which thresholds on it predict the factor, as many as it has
    values less one, on texts on which they were not fitted (Kumar et al. 2018, section 3).
    """
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.tree import DecisionTreeClassifier

    cut = _cut(len(mu_NL))
    gaps = []
    for value_N in factors.values():
        known = set(value_N[cut:].tolist())
        found = []
        for unit_N1 in (unit_N[:, None] for unit_N in mu_NL.T):
            tree = DecisionTreeClassifier(max_leaf_nodes=max(2, len(known)), class_weight="balanced", random_state=0)
            guess_N = tree.fit(unit_N1[:cut], value_N[:cut]).predict(unit_N1[cut:])
            # A value that is guessed only has no accuracy of its own.
            seen_N = np.isin(guess_N, list(known))
            found.append(balanced_accuracy_score(value_N[cut:], np.where(seen_N, guess_N, value_N[cut:].max())))
        best = sorted(found, reverse=True)
        gaps.append(best[0] - (best[1] if len(best) > 1 else 0.0))
    return float(np.mean(gaps))


def mutual_information(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """I(a; b) in nats from the counts of two rows of numbers from 0."""
    counts_CV = np.zeros((a_N.max() + 1, b_N.max() + 1))
    np.add.at(counts_CV, (a_N, b_N), 1)
    return _entropy(counts_CV.sum(1)) + _entropy(counts_CV.sum(0)) - _entropy(counts_CV.ravel())


def table(found: Scores) -> str:
    """The scores for people, one per line."""
    lines = [f"{name:16} {value:.3f} ± {found.errors[name]:.3f}" for name, value in found.scores.items()]
    note = (
        f"{found.texts:,} texts, {len(found.factors)} factors; ± is the standard error of a jackknife, {GROUPS} groups"
    )
    return "\n".join([*lines, note])


def _all(mu_NL: np.ndarray, factors: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {"mig": mig(mu_NL, factors), **dci(mu_NL, factors), "sap": sap(mu_NL, factors)}


def _numbered(values: targets.Values) -> np.ndarray:
    """The values as numbers from 0; rare ones share a number."""
    rows, named = targets.classes(values)
    number = {name: place for place, name in enumerate(sorted({*named.tolist(), targets.OTHER}))}
    numbered_N = np.full(len(values), number[targets.OTHER])
    numbered_N[rows] = [number[name] for name in named.tolist()]
    return np.unique(numbered_N, return_inverse=True)[1]


def _binned(unit_N: np.ndarray) -> np.ndarray:
    edges = np.linspace(unit_N.min(), unit_N.max(), BINS + 1)[1:-1]
    return np.digitize(unit_N, edges)


def _entropy(counts: np.ndarray) -> float:
    """The entropy of a distribution in nats from its counts."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _concentration(importance_XY: np.ndarray) -> float:
    """1 - H(row) / log Y, weighted by the sums of the rows."""
    weight_X = importance_XY.sum(1)
    if not weight_X.sum():
        return 0.0
    each_X = [1 - _entropy(row_Y) / math.log(len(row_Y)) if row_Y.sum() else 0.0 for row_Y in importance_XY]
    return float(np.average(each_X, weights=weight_X))


def _cut(count: int) -> int:
    """The texts are in a random order, so the last ones are a random part."""
    return count - max(1, int(HELD_OUT * count))


def _jackknife(values: list[float]) -> float:
    apart = np.array(values) - np.mean(values)
    return float(math.sqrt((len(values) - 1) / len(values) * (apart**2).sum()))
