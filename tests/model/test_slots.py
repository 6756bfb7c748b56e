"""Several slots of z, and a network of z beside z: what the decoder reads, caches, gradients, groups, exports."""

import re

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from support.models import TEXTS, UNITS, batch, build, gathered_in_forward_only, groups_by_module, latents, stock
from vae_ds.config import ModelConfig
from vae_ds.model import T5VAE
from vae_ds.model.injection import SlotCrossAttention
from vae_ds.training import phases

BOTH = {"slots": 3, "memory_mlp": 7}
CASES = [{"slots": 3}, {"memory_mlp": 7}, BOTH, BOTH | {"injection": "self_attention+embedding"}]


@pytest.mark.parametrize("kind", ["t5", "v1_1", "mt5"])
def test_the_slots_stand_where_the_stock_t5_has_the_states_of_its_encoder(kind: str) -> None:
    model, plain = build(kind, slots=3), stock(kind)
    width = plain.config.d_model
    with torch.no_grad():
        shared = 0.5 * torch.randn(3 * width, UNITS, generator=torch.Generator().manual_seed(4))
        for block in model.t5.decoder.block:
            assert isinstance(block.layer[1], SlotCrossAttention)
            block.layer[1].memory.weight.copy_(shared)
        z_BL, labels_BT = latents(), batch(kind)["labels_BT"]
        slots_BKH = (z_BL @ shared.T).view(len(TEXTS), 3, width)
        logits_BTV = plain(encoder_outputs=BaseModelOutput(slots_BKH), labels=labels_BT).logits
        wanted_B = nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=-100, reduction="none"
        )
        found_B = model.reconstruction(z_BL, labels_BT)
    assert torch.allclose(found_B, wanted_B.view_as(labels_BT).sum(1), atol=1e-3)
    assert not torch.allclose(found_B, model.reconstruction(z_BL.roll(1, 0), labels_BT), atol=0.1)


def test_the_memory_reads_z_and_the_output_of_its_network_beside_it() -> None:
    model, z_BL = build(memory_mlp=7), latents()
    with torch.no_grad():
        memory_BX = model._memory(z_BL, None, z_BL.device)[:, 0]
        assert torch.equal(memory_BX[:, :UNITS], z_BL)
        hidden_BD = nn.functional.gelu(z_BL @ model.memory_mlp.first.weight.T)
        assert torch.allclose(memory_BX[:, UNITS:], hidden_BD @ model.memory_mlp.second.weight.T, atol=1e-6)
        assert memory_BX[:, UNITS:].abs().mean() > 0.1
    assert model.t5.decoder.block[0].layer[1].memory.in_features == UNITS + 7


@pytest.mark.parametrize("settings", CASES)
def test_a_decoder_with_a_wider_memory_is_a_whole_model(settings: dict, tmp_path) -> None:
    model, data = build(dropout=0.1, **settings), batch()
    names = [name for name, _ in model.named_parameters()]
    assert {name: phases.group_of(name) for name in names} == groups_by_module(model)
    assert {name for name in names if phases.is_new(name)} == {
        name for name in names if "bottleneck" in name or "memory" in name
    }
    # Gradients reach every new weight, and z.
    terms = model(**data)
    terms.rec_B.sum().backward()
    assert all(weight.grad.any() for name, weight in model.named_parameters() if phases.is_new(name))
    padded = model(**batch(extra=3))
    assert torch.allclose(padded.rec_B, terms.rec_B, atol=1e-4)
    # A cache, beams and another process change nothing.
    z_BL = latents()
    with torch.no_grad():
        for how in ({"num_beams": 2}, {"cache_implementation": "static"}, {}):
            plain = {"use_cache": False} | ({"num_beams": 2} if "num_beams" in how else {})
            assert torch.equal(model.generate(z_BL, 9, **how), model.generate(z_BL, 9, **plain)), how
    model.save_pretrained(tmp_path / "export")
    again = T5VAE.from_pretrained(tmp_path / "export")
    assert all(torch.equal(weight, dict(again.named_parameters())[name]) for name, weight in model.named_parameters())
    assert torch.equal(again.generate(z_BL, 9), model.generate(z_BL, 9))


@pytest.mark.parametrize("settings", [*CASES, BOTH | {"prior": "flow"}, {"prior": "mixture"}, {"prior": "gaussian"}])
def test_every_new_parameter_is_used_through_its_owner_s_forward(settings: dict) -> None:
    """ZeRO stage 3 gathers a weight only while its owner's forward runs: outside of it, here, it is not a number."""
    model, data, z_BL = build(**settings), batch(), latents()
    choice_B = torch.linspace(0, 0.9, len(TEXTS))
    assert gathered_in_forward_only(model, lambda: (*model(**data), model.draw_codes(z_BL, choice_B)))


def test_a_model_without_them_is_as_before() -> None:
    """Old recipes and exports do not name these settings."""
    names = {name for name, _ in build().named_parameters()}
    assert not [name for name in names if "memory_mlp" in name or "EncDecAttention" in name or "prior" in name]
    stated = build(slots=1, memory_mlp=0)
    assert all(torch.equal(a, b) for a, b in zip(build().parameters(), stated.parameters(), strict=True))


def test_slots_of_another_injection_are_an_error() -> None:
    message = "`slots` is 2, but injection `embedding` adds one vector; use `cross_attention` or `self_attention`"
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(slots=2, injection="embedding")
    assert ModelConfig(slots=2, injection="none").slots == 2, "a yardstick of the same recipe"
