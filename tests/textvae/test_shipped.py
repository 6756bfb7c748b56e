"""`tiny-vae`, the trained model that ships with the package: what it is, and where its name stands for it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from support import ROOT
from vae_ds import cli, config
from vae_ds.errors import ConfigError
from vae_ds.evaluation import finished_run
from vae_ds.model import T5VAE, VaeDsConfig, model_dir
from vae_ds.textvae import TextVAE

FOLDER = ROOT / "vae_ds" / "tiny_vae"
MEGABYTE = 10**6
TEXTS = [
    "Returns the number of elements in the list.",
    "The name of the file is not valid.",
    "This method is deprecated.",
]


@pytest.fixture(scope="module")
def vae() -> TextVAE:
    return TextVAE.from_pretrained("tiny-vae", device="cpu")


def test_it_is_small_and_says_how_it_was_made() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 6 * MEGABYTE
    with safe_open(FOLDER / "model.safetensors", framework="pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.bfloat16}  # noqa: SIM118
    described = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    # The command of its card makes it again only as long as the recipe is the same.
    stored = config.build(config.RunConfig, described["recipe"], "config.json")
    assert stored == config.load(config.RunConfig, "normal-prior")
    assert VaeDsConfig.from_pretrained(FOLDER).model["latent_dim"] == 32


def test_it_uses_its_code(vae: TextVAE) -> None:
    """Random weights, or those of another tokenizer, would not prefer the right code by many nats."""
    batch = vae.tokenizer(TEXTS, padding=True, return_tensors="pt")
    labels_BT = batch["input_ids"].masked_fill(batch["attention_mask"].eq(0), -100)
    z_BL = vae.encode(TEXTS)
    with torch.no_grad():
        own, other = (vae.model.reconstruction(z, labels_BT).mean() for z in (z_BL, z_BL.roll(1, 0)))
    assert other - own > 15
    assert vae.max_tokens == 48
    assert "list" in vae.reconstruct(TEXTS)[0]


def test_its_name_is_one_of_a_model_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["sample", "tiny-vae", "-n", "2"]) == 0
    assert cli.run(["compare", "tiny-vae"]) == 0
    assert "63.5" in capsys.readouterr().out
    assert cli.run(["export", "tiny-vae", "--to", "mine"]) == 0
    assert TextVAE.from_pretrained("mine").fingerprint == TextVAE.from_pretrained("tiny-vae").fingerprint
    recipe = ["train", "normal-prior", "--dry-run", "--set", "model.weights=tiny-vae", "data.corpus=grammar"]
    assert cli.run(recipe) == 0
    assert T5VAE.from_pretrained("tiny-vae").latent_dim == 32


def test_nothing_is_written_into_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(FOLDER.iterdir())
    assert cli.run(["evaluate", "tiny-vae", "--recipe", "recommended"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: tiny-vae is part of the installation")
    assert "vae-ds export tiny-vae --to DIR" in said
    with pytest.raises(ConfigError, match="copy it first"):
        finished_run.evaluate_run(FOLDER, "test", {}, recipe="recommended")
    assert sorted(FOLDER.iterdir()) == before


def test_a_directory_of_its_name_wins_and_this_is_said(
    tmp_path: Path, vae: TextVAE, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        other = TextVAE(T5VAE.from_pretrained(FOLDER), vae.tokenizer, 48)
        other.model.t5.shared.weight.zero_()
    other.save_pretrained("tiny-vae")
    with pytest.warns(UserWarning, match="not the model that ships with vae_ds"):
        assert TextVAE.from_pretrained("tiny-vae").fingerprint == other.fingerprint
    with pytest.warns(UserWarning, match="not the model that ships"):
        assert model_dir("tiny-vae").resolve() == tmp_path / "tiny-vae"
    capsys.readouterr()
    assert cli.run(["encode", "tiny-vae", "A file.", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["model"] == other.fingerprint
    assert shown.err.count("not the model that ships with vae_ds") == 1
