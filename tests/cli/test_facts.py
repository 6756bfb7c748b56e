"""The version, completions, and the facts that commands print for other programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vae_ds
from support.launch import clean_environment
from vae_ds import cli, config
from vae_ds.cli import options


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(words) == 0
    return capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"vae_ds {vae_ds.__version__}\n"


def test_the_package_lists_its_public_names() -> None:
    assert dir(vae_ds) == ["T5VAE", "TextVAE", "__version__", "train"]


def test_recipes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(told(capsys, "recipes", "--json"))
    assert [row["name"] for row in rows] == config.shipped_recipes()
    assert all(row["summary"] for row in rows)
    keys = json.loads(told(capsys, "recipes", "keys", "--json"))
    assert [(row["key"], row["default"], row["description"]) for row in keys] == config.reference()
    assert json.loads(told(capsys, "recipes", "show", "demo", "--json"))["name"] == "demo"


def test_completions_know_recipes_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    completers = {}
    for action in cli.parser()._actions:
        for command, parser in (getattr(action, "choices", None) or {}).items():
            found = [getattr(one, "completer", None) for one in parser._actions]
            completers[command] = [one for one in found if one is not None]
    for command in ("train", "pretrain", "submit"):
        recipes, settings = completers[command]
        assert {"demo", "mine.yaml"} <= set(recipes(prefix=""))
        assert "notes.txt" not in recipes(prefix="")
        assert {"seed=", "phases.0.steps="} <= set(settings(prefix=""))


def test_completion_asks_argcomplete_only_if_the_shell_asks(tmp_path: Path) -> None:
    """A module of that name records the call. Without it, the command runs as always."""
    code = "from vae_ds import cli; cli.run(['recipes'])"
    env = clean_environment(tmp_path)

    def output(**more: str) -> str:
        return subprocess.run([sys.executable, "-c", code], env=env | more, capture_output=True, text=True).stdout

    (tmp_path / "argcomplete.py").write_text("def autocomplete(parser): print('asked', parser.prog)\n")
    path = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    assert "asked" not in output(PYTHONPATH=path)
    assert output(PYTHONPATH=path, _ARGCOMPLETE="1").startswith("asked vae-ds\n")
    (tmp_path / "argcomplete.py").write_text("raise ImportError\n")
    assert output(PYTHONPATH=path, _ARGCOMPLETE="1") == output()


@pytest.mark.parametrize(
    ("option", "value"), [("--gpus-per-node", "-1"), ("--nodes", "0"), ("--tasks-per-node", "0"), ("--nodes", "x")]
)
def test_sizes_of_a_job(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(["submit", "demo", "--dry-run", option, value])
    assert end.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


def test_a_number_that_is_too_small_is_named_with_the_least() -> None:
    for least, parse in ((0, options.count), (1, options.positive)):
        with pytest.raises(Exception, match=f"found -1; expected an integer of at least {least}"):
            parse("-1")
        assert parse(str(least)) == least
