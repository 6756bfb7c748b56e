"""The tables of metrics with one row per run, and of differences."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.evaluated import DATA, write_evaluation
from vae_ds.errors import CheckpointError, DataError
from vae_ds.runtime import evaluations
from vae_ds.studies import differences
from vae_ds.studies.metric_tables import print_metrics, read_evaluations, with_differences

FULL = {
    "rec": 31.416,
    "kl": 12.5,
    "nelbo": 43.916,
    "iw_nll": 40.128,
    "ppl": 21.5,
    "ppl_subword": 9.1,
    "iw_ppl": 18.25,
    "mi": 6.312,
    "mi_ceiling": 7.6246,
    "au": 32,
    "kl_per_dim": [0.4] * 32,
    "z_gain": 15.75,
    "lm_gain": None,
    "sentences": 2048,
    "iw_sentences": 500,
    "iw_samples": 100,
    "tokens": 20480,
    "words": 18000,
}
NO_LATENT = dict.fromkeys(FULL) | {"rec": 44.0, "nelbo": 44.0, "ppl": 22.0, "sentences": 2048}


write = write_evaluation


def printed(*runs: Path, split: str = "test") -> list[str]:
    target = io.StringIO()
    print_metrics(runs, split, target)
    return [line.strip() for line in target.getvalue().splitlines() if line.strip(" ─")]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_each_metric_stands_in_its_column_and_a_missing_one_is_a_dash(tmp_path: Path) -> None:
    errors = {"rec_se": 0.42, "kl_se": 0.012, "ppl_se": 3.2, "mi_se": 0.05}
    lines = printed(write(tmp_path / "vae", FULL | errors), write(tmp_path / "plain", NO_LATENT))
    assert cells(lines[0]) == ["run", "rec", "kl", "nelbo", "iw_nll", "ppl", "iw_ppl", "mi", "au", "z_gain"]
    row = "vae 31.4 ± 0.4 12.50 ± 0.01 43.92 40.13 22 ± 3 18.25 6.31 ± 0.05 / 7.62 32 / 32 15.75"
    assert " ".join(lines[1].split()) == row
    assert " ".join(lines[2].split()) == "plain 44.00 - 44.00 - 22.00 - - - -"
    assert lines[3].startswith("rec, kl, nelbo")
    assert lines[4:8] == [
        "± is the standard error over the sentences",
        "2,048 test sentences",
        "iw_nll, iw_ppl: 500 sentences, 100 samples each",
        "vae: mutual information at most 12.50 ± 0.01 nats (kl); within the split 6.31 ± 0.05 (mi: 2,048 sentences, at"
        " most 7.62)",
    ]
    assert cells(lines[8]) == ["minus vae", "rec", "nelbo", "iw_nll"]


def test_the_estimate_against_training_sentences_takes_the_place_of_the_small_one(tmp_path: Path) -> None:
    """The interval gives the limit of both. One run without `mi_train` does not bring `mi` back into the table."""
    trained = {"mi_train": 9.06, "mi_train_se": 0.03, "mi_train_sentences": 45_000}
    lines = printed(write(tmp_path / "a", FULL | trained), write(tmp_path / "b", FULL))
    assert cells(lines[0])[-3:] == ["mi_train", "au", "z_gain"]
    assert cells(lines[1])[-3:] == ["9.06 ± 0.03", "32 / 32", "15.75"]
    assert cells(lines[2])[-3:] == ["-", "32 / 32", "15.75"]
    (told,) = [line for line in lines if line.startswith("a: mutual information")]
    assert told == (
        "a: mutual information between 9.06 ± 0.03 (mi_train: 45,000 training sentences, at most"
        f" {math.log(45_001):.2f}) and 12.50 nats (kl); within the split 6.31 (mi: 2,048 sentences, at most 7.62)"
    )


@pytest.mark.parametrize(
    ("normal", "told"), [(13.5, "at most 12.50 nats (kl)"), (11.25, "at most 11.25 nats (kl_normal)")]
)
def test_the_upper_bound_on_the_information_is_the_kl_under_the_better_prior(
    tmp_path: Path, normal: float, told: str
) -> None:
    lines = printed(write(tmp_path / "a", FULL | {"kl_normal": normal}))
    assert any(line.startswith(f"a: mutual information {told};") for line in lines)


def test_a_narrow_terminal_cuts_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = printed(write(tmp_path / ("a-long-name-" * 5), FULL | {"ppl": 1234567.5}))
    assert "1234567.50" in lines[1]
    assert lines[1].startswith("a-long-name-" * 5)
    assert not any("…" in line for line in lines)


def test_the_gain_over_a_yardstick_has_a_column_once_a_run_has_it(tmp_path: Path) -> None:
    beside = {"lm_gain": -0.5, "above_yardstick": 1.68, "above_yardstick_se": 0.19, "cost": "1.68 ± 0.19 nats worse"}
    lines = printed(write(tmp_path / "a", FULL), write(tmp_path / "b", FULL | beside))
    assert cells(lines[0])[4:6] == ["iw_nll", "above_yardstick"]
    assert cells(lines[0])[-2:] == ["z_gain", "lm_gain"]
    assert [(cells(line)[5], line.split()[-1]) for line in lines[1:3]] == [("-", "-"), ("1.68 ± 0.19", "-0.50")]
    assert "b: cost: 1.68 ± 0.19 nats worse" in lines


def test_runs_with_different_numbers_of_sentences_have_a_note_each(tmp_path: Path) -> None:
    other = FULL | {"sentences": 100, "iw_sentences": None, "iw_samples": 50}
    lines = printed(write(tmp_path / "[a]", FULL), write(tmp_path / "b", other))
    assert lines[4:8] == [
        "[a]: 2,048 test sentences",
        "b: 100 test sentences",
        "[a]: iw_nll, iw_ppl: 500 sentences, 100 samples each",
        "b: iw_nll, iw_ppl: an unknown number of sentences, 50 samples each",
    ]


def test_runs_with_the_same_name_are_shown_by_their_paths(tmp_path: Path) -> None:
    runs = [write(tmp_path / "x" / "run", FULL), write(tmp_path / "y" / "run", FULL), write(tmp_path / "z", FULL)]
    assert list(read_evaluations(runs)) == [str(runs[0]), str(runs[1]), "z"]


def test_a_number_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    run = write(tmp_path / "a", FULL)
    (run / "eval-test.json").write_text(json.dumps(FULL | {"ppl": math.inf, "z_gain": math.nan}), encoding="utf-8")
    assert printed(run)[1].split()[5] == "inf"


TEXT = {
    "bleu": 12.345,
    "bleu_sentences": 256,
    "bleu_signature": "nrefs:1|tok:13a",
    "self_bleu": 33.3,
    "distinct_1": 0.25,
    "distinct_2": 0.6789,
    "distinct_4": 0.9,
    "forward_ppl": None,
    "reverse_ppl": 1234.5,
    "mauve": 0.87654,
    "mauve_sd": 0.0123,
    "mauve_texts": 2000,
    "mauve_features": "base",
    "samples": 256,
    "sample_temperature": 1.0,
    "verdict": "uses z",
    "verdict_reason": "KL is 12.50 nats",
}


def test_metrics_of_text_have_a_table_of_their_own_and_verdicts_a_line_each(tmp_path: Path) -> None:
    plain = NO_LATENT | {"verdict": "language model", "verdict_reason": "it has no latent code", "samples": 100}
    lines = printed(write(tmp_path / "vae", FULL | TEXT), write(tmp_path / "plain", plain | {"self_bleu": 20.0}))
    assert lines[7:9] == ["vae: uses z: KL is 12.50 nats", "plain: language model: it has no latent code"]
    lines = lines[6:]  # without the differences
    assert cells(lines[8]) == ["run", "bleu", "self_bleu", "distinct_1", "distinct_2", "reverse_ppl", "mauve"]
    assert lines[9].split() == ["vae", "12.35", "33.30", "0.250", "0.679", "1234.50", "0.877"]
    assert lines[10].split() == ["plain", "-", "20.00", "-", "-", "-", "-"]
    assert lines[11:] == [
        "bleu: 256 greedy reconstructions, nrefs:1|tok:13a",
        "vae: the others: 256 samples of the prior, at temperature 1",
        "plain: the others: 100 samples of the prior, greedy",
        "mauve: 2,000 texts of each kind, features of base, ± 0.012 over clusterings",
    ]


def test_the_kl_of_units_is_sorted_and_long_lists_end(tmp_path: Path) -> None:
    target = io.StringIO()
    units = [0.001 * unit for unit in range(200)]
    run = write(
        tmp_path / "vae", FULL | TEXT | {"kl_per_dim": units, "au": 200, "lm_gain": 5.0, "forward_ppl": 99999.9}
    )
    print_metrics([run, write(tmp_path / "plain", NO_LATENT)], "test", target, units=True)
    lines = target.getvalue().splitlines()
    assert max(len(line) for line in lines if "nats (kl)" not in line and not line.startswith(" *")) <= 120
    start = lines.index(" vae: KL of each unit, the largest first:")
    words = " ".join(lines[start + 1 :]).split()
    assert words[:3] == ["199:0.20", "198:0.20", "197:0.20"]
    assert words[96:] == ["and", "104", "more,", "the", "last", "0:0"]
    assert not any("plain: KL" in line for line in lines)


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_a_run_without_a_whole_evaluation_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "eval-valid.json").write_text(text, encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"eval-valid\.json: (not an evaluation|no such file; write it with `vae-ds evaluate)"
    ):
        print_metrics([tmp_path], "valid")


def test_a_share_of_unknown_tokens_has_a_line_from_one_percent_on(tmp_path: Path) -> None:
    shares = {"none": 0.0, "little": 0.0099, "much": 0.034, "old": None}
    lines = printed(*(write(tmp_path / name, FULL | {"unk": share}) for name, share in shares.items()))
    told = [line for line in lines if "unknown to the tokenizer" in line]
    assert told == ["much: 3.4% of the tokens are unknown to the tokenizer (unk); the model cannot write them"]


def test_a_run_that_does_not_exist_is_not_to_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nope: no such directory$"):
        print_metrics([tmp_path / "nope"])


# Differences


def three(root: Path) -> dict[str, Path]:
    """A run, one that is 1.5 nats worse on the first half of the sentences, and a language model."""
    rng = np.random.default_rng(0)
    lengths_N = rng.uniform(20.0, 80.0, 400)
    values = {"rec": lengths_N, "kl": np.full(400, 12.0), "iw_nll": lengths_N[:100] + 10.0}
    worse = {**values, "rec": lengths_N + np.repeat([1.5, 0.0], 200), "iw_nll": lengths_N[:100] + 10.0}
    plain = {"rec": lengths_N + 11.0 + rng.normal(0, 1, 400)}
    found = {}
    for name, of_run in {"first": values, "worse": worse, "plain": plain}.items():
        metrics = {key: float(array.mean()) for key, array in of_run.items()} | {"sentences": 400}
        found[name] = write(root / name, dict.fromkeys(FULL) | metrics, values=of_run)
    return found


def test_differences_are_paired_by_sentence(tmp_path: Path) -> None:
    """The error of a difference is that of the differences, and not that of the sentences, which is 17 / sqrt(400)."""
    found = with_differences(list(three(tmp_path).values()))
    assert "differences" not in found["first"]
    worse = found["worse"]["differences"]
    assert worse["to"] == "first"
    assert worse["rec"] == {
        "mean": pytest.approx(0.75, abs=1e-5),
        "mean_se": pytest.approx(0.75 * math.sqrt(400 / 399) / 20, rel=1e-4),
        "sentences": 400,
    }
    assert worse["nelbo"]["mean"] == pytest.approx(0.75, abs=1e-5)
    assert worse["iw_nll"] == {"mean": 0.0, "mean_se": 0.0, "sentences": 100}
    # The exact likelihood of a language model beside the bounds of the others, on the sentences that both have.
    plain = found["plain"]["differences"]
    assert plain["iw_nll"]["sentences"] == 100
    assert plain["iw_nll"]["mean"] == pytest.approx(1.0, abs=0.4)
    assert plain["nelbo"]["mean"] == pytest.approx(-1.0, abs=0.2)
    assert json.loads(json.dumps(found)) == found


def test_a_difference_of_more_than_two_errors_is_marked(tmp_path: Path) -> None:
    lines = printed(*three(tmp_path).values())
    start = next(n for n, line in enumerate(lines) if line.startswith("minus first"))
    assert " ".join(lines[start + 1].split()) == "worse +0.75 ± 0.04 * +0.75 ± 0.04 * 0.00 ± 0.00"
    assert lines[start + 3].startswith("each run minus first on the same sentences")
    assert lines[start + 4] == "rec, nelbo: 400 sentences; iw_nll: 100 sentences"
    assert lines[start + 5].startswith("*: more than 2 standard errors")
    assert differences.Difference(2.1, 1.0, 9).is_clear
    assert differences.Difference(-2.1, 1.0, 9).is_clear
    assert not differences.Difference(1.9, 1.0, 9).is_clear
    assert not differences.Difference(5.0, None, 1).is_clear


def test_one_sentence_has_no_error_and_a_line_says_so(tmp_path: Path) -> None:
    one = dict.fromkeys(FULL) | {"rec": 30.0, "kl": 5.0, "nelbo": 35.0, "sentences": 1, "mi": 0.0, "mi_ceiling": 0.0}
    lines = printed(write(tmp_path / "a", one), write(tmp_path / "b", one | {"rec": 31.0, "nelbo": 36.0}))
    assert "a: 1 sentence is too few for standard errors, z_gain and a verdict; evaluate at least 2" in lines
    assert "1 test sentence" in lines
    assert not any("± is" in line for line in lines)
    (row,) = [line for line in lines if line.startswith("b") and "+1.00" in line]
    assert row.split() == ["b", "+1.00", "+1.00", "-"]


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (["tokenizer"], "another tokenizer"),
        (["texts"], "other sentences"),
        (["lengths"], r"other lengths of the kept text \(data\.max_tokens\)"),
        # The lengths follow from these.
        (["tokenizer", "texts", "lengths"], "another tokenizer, other sentences"),
    ],
)
def test_runs_on_other_data_do_not_compare(tmp_path: Path, parts: list[str], told: str) -> None:
    other = DATA | dict.fromkeys(parts, "f" * 16)
    runs = [write(tmp_path / "a", FULL), write(tmp_path / "b", FULL, data=other)]
    with pytest.raises(DataError, match=f"^b cannot be compared with a: it has {told}$"):
        read_evaluations(runs)


def test_an_evaluation_that_does_not_name_its_data_is_shown_alone(tmp_path: Path) -> None:
    """Version 0.1 wrote such evaluations."""
    old = write(tmp_path / "old", FULL)
    (old / "eval-test.json").write_text(json.dumps(FULL), encoding="utf-8")
    assert printed(old)[1].startswith("old")
    with pytest.raises(
        CheckpointError, match=r"old/eval-test\.json: has no data_fingerprint.* write it again with `vae-"
    ):
        read_evaluations([write(tmp_path / "new", FULL), old])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda file: file.unlink(), "no such file; write it with `vae-ds evaluate"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "not the values of an evaluation"),
        (lambda file: file.write_bytes(b""), "not the values of an evaluation"),
    ],
    ids=["missing", "cut", "empty"],
)
def test_values_that_cannot_be_paired(tmp_path: Path, spoil: Any, told: str) -> None:
    runs = [write(tmp_path / "a", FULL), write(tmp_path / "b", FULL)]
    spoil(evaluations.values_file(runs[1], "test"))
    with pytest.raises(CheckpointError, match=rf"b/eval-test\.safetensors: {told}"):
        print_metrics(runs, file=io.StringIO())
    # Alone, a run has no differences.
    assert printed(runs[1])


def test_values_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    """As if a copy of the JSON file alone came from another machine."""
    runs = [write(tmp_path / "a", FULL), write(tmp_path / "b", FULL)]
    other = json.loads((runs[1] / "eval-test.json").read_text(encoding="utf-8")) | {"rec": 33.0}
    (runs[1] / "eval-test.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"belongs to another evaluation than eval-test\.json; write both with"):
        with_differences(runs)


class Screen(io.StringIO):
    """A terminal of a few columns."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_that_is_too_narrow_for_a_row_per_run_gets_a_row_per_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write(tmp_path / name, FULL | {"rec_se": 0.42}) for name in ("one", "two")]
    monkeypatch.setenv("TERM", "xterm")
    for columns, is_upright in (("80", True), ("200", False)):
        monkeypatch.setenv("COLUMNS", columns)
        screen = Screen()
        print_metrics(runs, "test", screen)
        lines = [" ".join(re.sub(r"\x1b\[[\d;]*m", "", line).split()) for line in screen.getvalue().splitlines()]
        assert ("run one two" in lines) is is_upright
        assert ("rec 31.4 ± 0.4 31.4 ± 0.4" in lines) is is_upright
        assert any(line.startswith("run rec kl nelbo") for line in lines) is not is_upright
