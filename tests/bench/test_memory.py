"""`vae-ds bench memory` on a small model: real ranks, and the parts of a run."""

import json
from pathlib import Path

import pytest

from vae_ds import cli

pytestmark = pytest.mark.timeout(560)


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "memory", "--run-dir", str(tmp_path), "--size", "tiny", "--ds-configs", "zero1"]
    words += ["--processes", "2", "--batch", "4", "--set", "data.corpus=grammar"]
    assert cli.run([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "memory.json").read_text()) == [row]
    assert [row["ds_config"], row["processes"], row["precision"]] == ["zero1", 2, "fp32"]
    parts = row["parts"]
    assert {"load", "engine", "step", "validation", "checkpoint", "resumed engine"} <= parts.keys()
    # Weights, gradients and half of the states of Adam, at least.
    assert parts["step"] > 4 * (2 + 1) * row["parameters"] / 1e6
    assert row["expected_mb"] > row["activations_mb"] > 0
    assert row["checkpoint_copies"] > 0
    # What the runs have left is removed.
    assert {path.name for path in tmp_path.iterdir()} == {"memory.json"}


def test_a_failed_run_names_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "memory", "--run-dir", str(tmp_path), "--size", "tiny", "--ds-configs", "zero7"]
    assert cli.run(words) == 2
    assert "zero7" in capsys.readouterr().err
