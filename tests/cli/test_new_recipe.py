"""`vae-ds recipes new`: the file that it prints trains; wrong input is one line."""

import json
from pathlib import Path

import pytest

from support.tiny import ENGLISH, make_base, write_splits
from vae_ds import cli, config

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("new") / "base", "t5", num_layers=1, num_decoder_layers=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_splits(tmp_path / "text", ENGLISH[:300], ENGLISH[300:350], ENGLISH[350:])


def run(*words: object) -> int:
    try:
        return cli.run([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def test_a_new_recipe_trains(base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written, checked by a dry run and trained, with no other file than the one that was printed."""
    assert run("recipes", "new", "--base", base, "--data", text, "--latent-dim", 4, "--epochs", 2) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    mine = tmp_path / "mine.yaml"
    mine.write_text(printed.out, encoding="utf-8")
    assert f"vae-ds recipes new --base {base} --data {text} --latent-dim 4 --epochs 2\n" in printed.out
    assert run("train", mine, "--run-dir", tmp_path / "run", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "phase full: 18 steps, 2.00 epochs" in told
    assert "0.00% of the sentences cut" in told
    short = ["phases.0.steps=4", "logging.progress=false", "logging.tensorboard=false"]
    assert run("train", mine, "--run-dir", tmp_path / "run", "--set", *short) == 0
    assert (tmp_path / "run" / "checkpoints").is_dir()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "done"


def test_a_new_recipe_from_one_file_streams_or_draws(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, words in enumerate((["--data", text / "train.txt"], ["--data", text, "--streaming"])):
        assert run("recipes", "new", "--base", base, "--latent-dim", 4, *words) == 0
        mine = tmp_path / f"{number}.yaml"
        mine.write_text(capsys.readouterr().out, encoding="utf-8")
        assert run("train", mine, "--run-dir", tmp_path / "run", "--dry-run") == 0
        capsys.readouterr()


def test_json(base: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "new", "--base", base, "--data", text, "--latent-dim", 4, "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert config.build(config.RunConfig, tree, "json").model.base == str(base)


def other_base(folder: Path) -> Path:
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "bert" / "model.safetensors").touch()
    return folder / "bert"


def test_wrong_input_is_one_line(base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = ["recipes", "new"]
    cases = [
        ([*new, "--data", text], "--base is missing"),
        ([*new, "--base", base], "--data is missing"),
        ([*new, "--base", base, "--data", tmp_path / "nothing"], "nothing: no such file or directory"),
        ([*new, "--base", tmp_path / "nothing", "--data", text], "no such directory; use tiny"),
        ([*new, "--base", "no/such-base", "--data", text], "the hub cannot be reached or has no such model"),
        ([*new, "--base", other_base(tmp_path), "--data", text], "its model_type is 'bert'"),
        ([*new, "demo", "--base", base, "--data", text], "takes no name; found demo"),
        (["recipes", "show", "demo", "--base", base], "--base is an option of `vae-ds recipes new`"),
        (["recipes", "--kl-nats", "3"], "--kl-nats is an option of `vae-ds recipes new`"),
    ]
    for words, named in cases:
        assert run(*words) == 2, words
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1
        assert named in printed.err
    (text / "valid.txt").write_text("")
    assert run(*new, "--base", base, "--data", text) == 2
    assert "valid.txt: empty" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--percentile", "101"], ["--percentile", "0"], ["--epochs", "0"], ["--gpus", "0"]])
def test_wrong_numbers(words: list[str]) -> None:
    assert run("recipes", "new", "--base", "tiny", "--data", "docstrings", *words) == 2
