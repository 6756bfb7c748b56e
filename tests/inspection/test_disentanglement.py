"""MIG, DCI and SAP of codes that are built by hand, whose scores are known."""

import math

import numpy as np
import pytest

from vae_ds.errors import DataError
from vae_ds.inspection import Labelled, disentanglement

VALUES = {"tense": 3, "number": 2, "place": 4}
N = 1200


def factors() -> dict[str, np.ndarray]:
    """Independent factors of N texts, each value equally often."""
    random = np.random.default_rng(1)
    return {name: random.permutation(np.arange(N) % count) for name, count in VALUES.items()}


def noise(units: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((N, units))


def code(*columns: np.ndarray) -> np.ndarray:
    """A unit for each column, with a little noise, and a unit of noise alone."""
    exact_NL = np.stack(columns, axis=1).astype(float)
    return np.concatenate([exact_NL + 0.01 * noise(len(columns)), noise(1)], axis=1)


def test_a_unit_for_each_factor_has_the_highest_scores() -> None:
    known = factors()
    mu_NL = code(*known.values())
    assert disentanglement.mig(mu_NL, known) == pytest.approx(1, abs=0.03)
    assert disentanglement.dci(mu_NL, known) == pytest.approx(
        {"disentanglement": 1, "completeness": 1, "informativeness": 1}, abs=0.06
    )
    # The other units know nothing: balanced accuracy 1 / values.
    chance = np.mean([1 / count for count in VALUES.values()])
    assert disentanglement.sap(mu_NL, known) == pytest.approx(1 - chance, abs=0.06)


def test_a_factor_in_two_units_is_not_complete() -> None:
    known = factors()
    mu_NL = code(*known.values(), *known.values())
    assert disentanglement.mig(mu_NL, known) == pytest.approx(0, abs=0.01)
    assert disentanglement.sap(mu_NL, known) == pytest.approx(0, abs=0.01)
    found = disentanglement.dci(mu_NL, known)
    assert found["disentanglement"] == pytest.approx(1, abs=0.06)
    # A forest divides the importance of two equal units about evenly, among seven units.
    assert found["completeness"] == pytest.approx(1 - math.log(2) / math.log(7), abs=0.08)


def test_two_factors_in_one_unit_are_not_disentangled() -> None:
    known = factors()
    both = {name: known[name] for name in ("number", "place")}
    mu_NL = code(both["number"] * VALUES["place"] + both["place"])
    found = disentanglement.dci(mu_NL, both)
    assert found["disentanglement"] < 0.1
    assert found["completeness"] > 0.9
    assert disentanglement.mig(mu_NL, both) == pytest.approx(1, abs=0.03)  # MIG does not see it (Chen et al. 2018)


def test_noise_has_the_lowest_scores() -> None:
    known, mu_NL = factors(), noise(5)
    assert disentanglement.mig(mu_NL, known) < 0.02
    assert disentanglement.sap(mu_NL, known) < 0.08
    found = disentanglement.dci(mu_NL, known)
    assert max(found["disentanglement"], found["completeness"]) < 0.05
    chance = np.mean([1 / count for count in VALUES.values()])
    assert found["informativeness"] == pytest.approx(chance, abs=0.06)


def test_mutual_information_has_closed_forms() -> None:
    a_N, b_N = np.arange(120) % 2, np.arange(120) // 2 % 3
    assert disentanglement.mutual_information(a_N, b_N) == pytest.approx(0, abs=1e-12)
    assert disentanglement.mutual_information(a_N, a_N) == pytest.approx(math.log(2))
    assert disentanglement.mutual_information(a_N, np.arange(120) % 6) == pytest.approx(math.log(2))


def test_scores_have_errors_and_need_factors() -> None:
    known = {name: [f"{name} {value}" for value in value_N] for name, value_N in factors().items()}
    mu_NL = code(factors()["number"], factors()["tense"])
    labelled = Labelled(["text"] * N, {**known, "label": ["one"] * N}, tuple(known))
    found = disentanglement.scores(mu_NL, labelled)
    assert found.factors == tuple(VALUES)
    assert found.scores["mig"] == pytest.approx(2 / 3, abs=0.05)  # nothing has the place
    assert all(0 < error < 0.1 for error in found.errors.values())
    assert "1,200 texts, 3 factors" in disentanglement.table(found)
    with pytest.raises(DataError, match="at least two factors with two values; found 1"):
        disentanglement.scores(mu_NL, Labelled(["text"] * N, labelled.targets, ("number", "label")))
