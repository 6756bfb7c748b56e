"""Every fault that can be known before the training ends it before the training: later phases, weights, the start."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.tiny import demo_settings, make_base
from vae_ds import config as configuration
from vae_ds.config import RunConfig
from vae_ds.engine import WEIGHTS
from vae_ds.errors import CheckpointError, ConfigError
from vae_ds.model import T5VAE, load_tokenizer
from vae_ds.training.build import first_weights
from vae_ds.training.preparation import check_model

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def recipe(base: Path, *overrides: str) -> RunConfig:
    return configuration.load(RunConfig, "demo", [f"model.base={base}", "model.latent_dim=4", *overrides])


def test_a_right_recipe_passes(base: Path) -> None:
    check_model(recipe(base))
    check_model(recipe(base, "model.injection=none", "phases.0.freeze=[]"))


def test_the_freezing_of_a_later_phase_is_checked_at_the_start(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"phases\.1\.freeze: `decodr` matches no parameter"):
        check_model(recipe(base, "phases.1.freeze=[decodr]"))


def test_more_units_than_the_base_has_dimensions(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"latent_dim is 33, .*a vector of 32 numbers.*use at most 32"):
        check_model(recipe(base, "model.latent_dim=33"))


def cut(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def of_another_width(base: Path) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"d_ff": 64}), encoding="utf-8")


def without_a_shard(base: Path) -> None:
    index = {"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def old_and_cut(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    content = (base / "pytorch_model.bin").read_bytes()
    (base / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"model\.safetensors: missing, truncated or no safetensors file"),
        (of_another_width, r"is \[\d+, \d+\] in the weights, but \[\d+, \d+\] by config\.json"),
        (without_a_shard, r"model-00001-of-00002\.safetensors: missing, truncated"),
        (old_and_cut, r"pytorch_model\.bin is truncated or not a PyTorch file"),
    ],
)
def test_weights_are_checked_without_loading_them(base: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(base)
    with pytest.raises(ConfigError, match=message):
        check_model(recipe(base))


@pytest.fixture
def trained(base: Path, tmp_path: Path) -> Path:
    """An export of a VAE with weights that no base has."""
    model = T5VAE.from_base(recipe(base).model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path / "trained", load_tokenizer(str(base)))
    return tmp_path / "trained"


def test_a_trained_vae_is_a_start(base: Path, trained: Path) -> None:
    check_model(recipe(base, f"model.weights={trained}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.latent_dim=5", "its latent_dim is 4, the recipe's 5"),
        ("model.injection=cross_attention", "its injection is 'self_attention', the recipe's 'cross_attention'"),
    ],
)
def test_a_start_of_other_settings_is_named(base: Path, trained: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(recipe(base, f"model.weights={trained}", change))


def test_a_language_model_is_a_start_for_the_decoder(base: Path, tmp_path: Path) -> None:
    language_model = T5VAE.from_base(recipe(base, "model.injection=none").model)
    with torch.no_grad():
        for parameter in language_model.parameters():
            parameter.add_(1.0)
    language_model.save_pretrained(tmp_path / "lm", load_tokenizer(str(base)))
    config = recipe(base, f"model.weights={tmp_path / 'lm'}")
    check_model(config)
    model, others = T5VAE.from_base(config.model), dict(language_model.named_parameters())
    weights, taken = first_weights(model, None), set()
    for name, parameter in model.named_parameters():
        found = torch.empty(parameter.numel())
        weights.copy_to(found, name, WEIGHTS, 0)
        wanted = others.get(name, parameter).detach()
        assert torch.equal(found, wanted.flatten()), name
        taken |= {name} & others.keys()
    assert taken == others.keys()
    with pytest.raises(ConfigError, match="differs from the recipe's model; was it trained on another base"):
        check_model(recipe(make_base(tmp_path / "other", d_ff=64), f"model.weights={tmp_path / 'lm'}"))


def test_a_start_on_another_base_is_named(base: Path, trained: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", d_ff=64)
    with pytest.raises(ConfigError, match="differs from the recipe's model; was it trained on another base"):
        check_model(recipe(other, f"model.weights={trained}"))


def test_a_start_that_is_missing_or_cut_is_named(base: Path, trained: Path) -> None:
    with pytest.raises(CheckpointError, match="no exported model"):
        check_model(recipe(base, f"model.weights={trained.parent}"))
    tensors = load_file(trained / "model.safetensors")
    del tensors["bottleneck.mu.weight"]
    save_file(tensors, trained / "model.safetensors")
    with pytest.raises(ConfigError, match=r"`bottleneck\.mu\.weight` differs"):
        check_model(recipe(base, f"model.weights={trained}"))


def test_a_run_that_starts_from_a_trained_vae_has_its_weights(tmp_path: Path) -> None:
    """With a learning rate of almost 0, the export is the start."""
    settings = demo_settings(tmp_path)
    from vae_ds.training import train

    short = [*settings, "phases.0.steps=1", "phases.1.steps=1", "validation.every_steps=100"]
    first = train("demo", tmp_path / "first", short)
    still = [f"phases.{phase}.optimizer.{key}" for phase in (0, 1) for key in ("lr=1e-30", "weight_decay=0")]
    second = train("demo", tmp_path / "second", [*short, f"model.weights={first}", *still])
    one, two = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-20) for name in one)
    assert json.loads((second / "model" / "config.json").read_text(encoding="utf-8"))["model"].get("weights") is None
    # A run is loaded by its directory, too, and may move.
    shutil.move(second, tmp_path / "moved")
    assert T5VAE.from_pretrained(tmp_path / "moved").latent_dim == 4
