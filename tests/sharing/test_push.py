"""Push a model to a hub on this machine and load it from there; what goes wrong is one line and leaves nothing."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from huggingface_hub import ModelCard, constants

from support import tiny
from support.hub_server import READER, WRITER, Hub, serving
from support.models import build
from vae_ds import cli
from vae_ds.errors import CheckpointError, ConfigError, Failed
from vae_ds.model import auto_code, load_tokenizer
from vae_ds.sharing import push
from vae_ds.textvae import TextVAE

NAME = "someone/letters"
PUSHED = {
    *("config.json", "model.safetensors", "README.md", auto_code.CODE),
    *("spiece.model", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, with a token that may write, and an empty cache. Retries do not wait."""
    with serving() as made:
        for name, value in {
            "ENDPOINT": made.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": made.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # its copy of the switch
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield made


@pytest.fixture
def export(tmp_path: Path) -> Path:
    TextVAE(build(), load_tokenizer(tiny.base()), 24).save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "eval-test.json").write_text('{"model": "/a/path"}', encoding="utf-8")
    return tmp_path / "mine"


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """The exit code of a command, and what it printed on standard error, which must be one line."""
    capsys.readouterr()
    code = cli.run([str(word) for word in words])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


def test_a_pushed_model_comes_back_equal(
    hub: Hub, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["push", str(export), NAME, "--private"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.address}/{NAME}/commit/")
    assert hub.repositories[NAME].private
    files = hub.files(NAME)
    assert files.keys() - {".gitattributes"} == PUSHED
    assert files["model.safetensors"] == (export / "model.safetensors").read_bytes()
    assert tiny.base() not in "".join(
        content.decode() for name, content in files.items() if name.endswith(("on", "md"))
    )
    assert ModelCard(files["README.md"].decode()).data.library_name == "vae_ds"

    shutil.rmtree(export)
    local = TextVAE(build(), load_tokenizer(tiny.base()), 24)
    loaded = TextVAE.from_pretrained(NAME)
    assert (loaded.fingerprint, loaded.max_tokens) == (local.fingerprint, 24)
    assert loaded.reconstruct(["my sister found two letters ."]) == local.reconstruct(["my sister found two letters ."])
    # Again without a network, and without a token.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN")
    calls = len(hub.calls)
    assert cli.run(["encode", NAME, "two letters .", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == local.fingerprint
    assert len(hub.calls) == calls


def test_a_revision_is_another_model(hub: Hub, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(export, NAME)
    other = TextVAE(build(seed=1), load_tokenizer(tiny.base()), 24)
    other.save_pretrained(export)
    push(export, NAME, revision="trial")
    assert TextVAE.from_pretrained(NAME).fingerprint != other.fingerprint
    assert TextVAE.from_pretrained(NAME, revision="trial").fingerprint == other.fingerprint
    capsys.readouterr()
    assert cli.run(["encode", NAME, "a", "--revision", "trial", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == other.fingerprint
    with pytest.raises(CheckpointError, match="no such model or revision"):
        TextVAE.from_pretrained(NAME, revision="none")
    with pytest.raises(ConfigError, match="one of a name on the hub"):
        TextVAE.from_pretrained(export, revision="trial")


@pytest.mark.parametrize("stage", ["/large/", "/commit/", "preupload", "repos/create"])
def test_an_interrupted_push_changes_nothing_and_goes_on(
    hub: Hub, export: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.breaks = stage
    code, line = said(capsys, "push", export, NAME)
    assert code == 1
    assert "the connection to the hub broke" in line
    if NAME in hub.repositories:
        assert hub.files(NAME).keys() == {".gitattributes"}
    hub.breaks = None
    push(export, NAME)
    assert hub.files(NAME).keys() > PUSHED
    # Large files that arrived are not sent again.
    assert len([call for call in hub.calls if call.startswith("PUT /large/")]) <= (2 if stage != "/large/" else 99)


def test_a_fault_of_the_hub_is_one_line(hub: Hub, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.failing = "/commit/"
    code, line = said(capsys, "push", export, NAME)
    assert code == 1
    assert "the hub has a fault (503); nothing was changed there" in line


@pytest.mark.parametrize(
    ("token", "told"),
    [
        (None, "no token of the Hugging Face hub; log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", "the hub does not accept the token"),
        (READER, "someone/letters: the token may not write there"),
    ],
)
def test_a_token_that_does_not_do(
    hub: Hub, export: Path, token: str | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    code, line = said(capsys, "push", export, NAME)
    assert (code, hub.repositories) == (2, {})
    assert told in line


@pytest.mark.parametrize("name", ["letters", "a/b/c", "someone/", "some one/letters", "someone/letters.git"])
def test_a_wrong_name(hub: Hub, export: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = said(capsys, "push", export, name)
    assert (code, hub.calls) == (2, [])
    assert f"{name} is no name of a model on the hub, which is OWNER/NAME" in line


def test_what_is_no_model_is_not_pushed(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = said(capsys, "push", tmp_path / "nothing", NAME)
    assert (code, hub.calls) == (2, [])
    assert "no such directory" in line
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not written by vae_ds"):
        push(tmp_path, NAME)


def test_private_is_not_made_public(hub: Hub, export: Path) -> None:
    push(export, NAME)
    before = hub.files(NAME)
    with pytest.raises(ConfigError, match="exists and is public; nothing was pushed"):
        push(export, NAME, private=True)
    assert hub.files(NAME) == before


def test_no_network(hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Failed, match="cannot be reached; nothing was pushed"):
        push(export, NAME)
    with pytest.raises(CheckpointError, match="cannot be reached or has no such model"):
        TextVAE.from_pretrained(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        push(export, NAME)
    assert hub.calls == []


def test_a_learned_prior_goes_along(tmp_path: Path, hub: Hub) -> None:
    """It lies in a directory of its own in the export."""
    TextVAE(build(prior="flow"), load_tokenizer(tiny.base()), 24).save_pretrained(tmp_path / "mine")
    push(tmp_path / "mine", NAME)
    one, other = (TextVAE.from_pretrained(place) for place in (tmp_path / "mine", NAME))
    assert other.model.settings.prior == "flow"
    assert one.sample(3, seed=1) == other.sample(3, seed=1)
