"""The tables of metrics with one row per run."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from vae_ds.errors import CheckpointError
from vae_ds.studies.metric_tables import print_metrics, read_evaluations

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


def write(folder: Path, metrics: dict[str, Any], split: str = "test") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"eval-{split}.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def printed(*runs: Path, split: str = "test") -> list[str]:
    target = io.StringIO()
    print_metrics(runs, split, target)
    return [line.strip() for line in target.getvalue().splitlines() if line.strip(" ─")]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_each_metric_stands_in_its_column_and_a_missing_one_is_a_dash(tmp_path: Path) -> None:
    lines = printed(write(tmp_path / "vae", FULL), write(tmp_path / "plain", NO_LATENT))
    assert cells(lines[0]) == ["run", "rec", "kl", "nelbo", "iw_nll", "ppl", "iw_ppl", "mi", "au", "z_gain"]
    assert " ".join(lines[1].split()) == "vae 31.42 12.50 43.92 40.13 21.50 18.25 6.31 / 7.62 32 / 32 15.75"
    assert " ".join(lines[2].split()) == "plain 44.00 - 44.00 - 22.00 - - - -"
    assert lines[3].startswith("rec, kl, nelbo")
    assert lines[4:] == ["2,048 test sentences", "iw_nll, iw_ppl: 500 sentences, 100 samples each"]


def test_a_narrow_terminal_cuts_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = printed(write(tmp_path / ("a-long-name-" * 5), FULL | {"ppl": 1234567.5}))
    assert "1234567.50" in lines[1]
    assert lines[1].startswith("a-long-name-" * 5)
    assert not any("…" in line for line in lines)


def test_the_gain_over_a_yardstick_has_a_column_once_a_run_has_it(tmp_path: Path) -> None:
    lines = printed(write(tmp_path / "a", FULL), write(tmp_path / "b", FULL | {"lm_gain": -0.5}))
    assert cells(lines[0])[-2:] == ["z_gain", "lm_gain"]
    assert [line.split()[-1] for line in lines[1:3]] == ["-", "-0.50"]


def test_runs_with_different_numbers_of_sentences_have_a_note_each(tmp_path: Path) -> None:
    other = FULL | {"sentences": 100, "iw_sentences": None, "iw_samples": 50}
    lines = printed(write(tmp_path / "[a]", FULL), write(tmp_path / "b", other))
    assert lines[4:] == [
        "[a]: 2,048 test sentences",
        "b: 100 test sentences",
        "[a]: iw_nll, iw_ppl: 500 sentences, 100 samples each",
        "b: iw_nll, iw_ppl: an unknown number of sentences, 50 samples each",
    ]


def test_runs_with_the_same_name_are_shown_by_their_paths(tmp_path: Path) -> None:
    runs = [write(tmp_path / "x" / "run", FULL), write(tmp_path / "y" / "run", FULL), write(tmp_path / "z", FULL)]
    assert list(read_evaluations(runs)) == [str(runs[0]), str(runs[1]), "z"]


def test_a_number_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    assert printed(write(tmp_path / "a", FULL | {"ppl": float("inf"), "z_gain": float("nan")}))[1].split()[5] == "inf"


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
    "samples": 256,
    "sample_temperature": 1.0,
    "verdict": "healthy",
    "verdict_reason": "KL is 12.50 nats",
}


def test_metrics_of_text_have_a_table_of_their_own_and_verdicts_a_line_each(tmp_path: Path) -> None:
    plain = NO_LATENT | {"verdict": "language model", "verdict_reason": "it has no latent code", "samples": 100}
    lines = printed(write(tmp_path / "vae", FULL | TEXT), write(tmp_path / "plain", plain | {"self_bleu": 20.0}))
    assert lines[6:8] == ["vae: healthy: KL is 12.50 nats", "plain: language model: it has no latent code"]
    assert cells(lines[8]) == ["run", "bleu", "self_bleu", "distinct_1", "distinct_2", "reverse_ppl"]
    assert lines[9].split() == ["vae", "12.35", "33.30", "0.250", "0.679", "1234.50"]
    assert lines[10].split() == ["plain", "-", "20.00", "-", "-", "-"]
    assert lines[11:] == [
        "bleu: 256 greedy reconstructions, nrefs:1|tok:13a",
        "vae: the others: 256 samples of the prior, at temperature 1",
        "plain: the others: 100 samples of the prior, greedy",
    ]


def test_the_kl_of_units_is_sorted_and_long_lists_end(tmp_path: Path) -> None:
    target = io.StringIO()
    units = [0.001 * unit for unit in range(200)]
    run = write(
        tmp_path / "vae", FULL | TEXT | {"kl_per_dim": units, "au": 200, "lm_gain": 5.0, "forward_ppl": 99999.9}
    )
    print_metrics([run, write(tmp_path / "plain", NO_LATENT)], "test", target, units=True)
    lines = target.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
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
