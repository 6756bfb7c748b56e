"""The files of an evaluation: what is refused, and how differences are paired."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save

from vae_ds.errors import CheckpointError, DataError
from vae_ds.runtime import evaluations

FINGERPRINT = {"tokenizer": "t", "texts": "x", "lengths": "l"}


def write(run, rec_N, fingerprint=FINGERPRINT, **further):
    sentences = {"rec": np.asarray(rec_N, dtype=np.float64)} | further
    metrics = {"data_fingerprint": fingerprint, "sentences": len(rec_N), "rec": float(np.mean(rec_N))}
    run.mkdir(exist_ok=True)
    evaluations.write(run, "test", metrics, sentences)
    return run


def change_metrics(run, **change):
    path = evaluations.metrics_file(run, "test")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def values_alone(run, **values):
    """Values that do not say of which data they are."""
    evaluations.values_file(run, "test").write_bytes(save(values))


def command(run):
    return f"`vae-ds evaluate {run} --split test`"


def test_the_file_has_4_bytes_per_sentence_and_quantity_and_fits_its_metrics(tmp_path):
    """The mean of the float32 values differs from that of the metrics; the file is not of another evaluation."""
    rec_N = np.full(999, 0.1)
    run = write(tmp_path / "run", rec_N)
    assert evaluations.values_file(run, "test").stat().st_size < 4 * 999 + 400
    found_N = evaluations.read_values(run, "test")["rec"]
    assert found_N.dtype == np.float64
    assert found_N.tolist() == rec_N.astype(np.float32).tolist()
    assert found_N.mean() != rec_N.mean()


def test_values_come_back(tmp_path):
    run = write(tmp_path / "run", [1.5, 2.5, 4.0], kl=np.array([0.5, 0.5, 1.0]), iw_nll=np.array([2.0]))
    found = evaluations.read_values(run, "test")
    assert {name: values.tolist() for name, values in found.items()} == {
        "rec": [1.5, 2.5, 4.0],
        "kl": [0.5, 0.5, 1.0],
        "iw_nll": [2.0],
    }
    assert found["rec"].dtype == np.float64
    assert evaluations.nll_of(found, "rec").tolist() == [1.5, 2.5, 4.0]
    assert evaluations.nll_of(found, "nelbo").tolist() == [2.0, 3.0, 5.0]
    assert evaluations.nll_of(found, "iw_nll").tolist() == [2.0]
    del found["iw_nll"]
    assert evaluations.nll_of(found, "iw_nll") is None


def test_a_mean_is_taken_in_float64() -> None:
    """In float32, 10^8 sentences would have no digit left after the point."""
    found = evaluations.estimate(np.array([2.0**24, 1, 1, 1], np.float32))
    assert found.mean == 2.0**22 + 0.75
    assert found.se == pytest.approx((2.0**24 - 1) / 4)
    assert evaluations.estimate([3, 5]) == (4.0, pytest.approx(1.0))
    assert evaluations.estimate([3]) == (3.0, None)
    assert str(evaluations.Estimate(63.883, 0.42)) == "63.9 ± 0.4"
    with pytest.raises(ValueError, match="no values to average"):
        evaluations.estimate([])


def test_a_difference_is_paired_by_sentence_over_those_that_both_have():
    one_N, other_N = np.array([10.0, 21.0, 29.0, 77.0]), np.array([9.0, 19.0, 28.0])
    found = evaluations.paired(one_N, other_N)
    assert evaluations.paired(other_N, one_N).mean == -found.mean
    assert found.mean == pytest.approx(4 / 3)
    assert found.se == pytest.approx(np.std([1, 2, 1], ddof=1) / 3**0.5)  # that of two unpaired means is about 8


def test_the_values_of_a_language_model_are_exact_likelihoods():
    values = {"rec": np.array([3.0, 4.0])}
    assert all(evaluations.nll_of(values, name) is values["rec"] for name in ("rec", "nelbo", "iw_nll"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: evaluations.values_file(run, "test").unlink(), "no such file; write it with RUN"),
        (lambda run: evaluations.values_file(run, "test").write_bytes(b"\x05nonsense"), "not the values of an evalu"),
        (lambda run: evaluations.metrics_file(run, "test").write_text("{"), "not an evaluation"),
        (lambda run: evaluations.metrics_file(run, "test").write_text("[]"), "not an evaluation: a list"),
        (lambda run: evaluations.metrics_file(run, "test").unlink(), "no such file; write it with RUN"),
        (
            lambda run: evaluations.metrics_file(run, "test").write_text('{"rec": 2.0}'),
            "has no data_fingerprint, so .* again with RUN",
        ),
        (lambda run: change_metrics(run, data_fingerprint={"texts": "x"}), "has no data_fingerprint, so"),
        (lambda run: values_alone(run, rec=np.ones(2)), "belongs to another evaluation"),
    ],
)
def test_a_missing_broken_or_old_file_is_one_line(tmp_path, spoil, message):
    run = write(tmp_path / "run", [1.0, 2.0])
    spoil(run)
    with pytest.raises(CheckpointError, match=message.replace("RUN", command(run))) as caught:
        evaluations.read_values(run, "test")
    assert "\n" not in str(caught.value)
    assert f"{run}/eval-test." in str(caught.value)


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/none: no such directory$"):
        evaluations.read(tmp_path / "none", "test")


@pytest.mark.parametrize("values", [{"kl": [1.0, 2.0]}, {"rec": [1.0, 2.0], "kl": [1.0]}])
def test_values_without_rec_or_of_different_sentences_are_refused(tmp_path, values):
    run = write(tmp_path / "run", [1.0, 2.0])
    metrics = evaluations.read(run, "test")
    evaluations.write(run, "test", metrics, {name: np.array(part) for name, part in values.items()})
    with pytest.raises(CheckpointError, match="belongs to another evaluation"):
        evaluations.read_values(run, "test")


def test_values_whose_mean_is_not_finite_come_back(tmp_path):
    """The mean of a diverged model is null in JSON. Its values are still those of its evaluation."""
    run = write(tmp_path / "run", [1.0, math.nan])
    assert evaluations.read(run, "test")["rec"] is None
    np.testing.assert_array_equal(evaluations.read_values(run, "test")["rec"], [1.0, math.nan])


@pytest.mark.parametrize(
    "change",
    [{"sentences": 3}, {"rec": 1.6}, {"rec": None}, {"data_fingerprint": FINGERPRINT | {"texts": "y"}}],
)
def test_values_of_another_evaluation_are_refused(tmp_path, change):
    run = write(tmp_path / "run", [1.0, 2.0])
    change_metrics(run, **change)
    with pytest.raises(
        CheckpointError, match=rf"another evaluation than eval-test\.json; write both with {command(run)}$"
    ):
        evaluations.read_values(run, "test")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"texts": "y"}, "it has other sentences"),
        ({"lengths": "y"}, "it has other lengths of the kept text"),
        ({"tokenizer": "y", "lengths": "y"}, "it has another tokenizer$"),
        ({"texts": "y", "tokenizer": "y"}, "it has another tokenizer, other sentences$"),
    ],
)
def test_other_data_is_named(change, words):
    with pytest.raises(DataError, match=f"a cannot be compared with b: {words}"):
        evaluations.require_same_data(FINGERPRINT | change, FINGERPRINT, "a", "b")
    evaluations.require_same_data(FINGERPRINT, dict(FINGERPRINT), "a", "b")


@pytest.mark.parametrize(
    ("value", "se", "shown"),
    [
        (63.883, 0.42, "63.9 ± 0.4"),
        (63.883, 0.14, "63.88 ± 0.14"),
        (63.883, 0.096, "63.88 ± 0.10"),
        (63.883, 0.0004, "63.88 ± 0.00"),
        (63.883, 1.4, "63.9 ± 1.4"),
        (63.883, 1.6, "63.9 ± 1.6"),
        (63.883, 0.18, "63.88 ± 0.18"),
        (63.883, 0.195, "63.9 ± 0.2"),
        (163.883, 1.96, "164 ± 2"),
        (163.883, 23.0, "164 ± 23"),
        (63.883, 0.0, "63.88 ± 0.00"),
        (63.883, None, "63.88"),
        (63.883, math.inf, "63.88"),
        (math.inf, 0.4, "inf"),
    ],
)
def test_a_value_is_rounded_by_its_error(value, se, shown):
    assert evaluations.with_error(value, se) == shown
