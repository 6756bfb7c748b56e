"""Adapters: the model begins as the base, trains nothing else of an adapted stack, and its export is a plain model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from support import tiny
from support.models import TEXTS, UNITS, batch, build, latents, stock
from vae_ds.config.settings import ModelConfig
from vae_ds.errors import ConfigError
from vae_ds.model import check_start, held_names, is_adapter, plain_name, skeleton
from vae_ds.model.t5vae import T5VAE

pytestmark = pytest.mark.timeout(240)
EVERY = {"rank": 3, "alpha": 12, "modules": ["q", "k", "v", "o", "wo"]}
INJECTIONS = ("cross_attention", "self_attention", "self_attention+embedding", "none")


def trained(model: T5VAE) -> T5VAE:
    """The model with adapters that are not 0, as after a training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def outputs(model: T5VAE, kind: str) -> list[Tensor]:
    """mu and logvar of TEXTS, if the model has a code, and the logits for a fixed z."""
    inputs = batch(kind)
    z_BL = latents() if model.latent_dim else torch.zeros(len(TEXTS), 1)
    with torch.no_grad():
        logits_BTV = model.t5(
            encoder_outputs=BaseModelOutput(last_hidden_state=z_BL[:, None]), decoder_input_ids=inputs["input_ids_BT"]
        ).logits
        codes = model.encode(inputs["input_ids_BT"], inputs["attention_mask_BT"]) if model.latent_dim else ()
    return [*codes, logits_BTV]


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["t5", "v1_1"])
def test_the_model_begins_as_the_one_without_adapters(kind: str, injection: str) -> None:
    """The same new weights, the same values, and no draw from the global generator, which draws dropout."""
    plain = build(kind, injection=injection)
    before = torch.get_rng_state()
    adapted = build(kind, injection=injection, lora=EVERY)
    assert torch.equal(before, torch.get_rng_state())
    own = dict(plain.named_parameters())
    for name, parameter in adapted.named_parameters():
        assert is_adapter(name) or torch.equal(parameter, own[plain_name(name)]), name
    assert {plain_name(name) for name, _ in adapted.named_parameters() if not is_adapter(name)} == own.keys()
    for ours, theirs in zip(outputs(adapted, kind), outputs(plain, kind), strict=True):
        assert torch.equal(ours, theirs)
    assert all(
        parameter.abs().max() > 0 for name, parameter in adapted.named_parameters() if name.endswith("A.default.weight")
    )
    assert [name for name, _ in skeleton(adapted.settings).named_parameters()] == [
        name for name, _ in adapted.named_parameters()
    ]


def test_the_seed_gives_the_adapters() -> None:
    one, same, other = (dict(build(seed=seed, lora=EVERY).named_parameters()) for seed in (0, 0, 1))
    first = [name for name in one if name.endswith("lora_A.default.weight")]
    assert first
    assert all(torch.equal(one[name], same[name]) for name in first)
    assert not any(torch.equal(one[name], other[name]) for name in first)
    # The values of peft: uniform up to 1 / sqrt(inputs).
    assert all(one[name].abs().max() <= one[name].shape[1] ** -0.5 for name in first)
    assert max(float(one[name].detach().abs().max() * one[name].shape[1] ** 0.5) for name in first) > 0.95


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", ["both", "encoder", "decoder"])
@pytest.mark.parametrize("kind", ["t5", "v1_1"])
def test_a_gradient_reaches_what_trains_and_nothing_else(kind: str, where: str, checkpointing: bool) -> None:
    settings = {"gradient_checkpointing": checkpointing, "injection": "cross_attention"}
    model = trained(build(kind, lora=EVERY | {"where": where}, **settings)).train()
    terms = model(**batch(kind))
    (terms.rec_B + terms.kl_BL.sum(1)).mean().backward()
    stacks = ("encoder", "decoder") if where == "both" else (where,)
    for name, parameter in model.named_parameters():
        of_stack = name.startswith(tuple(f"t5.{stack}." for stack in stacks)) and ".memory." not in name
        of_head = name.startswith("t5.lm_head.") and "decoder" in stacks
        trains = is_adapter(name) or not (of_stack or of_head or name.startswith("t5.shared."))
        assert (parameter.grad is not None) == trains == parameter.requires_grad, name
        assert not trains or parameter.grad.abs().max() > 0, name
        assert (name in held_names(n for n, _ in model.named_parameters())) != trains
    if checkpointing:
        without = trained(build(kind, lora=EVERY | {"where": where}, injection="cross_attention")).train()
        terms = without(**batch(kind))
        (terms.rec_B + terms.kl_BL.sum(1)).mean().backward()
        for (name, one), other in zip(model.named_parameters(), without.parameters(), strict=True):
            assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_a_model_without_adapters_holds_nothing() -> None:
    assert held_names(name for name, _ in build().named_parameters()) == set()


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["t5", "v1_1", "mt5"])
def test_the_export_is_the_adapted_model_without_adapters(
    kind: str, injection: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(build(kind, injection=injection, lora=EVERY))
    model.save_pretrained(tmp_path / "model", notes={"origin": 1})
    wanted, plain = outputs(model, kind), outputs(build(kind, injection=injection), kind)
    monkeypatch.setitem(sys.modules, "peft", None)
    merged = T5VAE.from_pretrained(tmp_path / "model")
    assert merged.settings.lora is None
    found = outputs(merged, kind)
    for ours, theirs, before in zip(found, wanted, plain, strict=True):
        # In units of the largest value: two orders of the same sums differ by the rounding of float32.
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
        assert (ours - before).abs().max() > 1e-2 * theirs.abs().max()


@pytest.mark.parametrize("kind", ["t5", "v1_1"])
def test_peft_loads_the_exported_adapters_on_the_base(kind: str, tmp_path: Path) -> None:
    """peft's own merge of the stock T5 gives the stacks of the export; only the cross-attention's rest is its own."""
    model = trained(build(kind, injection="cross_attention", lora=EVERY))
    model.save_pretrained(tmp_path / "model")
    base, before = stock(kind), dict(stock(kind).named_parameters())
    loaded = PeftModel.from_pretrained(base, tmp_path / "model" / "adapters")
    theirs = dict(loaded.merge_and_unload().named_parameters())
    ours = load_file(tmp_path / "model" / "model.safetensors")
    changed = {name for name, tensor in theirs.items() if not torch.equal(tensor, before[name])}
    adapted = {plain_name(name).removeprefix("t5.") for name, _ in model.named_parameters() if "base_layer" in name}
    assert changed == {name.replace("layer.1.o", "layer.1.EncDecAttention.o") for name in adapted}
    for name in adapted:
        stock_name = name.replace("layer.1.o", "layer.1.EncDecAttention.o")
        torch.testing.assert_close(ours[f"t5.{name}"], theirs[stock_name], atol=1e-6, rtol=1e-6)
    config = json.loads((tmp_path / "model" / "adapters" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 12, tiny.base(kind))
    assert config["target_modules"] == sorted(config["target_modules"])


def test_an_export_without_adapters_replaces_one_with_them(tmp_path: Path) -> None:
    build(lora=EVERY).save_pretrained(tmp_path / "model")
    build().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "adapters").exists()


def test_an_adapted_run_starts_from_a_trained_vae(tmp_path: Path) -> None:
    """The names of an export's weights are those without adapters."""
    build().save_pretrained(tmp_path / "vae")
    settings = build(lora=EVERY).settings
    check_start(settings.model_copy(update={"weights": str(tmp_path / "vae")}))
    other = settings.model_copy(update={"weights": str(tmp_path / "vae"), "base": tiny.base(num_layers=1)})
    with pytest.raises(ConfigError, match=r"differs from the recipe's model"):
        check_start(other)


@pytest.mark.parametrize(
    ("kind", "injection", "lora", "message"),
    [
        ("t5", "none", {"where": "encoder"}, r"injection `none` has no encoder, so there is nothing to adapt$"),
        (
            "t5",
            "none",
            {"modules": ["q", "query"]},
            r"no layer `query` in the decoder; the layers are k, o, q, v, wi, wo$",
        ),
        (
            "v1_1",
            "cross_attention",
            {"modules": ["wi"]},
            r"no layer `wi` in the encoder and decoder; the layers are k, o, q, v, wi_0, wi_1, wo$",
        ),
        (
            "t5",
            "cross_attention",
            {"modules": ["memory"]},
            r"no layer `memory` in the encoder and decoder; the layers are",
        ),
    ],
)
def test_what_cannot_be_adapted(kind: str, injection: str, lora: dict, message: str) -> None:
    settings = ModelConfig(base=tiny.base(kind), latent_dim=UNITS, injection=injection, lora=lora)
    for make in (skeleton, T5VAE.from_base):
        with pytest.raises(ConfigError, match=r"^model\.lora\.(where|modules): " + message):
            make(settings)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = build().settings.model_copy(update={"lora": build(lora={}).settings.lora})
    monkeypatch.setitem(sys.modules, "peft", None)
    build()
    with pytest.raises(ConfigError, match=r"^model\.lora: needs the package peft .* `pip install \"vae_ds\[lora\]\"`$"):
        skeleton(settings)
