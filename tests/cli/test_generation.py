"""The commands that use a model: what their lines show, seeds, JSON, and standard input that is not read."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.launch import clean_environment
from support.tiny import ENGLISH, make_base
from vae_ds import cli
from vae_ds.cli import latents
from vae_ds.config import ModelConfig
from vae_ds.latents import encode
from vae_ds.model import T5VAE, load_tokenizer

SHORT = ("--max-new-tokens", "12")
NOTICE = "standard input is not read; give the texts as arguments"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model with random weights."""
    folder = tmp_path_factory.mktemp("generation")
    base = make_base(folder / "base", num_layers=1, num_decoder_layers=1)
    T5VAE.from_base(ModelConfig(base=str(base), latent_dim=4), seed=0).save_pretrained(
        folder / "model", load_tokenizer(base)
    )
    return folder / "model"


def told(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    capsys.readouterr()
    assert cli.run([str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_traversal_shows_the_unit_and_the_value(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    z = float(encode(T5VAE.from_pretrained(model).eval(), load_tokenizer(model), [ENGLISH[0]])[0, 2])
    how = ("traverse", model, ENGLISH[0], "--unit", 2, "--steps", 3, "--reach", 2, *SHORT)
    lines = told(capsys, *how)
    assert [line[:13] for line in lines] == [f"z[2] = {value:6.2f}" for value in (z - 2, z, z + 2)]
    rows = [json.loads(line) for line in told(capsys, *how, "--json")]
    assert [row["z"] for row in rows] == pytest.approx([z - 2, z, z + 2], abs=1e-5)
    assert {row["unit"] for row in rows} == {2}
    assert [f"z[2] = {row['z']:6.2f}  {row['text']}" for row in rows] == lines
    assert len(told(capsys, "traverse", model, ENGLISH[0], *SHORT)) == 7


@pytest.mark.parametrize("words", [["--reach", "0"], ["--reach", "inf"], ["--steps", "0"], ["--unit", "4"]])
def test_a_wrong_traversal(words: list[str], model: Path) -> None:
    try:
        code = cli.run(["traverse", str(model), "a", *words])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2


def test_an_interpolation_shows_the_share(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ("interpolate", model, *ENGLISH[:2], "--steps", 5, *SHORT)
    lines = told(capsys, *how)
    assert [line[:6] for line in lines] == ["0.00  ", "0.25  ", "0.50  ", "0.75  ", "1.00  "]
    rows = [json.loads(line) for line in told(capsys, *how, "--json")]
    assert [row["share"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert [row["text"] for row in rows] == [line[6:] for line in lines]


def test_json_of_the_others(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ENGLISH[:2]
    rows = [json.loads(line) for line in told(capsys, "reconstruct", model, *texts, *SHORT, "--json")]
    assert [(row["text"], sorted(row)) for row in rows] == [(text, ["reconstruction", "text"]) for text in texts]
    rows = [json.loads(line) for line in told(capsys, "sample", model, "-n", 3, *SHORT, "--json")]
    assert [sorted(row) for row in rows] == [["text"]] * 3
    (line,) = told(capsys, "analogy", model, "a", "b", "c", *SHORT, "--json")
    assert sorted(json.loads(line)) == ["a", "b", "c", "text"]


@pytest.mark.parametrize(
    "words",
    [
        ["reconstruct", ENGLISH[0]],
        ["sample"],
        ["interpolate", *ENGLISH[:2]],
        ["analogy", *ENGLISH[:3]],
        ["traverse", ENGLISH[0]],
    ],
    ids=lambda words: words[0],
)
def test_the_seed_acts_where_tokens_are_drawn(
    words: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *texts = words
    how = (command, model, *texts, *SHORT, "--temperature", 1)
    assert told(capsys, *how, "--seed", 1) == told(capsys, *how, "--seed", 1)
    assert told(capsys, *how, "--seed", 1) != told(capsys, *how, "--seed", 2)


def test_only_input_with_data_counts(tmp_path: Path) -> None:
    """Batch systems connect /dev/null, a closed or an empty pipe."""
    (tmp_path / "file").write_text("A sentence.\n", encoding="utf-8")
    (tmp_path / "empty").touch()
    asks = shlex.join([sys.executable, "-c", "from vae_ds.cli import latents; print(latents._has_unread_input())"])
    shells = {
        f"echo A sentence. | {asks}": True,
        f"(sleep 0.1; echo A sentence.) | {asks}": True,
        f"{asks} < file": True,
        f"{asks} < empty": False,
        f"{asks} < /dev/null": False,
        f"{asks} <&-": False,
        f": | {asks}": False,
        f"sleep 1 | {asks}": False,
    }
    env = clean_environment(tmp_path) | {"PATH": os.environ["PATH"]}
    for shell, has_data in shells.items():
        done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert done.stdout == f"{has_data}\n", (shell, done.stderr)


def test_input_that_is_not_read_is_mentioned_if_no_text_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").touch()
    (run / "config.yaml").write_text("- no recipe\n", encoding="utf-8")
    monkeypatch.setattr(latents, "_has_unread_input", lambda: True)
    assert cli.run(["reconstruct", str(run)]) == 2
    assert capsys.readouterr().err.splitlines()[0] == NOTICE
    assert cli.run(["reconstruct", str(run), "A sentence."]) == 2
    assert NOTICE not in capsys.readouterr().err
