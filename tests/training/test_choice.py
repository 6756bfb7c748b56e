"""The rule of `export: best`: which validations compete, off by one, and what of a choice outlives a resumption."""

from dataclasses import asdict
from typing import Any

import pytest

from vae_ds.config.settings import PhaseConfig
from vae_ds.training import phases
from vae_ds.training.choice import Choice, facts
from vae_ds.training.phases import PhasePlan

CONSTANT = {"schedule": "constant", "value": 1}


def plan(steps: int = 100, beta: dict[str, Any] | None = None, before: int = 10) -> PhasePlan:
    """The second phase of two."""
    first = PhaseConfig.model_validate({"name": "warmup", "steps": before})
    last = PhaseConfig.model_validate({"name": "full", "steps": steps, "beta": beta or CONSTANT})
    return phases.plan([first, last], 10)[1]


def valid(nelbo: float, verdict: str | None = "uses z", kl: float | None = 8.0) -> dict[str, Any]:
    return {"nelbo": nelbo, "verdict": verdict, "kl": kl}


def final_steps(plan_: PhasePlan) -> list[int]:
    return [done for done in range(1, plan_.steps + 1) if plan_.beta.is_final(done, 8.0)]


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (CONSTANT, range(1, 101)),
        # Update number 40 (from 0) is the first at beta 1, and the validation after it is at 41 steps.
        ({"schedule": "linear", "over_steps": 40}, range(41, 101)),
        ({"schedule": "linear", "over_steps": 99}, [100]),
        ({"schedule": "linear", "over_fraction": 1.0}, [100]),
        ({"schedule": "linear", "over_epochs": 50}, [100]),  # the paper's: 500 steps, ends at beta 0.2
        ({"schedule": "linear", "start": 1.0, "max": 1.0, "over_steps": 400}, range(1, 101)),
        # Two cycles of 50: the hold parts are the updates 38 to 49 and 88 to 99.
        ({"schedule": "cyclical", "cycles": 2, "zero": 0.5, "ramp": 0.25}, [*range(39, 51), *range(89, 101)]),
        ({"schedule": "cyclical", "cycles": 2, "zero": 0.5, "ramp": 0.5}, [50, 100]),  # no hold part
    ],
)
def test_a_validation_is_at_the_beta_of_the_update_before_it(beta: dict[str, Any], expected: Any) -> None:
    assert final_steps(plan(beta=beta)) == list(expected)


@pytest.mark.parametrize(("kl", "is_near"), [(7.19, False), (7.21, True), (8.79, True), (8.81, False), (None, True)])
def test_a_target_is_reached_by_the_kl(kl: float | None, is_near: bool) -> None:
    target = plan(beta={"schedule": "target", "kl": 8.0})
    assert target.beta.final() is None
    assert target.beta.is_final(1, kl) is is_near
    assert Choice.begin(target, 50).takes(target, 1, valid(9.0, kl=kl)) is is_near


def test_only_better_validations_that_use_z_are_taken() -> None:
    one = plan(beta={"schedule": "linear", "over_steps": 40})
    choice = Choice.begin(one, 50)
    taken = [
        choice.takes(one, done, metrics)
        for done, metrics in [
            (40, valid(1.0)),  # beta is not final yet
            (50, valid(2.0, "collapsed")),
            (60, valid(3.0, "unused KL")),
            (65, valid(3.0, None)),
            (70, valid(float("nan"))),
            (80, valid(9.0)),
            (90, valid(9.0)),
            (100, valid(8.0)),
        ]
    ]
    assert taken == [False, False, False, False, False, True, False, True]
    assert (choice.step, choice.nelbo) == (110, 8.0)
    counted = {"collapsed": 1, "unused KL": 1, "without a verdict": 1, "without a finite nelbo": 1, "uses z": 3}
    assert choice.verdicts == counted
    assert choice.reason() == "model/ is the validation of step 110 (nelbo 8.00, the best of 3 that use z)"


def test_the_last_weights_are_explained() -> None:
    choice = Choice.begin(plan(), 50)
    assert choice.reason() == "model/ has the last weights: no validation at the final beta was compared"
    for done in (10, 20):
        assert not choice.takes(plan(), done, valid(2.0, "collapsed"))
    assert choice.reason() == "model/ has the last weights: no validation at the final beta used z (2 collapsed)"
    assert not choice.takes(plan(), 30, valid(2.0, "unused KL"))
    assert choice.reason().endswith(" used z (2 collapsed, 1 unused KL)")
    told = facts(choice, 110)
    assert (told["step"], told["nelbo"], told["reason"]) == (110, None, choice.reason())
    target = Choice.begin(plan(beta={"schedule": "target", "kl": 8.0}), 50)
    assert target.reason() == "model/ has the last weights: no validation near the target KL was compared"
    reason = "model/ has the last weights, as `export: last` asks"
    assert facts(None, 110) == {"step": 110, "nelbo": None, "reason": reason}


def test_the_best_is_said_to_be_the_best_of_those_that_were_compared() -> None:
    one = plan()
    choice = Choice.begin(one, 50)
    assert choice == Choice(phase=1, beta=1.0, sentences=50)
    choice.takes(one, 10, valid(9.0))
    assert choice.reason() == "model/ is the validation of step 20 (nelbo 9.00, the only one that uses z)"
    choice.takes(one, 20, valid(9.5))
    assert choice.reason() == "model/ is the validation of step 20 (nelbo 9.00, the best of 2 that use z)"
    assert facts(choice, 110) == asdict(choice) | {"reason": choice.reason()}


def test_a_language_model_competes_without_z() -> None:
    choice = Choice.begin(plan(), 50)
    assert choice.takes(plan(), 10, valid(9.0, "language model", None))
    assert choice.reason() == "model/ is the validation of step 20 (nelbo 9.00, the only one)"
    assert choice.takes(plan(), 20, valid(8.0, "language model", None))
    assert choice.reason() == "model/ is the validation of step 30 (nelbo 8.00, the best of 2)"


def chosen(of: PhasePlan, done: int, nelbo: float = 9.0) -> Choice:
    choice = Choice.begin(of, 50)
    assert choice.takes(of, done, valid(nelbo))
    return choice


@pytest.mark.parametrize(
    ("beta", "stays"),
    [
        (CONSTANT, True),
        ({"schedule": "linear", "over_steps": 40}, True),
        ({"schedule": "linear", "over_fraction": 0.5}, True),
        ({"schedule": "linear", "over_steps": 400}, False),
        ({"schedule": "linear", "over_fraction": 1.0}, False),
        ({"schedule": "cyclical", "cycles": 4}, True),
        ({"schedule": "target", "kl": 8.0}, True),
    ],
)
def test_a_longer_phase_keeps_a_choice_at_the_beta_of_its_own_end(beta: dict[str, Any], stays: bool) -> None:
    saved = chosen(plan(100, beta), 100)
    found = Choice.begin(plan(200, beta), 50).resumed(saved, facts(saved, 110))
    assert found == (saved if stays else Choice.begin(plan(200, beta), 50))


def test_what_does_not_compare_is_dropped() -> None:
    saved, begun = chosen(plan(), 100), Choice.begin(plan(), 50)
    assert begun.resumed(saved, facts(saved, 110)) == saved
    assert Choice.begin(plan(), 60).resumed(saved, facts(saved, 110)).step is None
    another = Choice(2, begun.beta, 50)  # a third phase follows
    assert another.resumed(saved, facts(saved, 110)) == another
    assert begun.resumed(None, facts(saved, 110)) == begun
    counted = Choice(**asdict(Choice.begin(plan(), 60)) | {"verdicts": {"collapsed": 3}})
    assert begun.resumed(counted, None) == begun, "its validations were counted on other sentences"
    assert begun.resumed(counted, facts(saved, 110)) == begun


def test_model_decides_what_is_chosen() -> None:
    """Killed after an export, before the next checkpoint; or model/ is gone, or of another beginning."""
    saved, newer, begun = chosen(plan(), 50), chosen(plan(), 80, 7.0), Choice.begin(plan(), 50)
    found = begun.resumed(saved, facts(newer, 110))
    assert (found.step, found.nelbo, found.verdicts) == (90, 7.0, saved.verdicts)
    assert begun.resumed(Choice.begin(plan(), 50), facts(newer, 110)).step == 90
    assert begun.resumed(saved, None) == begun
    assert begun.resumed(saved, facts(None, 110)) == begun
    counted = Choice(**asdict(begun) | {"verdicts": {"collapsed": 3}})
    assert begun.resumed(counted, None) == counted
    assert begun.resumed(counted, facts(counted, 110)) == counted
