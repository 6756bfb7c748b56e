"""How a training ends on the terminal: what was reached, what to do next, and a terminal that is gone before."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.launch import clean_environment
from support.processes import state_of
from support.tiny import demo_settings
from vae_ds import cli


def code_of(*words: object) -> int:
    try:
        return cli.run([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    short = ["phases.0.steps=2", "phases.1.steps=2", "validation.every_steps=2", "logging.tensorboard=false"]
    quick = ["evaluation.iw_samples=2", "evaluation.iw_sentences=4", "evaluation.bleu_sentences=0"]
    folder = tmp_path_factory.mktemp("endings")
    return [*demo_settings(folder, num_layers=1, num_decoder_layers=1), *short, *quick, "evaluation.samples=2"]


@pytest.fixture
def words(settings: list[str], tmp_path: Path) -> list[str]:
    """A training in a directory whose name needs quotes in a shell."""
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    return ["train", "demo", "--run-dir", str(tmp_path / "a run"), "--set", *settings, cache]


def test_a_training_ends_with_what_was_reached(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a run"
    assert code_of(*words, "--until", "1") == 0
    assert capsys.readouterr().out == ""
    assert code_of(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(row) for row in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0].startswith(f"last validation: step 4: nelbo {rows[-1]['nelbo']:.2f}, rec ")
    assert "nats per sentence, " in lines[0]
    assert lines[0].endswith(f" {rows[-1]['verdict']}")
    assert lines[1] == "model/ has the last weights, as `export: last` asks"
    assert lines[2] == f"model: {run / 'model'}"
    assert lines[3] == "next:"
    commands = [shlex.split(line) for line in lines[4:]]
    assert [command[:3] for command in commands] == [
        ["vae-ds", name, str(run)] for name in ("evaluate", "reconstruct", "sample")
    ]
    # They do what they say.
    for command in commands:
        assert code_of(*command[1:]) == 0
    capsys.readouterr()
    assert code_of(*words) == 0
    again = capsys.readouterr().out.splitlines()
    assert again == [f"{run} was done already; nothing is trained", *lines]


def test_a_language_model_is_not_asked_to_reconstruct(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last phase gets worse: the first validation there is exported, and its metrics are shown."""
    run = tmp_path / "a run"
    ruinous = ["phases.1.steps=4", "phases.1.optimizer={lr: 1000, clip: 0}", "phases.1.learning_rate.warmup_steps=1000"]
    beta = "phases.1.beta={schedule: constant, value: 1}"
    assert code_of(*words, "model.injection=none", "phases.0.freeze=[]", "export=best", *ruinous, beta) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(row) for row in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    nelbo = {row["step"]: f"{row['nelbo']:.2f}" for row in rows}
    assert lines[0].startswith("last validation: step 6: ")
    assert lines[1].startswith(f"exported validation: step 4: nelbo {nelbo[4]}, ")
    assert lines[2] == f"model/ is the validation of step 4 (nelbo {nelbo[4]}, the best of 2)"
    assert lines[3] == f"model: {run / 'model'}"
    assert "reconstruct" not in "\n".join(lines)
    assert code_of(*shlex.split(lines[-1])[1:]) == 0
    assert code_of("status", run) == 0
    assert lines[2] in capsys.readouterr().out


def test_the_recipe_may_follow_the_settings(words: list[str], tmp_path: Path) -> None:
    train, recipe, *others = words
    assert code_of(train, *others, recipe, "--dry-run") == 0
    assert not (tmp_path / "a run").exists()


def test_an_evaluation_shows_the_progress_of_each_part_and_a_validation_none(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vae_ds.data.progress.FIRST_S", 0.0)
    monkeypatch.setattr("vae_ds.data.progress.EVERY_S", 0.0)
    parts = ("Encoding and decoding", "Mutual information", "Decoding the z", "Importance-weighted likelihood")
    texts = ("Reconstructing", "Sampling", "Self-BLEU", "Perplexity under a trigram model")
    run = tmp_path / "a run"
    assert code_of(*words, "evaluation.bleu_sentences=4") == 0
    told = capsys.readouterr().err
    assert [part for part in (*parts, *texts) if part in told] == []
    assert code_of("evaluate", run) == 0
    told = capsys.readouterr().err
    assert told.startswith(f"evaluating {run} on the test split\n")
    assert [part for part in (*parts, *texts) if part not in told] == []


@pytest.mark.timeout(400)
def test_a_training_and_an_evaluation_outlive_their_pipe(words: list[str], tmp_path: Path) -> None:
    """`vae-ds train ... 2>&1 | head -2` trains to the end, and so for `evaluate`."""
    run = tmp_path / "a run"
    log = run / "terminal.log"
    lines = ["logging.progress=true", "phases.0.steps=20", "phases.1.steps=20", "checkpoint.every_steps=10"]
    for command, end in ((words + lines, "next:"), (["evaluate", str(run)], "KL of each unit")):
        log.unlink(missing_ok=True)
        shell = f"set -o pipefail; {shlex.join([sys.executable, '-u', '-m', 'vae_ds', *command])} 2>&1 | head -1"
        done = subprocess.run(
            ["bash", "-c", shell], env=clean_environment(tmp_path), capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(done.stdout.splitlines()) == 1
        assert end in log.read_text(encoding="utf-8")
    assert state_of(run) == "done"
    assert (run / "eval-test.json").is_file()
