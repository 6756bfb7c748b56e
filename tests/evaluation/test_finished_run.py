"""Work on a finished run, from any directory."""

import json
from pathlib import Path

import pytest

from support.tiny import ENGLISH, demo_settings
from vae_ds.data.corpora import stream
from vae_ds.evaluation import finished_run
from vae_ds.training import train


@pytest.mark.timeout(360)
def test_a_run_trained_with_relative_paths_is_evaluated_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [setting.replace(f"{tmp_path}/", "") for setting in demo_settings(tmp_path)]
    short = ["phases.0.steps=1", "phases.1.steps=1", "logging.tensorboard=false", "export=last"]
    monkeypatch.chdir(tmp_path)
    run = train("demo", "runs/mine", [*settings, *short])
    assert run == Path("runs/mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = tmp_path / "runs" / "mine"
    assert finished_run.sentences(run, "test", 2) == list(ENGLISH[320:322])
    # The export knows the lengths of its training, away from the run, too. One of an earlier version asks its run.
    finished_run.export(run, tmp_path / "exported")
    assert [finished_run.max_tokens(place) for place in (run, tmp_path / "exported")] == [24, 24]
    description = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    del description["max_tokens"]
    for folder in (run / "model", tmp_path / "exported"):
        (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    assert [finished_run.max_tokens(place) for place in (run, tmp_path / "exported")] == [24, None]
    few = {"iw_samples": 2, "iw_sentences": 3, "bleu_sentences": 0, "samples": 0}
    metrics = finished_run.evaluate_run(run, "test", few)
    assert metrics is not None
    assert metrics["sentences"] == 80
    # The card is written with the model, and again with the evaluation. It does not tell where on this machine.
    before, after = (
        (place / "README.md").read_text(encoding="utf-8") for place in (tmp_path / "exported", run / "model")
    )
    assert "Not evaluated yet" in before
    assert f"{metrics['nelbo']:.1f} ±" in after.partition("`nelbo` | ")[2]
    assert after.count("\n", after.index("A traversal")) > 5
    for told in (before, after, json.dumps(description["recipe"])):
        assert "max_tokens" in told
        assert str(tmp_path) not in told
    # The same command from the first directory finds its run, with the same relative words.
    monkeypatch.chdir(tmp_path)
    assert train("demo", "runs/mine", [*settings, *short]) == Path("runs/mine")


@pytest.mark.timeout(360)
def test_the_code_of_a_streamed_run_is_compared_with_sentences_of_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["phases.0.steps=1", "phases.1.steps=1", "logging.tensorboard=false", "export=last", "data.streaming=true"]
    run = train("demo", tmp_path / "run", [*demo_settings(tmp_path), *short])
    few = {"iw_samples": 2, "iw_sentences": 3, "bleu_sentences": 0, "samples": 0}
    monkeypatch.setattr(stream, "noted_hash", lambda *_: pytest.fail("the whole file is read for nothing"))
    found = {limit: finished_run.evaluate_run(run, "test", few | {"mi_train_sentences": limit}) for limit in (100, 999)}
    assert [one and one["mi_train_sentences"] for one in found.values()] == [100, 256]
    assert [one and one["mi_train_se"] is not None for one in found.values()] == [True, True]
