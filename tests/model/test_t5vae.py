"""T5VAE against the stock T5, for each kind of base and each injection; exports, tokenizers and wrong bases."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, GPT2Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from support import tiny
from support.models import TEXTS, UNITS, batch, build, gathered_in_forward_only, latents, stock
from vae_ds.config.settings import ModelConfig
from vae_ds.errors import CheckpointError, ConfigError
from vae_ds.model.bases import load_t5
from vae_ds.model.bottleneck import Bottleneck
from vae_ds.model.injection import LatentCrossAttention, SafeInHalf, inject
from vae_ds.model.t5vae import T5VAE, Terms, check_base, load_tokenizer

pytestmark = pytest.mark.timeout(240)
INJECTIONS = ("cross_attention", "self_attention", "embedding", "self_attention+embedding", "none")


# The method: one key, the reconstruction term, the posterior


def one_key(model: T5VAE, kind: str) -> T5ForConditionalGeneration:
    """The stock T5 whose cross-attention has z as its one key and value: K_n = V_n = z W_n."""
    t5 = stock(kind)
    for block, ours in zip(t5.decoder.block, model.t5.decoder.block, strict=True):
        attention = block.layer[1].EncDecAttention
        attention.k, attention.v = copy.deepcopy(ours.layer[1].memory), copy.deepcopy(ours.layer[1].memory)
    return t5


@pytest.mark.parametrize("kind", ["t5", "v1_1", "mt5"])
def test_stock_cross_attention_with_one_key_is_ours_gradients_too(kind):
    model = build(kind)
    reference = one_key(model, kind)
    labels_BT, z_BL, z_stock_BL = batch(kind)["labels_BT"], latents().requires_grad_(), latents().requires_grad_()
    rec_B = model.reconstruction(z_BL, labels_BT)
    loss = reference(encoder_outputs=BaseModelOutput(last_hidden_state=z_stock_BL[:, None]), labels=labels_BT).loss
    tokens = (labels_BT != -100).sum()
    torch.testing.assert_close(rec_B.sum() / tokens, loss, atol=5e-7, rtol=5e-7)
    (rec_B.sum() / tokens).backward()
    loss.backward()
    torch.testing.assert_close(z_BL.grad, z_stock_BL.grad, atol=5e-7, rtol=1e-5)
    for ours, theirs in zip(model.t5.decoder.block, reference.decoder.block, strict=True):
        attention = theirs.layer[1].EncDecAttention
        assert attention.k.weight.grad.abs().max() < 1e-7
        assert attention.q.weight.grad.abs().max() < 1e-7
        pairs = [(ours.layer[1].memory, attention.v), (ours.layer[1].o, attention.o)]
        pairs += [(ours.layer[0].SelfAttention.q, theirs.layer[0].SelfAttention.q)]
        for mine, stock_layer in pairs:
            assert mine.weight.grad.abs().max() > 1e-5
            torch.testing.assert_close(mine.weight.grad, stock_layer.weight.grad, atol=5e-7, rtol=1e-5)


def test_one_layer_equals_stock_attention_to_5e_7():
    model = build()
    layer, attention = model.t5.decoder.block[1].layer[1], one_key(model, "t5").decoder.block[1].layer[1]
    hidden_BTH = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))
    ours, theirs = layer(hidden_BTH, latents()[:, None]), attention(hidden_BTH, latents()[:, None])
    assert len(ours) == len(theirs)
    assert (ours[0] - theirs[0]).abs().max() <= 5e-7
    assert (ours[0] - hidden_BTH).abs().max() > 0.1


def test_output_dropout_draws_for_each_position():
    layer = LatentCrossAttention(nn.Linear(2, 8, bias=False), nn.Linear(8, 64, bias=False), dropout=0.5).train()
    added_BTH = layer(torch.zeros(1, 2, 64), torch.ones(1, 1, 2))[0]
    zeros_TH = added_BTH[0] == 0
    assert 0.3 < zeros_TH.float().mean() < 0.7
    assert not torch.equal(zeros_TH[0], zeros_TH[1])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_rec_is_the_sum_over_a_sentence_s_tokens(kind):
    model, data, z_BL = build(kind), batch(kind), latents()
    rec_B = model.reconstruction(z_BL, data["labels_BT"])
    assert rec_B.dtype == torch.float32
    for b, labels_T in enumerate(data["labels_BT"]):
        kept_T = labels_T[labels_T != -100]
        assert kept_T[-1] == 1  # the end-of-sentence counts
        inputs_1T = torch.cat([torch.zeros(1, dtype=torch.long), kept_T[:-1]])[None]
        hidden_TH = model.t5.decoder(
            input_ids=inputs_1T, encoder_hidden_states=z_BL[b, None, None], use_cache=False
        ).last_hidden_state[0]
        if kind == "t5":  # the only kind here whose output is scaled: v1.1 and mT5 have a head of their own
            hidden_TH = hidden_TH * 32**-0.5
        logits_TV = hidden_TH @ model.t5.lm_head.weight.T
        by_hand = sum(-logits_TV[t].log_softmax(-1)[token] for t, token in enumerate(kept_T))
        torch.testing.assert_close(rec_B[b], by_hand, rtol=2e-6, atol=1e-5)


def test_forward_is_encode_sample_decode():
    model, data = build(), batch()
    terms = model(**data)
    assert isinstance(terms, Terms)
    mu_BL, logvar_BL = model.encode(data["input_ids_BT"], data["attention_mask_BT"])
    z_BL = mu_BL + (0.5 * logvar_BL).exp() * data["eps_BL"]
    torch.testing.assert_close(terms.mu_BL, mu_BL)
    torch.testing.assert_close(terms.rec_B, model.reconstruction(z_BL, data["labels_BT"]))
    torch.testing.assert_close(terms.kl_BL, 0.5 * (mu_BL**2 + logvar_BL.exp() - 1 - logvar_BL), atol=1e-6, rtol=1e-5)
    at_mean = model(**data | {"eps_BL": torch.zeros(len(TEXTS), UNITS)})
    torch.testing.assert_close(at_mean.rec_B, model.reconstruction(mu_BL, data["labels_BT"]))


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("pool_layers", ["last", "all"])
def test_pooling_reads_the_real_tokens_of_the_right_layers(pooling, pool_layers):
    model, data = build(pooling=pooling, pool_layers=pool_layers), batch()
    mu_BL, logvar_BL = model.encode(data["input_ids_BT"], data["attention_mask_BT"])
    encoder = stock("t5").encoder
    for b, (ids_T, mask_T) in enumerate(zip(data["input_ids_BT"], data["attention_mask_BT"], strict=True)):
        states = encoder(input_ids=ids_T[mask_T == 1][None], output_hidden_states=True).hidden_states
        assert len(states) == 3  # embeddings and two blocks
        pooled = [layer[0].amax(0) if pooling == "max" else layer[0].mean(0) for layer in states]
        pooled_H = pooled[2] if pool_layers == "last" else (pooled[1] + pooled[2]) / 2
        torch.testing.assert_close(mu_BL[b], model.bottleneck.mu.weight @ pooled_H, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(logvar_BL[b], model.bottleneck.logvar.weight @ pooled_H, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"pooling": "mean", "pool_layers": "all"}, *({"injection": name} for name in INJECTIONS)]
)
def test_padding_changes_nothing(settings):
    model, narrow, wide = build(**settings), batch(), batch(extra=5)
    wide["input_ids_BT"][:, -5:] = 7  # whatever stands under the mask is not read
    for found, expected in zip(model(**wide), model(**narrow), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-6)


def test_padding_is_never_the_maximum():
    bottleneck = Bottleneck(3, ModelConfig(latent_dim=2), torch.Generator().manual_seed(0))
    states_BTH = torch.tensor([[[-1.0, -2.0, -3.0], [9.0, math.nan, math.inf]]])
    mu_BL, _ = bottleneck([states_BTH], torch.tensor([[1, 0]]))
    torch.testing.assert_close(mu_BL[0], bottleneck.mu.weight @ states_BTH[0, 0])


# Initial values, dropout, precision, memory


def test_initial_values_have_the_stated_scales():
    model = build(latent_dim=64, overrides={"d_model": 256, "d_kv": 32}).requires_grad_(False)
    expected = {"bottleneck.mu": 256**-0.5, "bottleneck.logvar": 0.02, "t5.decoder.block.2.layer.1.memory": 64**-0.5}
    for name, std in expected.items():
        weight = model.get_submodule(name).weight
        assert float(weight.std()) == pytest.approx(std, rel=0.05)
        assert abs(float(weight.mean())) < 0.1 * std
    assert model.t5.decoder.block[0].layer[1].memory.weight.shape == (4 * 32, 64)
    stated = build(mu_std=0.5, logvar_std=0.1, memory_std=3.0, latent_dim=64).requires_grad_(False)
    assert float(stated.bottleneck.mu.weight.std()) == pytest.approx(0.5, rel=0.1)
    assert float(stated.bottleneck.logvar.weight.std()) == pytest.approx(0.1, rel=0.1)
    assert float(stated.t5.decoder.block[0].layer[1].memory.weight.std()) == pytest.approx(3.0, rel=0.1)


def test_initial_values_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first = build(seed=4)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = build(seed=4), build(seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.bottleneck.mu.weight, other.bottleneck.mu.weight)
    layers = [block.layer[1].memory.weight for block in first.t5.decoder.block]
    assert not torch.equal(layers[0], layers[1])


def test_the_recipe_s_dropout_replaces_all_of_the_base_s():
    def rates(model: T5VAE) -> set[float]:
        inner = {module.dropout for module in model.modules() if isinstance(getattr(module, "dropout", None), float)}
        return inner | {module.p for module in model.modules() if isinstance(module, nn.Dropout)}

    assert rates(build(dropout=0.37)) == {0.37}
    assert rates(build(dropout=None)) == {0.1}


@pytest.mark.parametrize("kind", ["t5", "v1_1", "mt5"])
def test_logits_in_parts_give_the_same_loss_and_gradients(kind, monkeypatch):
    """The parts do not fit into the sentences, and the last one is smaller."""
    inputs = batch(kind)
    models = [build(kind, gradient_checkpointing=checkpointing) for checkpointing in (False, True)]
    whole = [model(**inputs) for model in models]
    with torch.no_grad():
        expected_B = models[0](**inputs).rec_B
    vocabulary, heads = models[0].t5.config.vocab_size, []
    monkeypatch.setattr("vae_ds.model.token_losses.LOGITS_AT_ONCE", 7 * vocabulary + 1)
    for model in models:
        model.t5.lm_head.register_forward_hook(lambda _, args, logits: heads.append(len(logits.flatten(0, -2))))
    cut = [model(**inputs) for model in models]
    positions = inputs["labels_BT"].numel()
    assert heads == [positions, *[7] * (positions // 7), positions % 7]
    with torch.no_grad():
        found_B = models[0](**inputs).rec_B
    torch.testing.assert_close(found_B, expected_B, rtol=1e-6, atol=0)
    for before, after, model in zip(whole, cut, models, strict=True):
        torch.testing.assert_close(after.rec_B, before.rec_B, rtol=1e-6, atol=0)
        expected, found = (
            torch.autograd.grad(terms.rec_B.sum(), list(model.t5.decoder.parameters()), allow_unused=True)
            for terms in (before, after)
        )
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pool_layers", ["last", "all"])
def test_gradient_checkpointing_gives_the_same_gradients(pool_layers):
    gradients, passes = [], []
    for checkpointing in (False, True):
        runs: list[int] = []
        model = build(pool_layers=pool_layers, gradient_checkpointing=checkpointing).train()
        model.t5.decoder.requires_grad_(False)  # as in the paper's first phase
        model.t5.shared.requires_grad_(False)
        model.t5.encoder.block[1].layer[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        terms = model(**batch())
        loss = (terms.rec_B + terms.kl_BL.sum(1)).mean()
        free = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        # Reentrant checkpointing, wrong with frozen parts, refuses this call.
        found = torch.autograd.grad(loss, list(free.values()))
        gradients.append(dict(zip(free, found, strict=True)))
        passes.append(len(runs))
    assert passes == [1, 2]
    assert gradients[0]["t5.encoder.block.0.layer.0.SelfAttention.q.weight"].abs().max() > 0
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_bottleneck_computes_in_float32_under_autocast_and_in_a_bf16_module():
    bottleneck = Bottleneck(32, ModelConfig(latent_dim=4), torch.Generator().manual_seed(0))
    states_BTH = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    mask_BT = torch.ones(3, 6, dtype=torch.long)
    expected = bottleneck([states_BTH], mask_BT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bottleneck([states_BTH], mask_BT)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    rounded = copy.deepcopy(bottleneck).bfloat16()
    restored = copy.deepcopy(rounded).float()
    for mine, exact in zip(rounded([states_BTH], mask_BT), restored([states_BTH], mask_BT), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, exact)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_terms_are_float32_near_the_exact_ones_in_a_bf16_module_and_under_autocast(injection):
    model, data = build(injection=injection), batch()
    exact = model(**data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(**data)
    half = model.bfloat16()(**data)
    for terms in (autocast, half):
        assert {term.dtype for term in terms} == {torch.float32}
        torch.testing.assert_close(terms.rec_B, exact.rec_B, rtol=0.02, atol=0.5)


@pytest.mark.parametrize("injection", ["cross_attention", "self_attention", "self_attention+embedding"])
def test_z_does_not_promote_the_residual_stream(injection):
    model = build(injection=injection).bfloat16()
    seen = []
    model.t5.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    for block in model.t5.decoder.block:
        block.register_forward_hook(lambda _, inputs, output: seen.append(output[0].dtype))
    model(**batch())
    assert set(seen) == {torch.bfloat16}
    assert model.generate(latents(), 3).shape[0] == len(TEXTS)


@pytest.mark.parametrize(
    ("kind", "injection"), [("t5", "cross_attention"), ("v1_1", "cross_attention"), ("t5", "self_attention+embedding")]
)
def test_float16_does_not_overflow_where_pretrained_models_do(kind, injection):
    """Feed-forward outputs past 65504, float16's largest number, as in pretrained T5s; an engine casts all weights."""
    model, data = build(kind, injection=injection), batch(kind)
    with torch.no_grad():
        for block in (*model.t5.encoder.block, *model.t5.decoder.block):
            wo = block.layer[-1].DenseReluDense.wo.weight
            wo.mul_(1e4 / wo.abs().max())
            block.layer[-1].layer_norm.weight.mul_(50.0)
    exact = model(**data)
    half = copy.deepcopy(model).half()
    safe = half(**data)
    torch.testing.assert_close(safe.rec_B, exact.rec_B, rtol=0.02, atol=0.5)
    for module in half.modules():
        if isinstance(module, SafeInHalf):
            module.__class__ = nn.Linear
    clamped = half(**data)
    assert not torch.allclose(clamped.rec_B, exact.rec_B, rtol=0.02, atol=0.5), "nothing overflows, nothing is tested"


@pytest.mark.parametrize("kind", ["t5", "v1_1"])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_every_parameter_is_used_through_its_owner_s_forward(kind, injection):
    """ZeRO stage 3 gathers a weight only while its owner's forward runs: outside of it, here, it is not a number."""
    model, data = build(kind, injection=injection, pool_layers="all"), batch(kind)
    assert gathered_in_forward_only(model, lambda: model(**data))


# Each kind of base


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("injection", INJECTIONS)
def test_each_base_trains_generates_and_round_trips(kind, injection, tmp_path):
    model, data = build(kind, injection=injection).train(), batch(kind)
    tied = model.t5.lm_head.weight is model.t5.shared.weight
    assert tied == (kind == "t5")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        terms = model(**data)
        loss = (terms.rec_B + terms.kl_BL.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not idle, "no parameter may be dead weight in the optimizer"
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]

    model.eval()
    z_BL = None if injection == "none" else latents()
    plain = model.generate(z_BL, 7, batch_size=len(TEXTS))
    assert plain.shape == (len(TEXTS), 8) or plain.eq(1).any()
    for options in ({"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}):
        assert torch.equal(model.generate(z_BL, 7, batch_size=len(TEXTS), **options), plain), options
    beams = model.generate(z_BL, 7, batch_size=len(TEXTS), num_beams=3)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        found = model.generate(z_BL, 7, batch_size=len(TEXTS), num_beams=3, **options)
        assert torch.equal(found, beams), options
    torch.manual_seed(0)
    sampled = model.generate(z_BL, 7, batch_size=len(TEXTS), do_sample=True)
    assert sampled.shape[0] == len(TEXTS)
    assert not torch.equal(sampled, plain)

    tokenizer = load_tokenizer(tiny.base(kind))
    model.save_pretrained(tmp_path / "export", tokenizer)
    back = T5VAE.from_pretrained(tmp_path / "export")
    assert back.settings == model.settings
    assert (back.t5.lm_head.weight is back.t5.shared.weight) == tied
    pairs = zip(back.named_parameters(), model.named_parameters(), strict=True)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(back(**data), model(**data), strict=True))
    assert torch.equal(back.generate(z_BL, 7, batch_size=len(TEXTS)), plain)
    assert load_tokenizer(tmp_path / "export")(list(TEXTS))["input_ids"] == tokenizer(list(TEXTS))["input_ids"]
    assert (tmp_path / "export" / "spiece.model").exists() == (kind != "byt5")


@pytest.mark.parametrize("depths", [(1, 4), (4, 1)])
@pytest.mark.parametrize("injection", ["cross_attention", "self_attention+embedding"])
def test_greedy_follows_the_largest_logit_whatever_the_depths(depths, injection):
    model = build(injection=injection, overrides={"num_layers": depths[0], "num_decoder_layers": depths[1]})
    z_BL = latents()
    ids_BT = torch.zeros(len(TEXTS), 1, dtype=torch.long)
    for _ in range(5):
        logits_BTV = model.t5(
            encoder_outputs=BaseModelOutput(last_hidden_state=z_BL[:, None]), decoder_input_ids=ids_BT
        ).logits
        ids_BT = torch.cat([ids_BT, logits_BTV[:, -1].argmax(-1, keepdim=True)], 1)
    found = model.generate(z_BL, 5, eos_token_id=None)
    assert torch.equal(found, ids_BT)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_injection_none_is_the_stock_decoder_without_cross_attention(kind):
    model, data, t5 = build(kind, injection="none"), batch(kind), stock(kind)
    for block in t5.decoder.block:
        nn.init.zeros_(block.layer[1].EncDecAttention.o.weight)
    terms = model(**data)
    loss = t5(input_ids=data["input_ids_BT"], labels=data["labels_BT"]).loss
    tokens = (data["labels_BT"] != -100).sum()
    torch.testing.assert_close(terms.rec_B.sum() / tokens, loss, atol=1e-6, rtol=1e-6)
    assert [tuple(term.shape) for term in terms[1:]] == [(len(TEXTS), 0)] * 3
    assert model.bottleneck is None
    assert model.latent_dim == 0
    names = [name for name, _ in model.named_parameters()]
    assert names
    assert not [name for name in names if "encoder" in name or "memory" in name or "bottleneck" in name]
    assert not [name for name in names if ".layer.1." in name and "DenseReluDense" not in name]


def test_z_where_it_does_not_belong_is_an_error():
    plain, model, labels_BT = build(injection="none"), build(), batch()["labels_BT"]
    with pytest.raises(ValueError, match="takes no z"):
        plain.reconstruction(latents(), labels_BT)
    with pytest.raises(ValueError, match="batch_size"):
        plain.generate(None, 3)
    with pytest.raises(ValueError, match="no encoder"):
        plain.encode(labels_BT, labels_BT)
    with pytest.raises(ValueError, match="from z"):
        model.reconstruction(None, labels_BT)


def test_loaded_untied_base_keeps_its_own_head_and_its_unscaled_output():
    for kind in ("v1_1", "flan", "mt5", "byt5"):
        t5 = load_t5(ModelConfig(base=tiny.base(kind)))
        assert t5.lm_head.weight is not t5.shared.weight
        assert t5.lm_head.weight.data_ptr() != t5.shared.weight.data_ptr()
        assert not torch.equal(t5.lm_head.weight, t5.shared.weight)
        assert not getattr(t5.config, "scale_decoder_outputs", False)
    assert load_t5(ModelConfig(base=tiny.base("t5"))).config.scale_decoder_outputs


def test_untied_base_whose_head_equals_its_embeddings_stays_untied(tmp_path):
    tiny.make_base(tmp_path / "base", "v1_1")
    t5 = load_t5(ModelConfig(base=str(tmp_path / "base")))
    t5.lm_head.weight.data.copy_(t5.shared.weight.data)
    t5.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    again = load_t5(ModelConfig(base=str(tmp_path / "base")))
    assert again.lm_head.weight is not again.shared.weight
    assert not again.config.scale_decoder_outputs


def test_a_v1_1_base_that_transformers_saved_again_is_still_unscaled(tmp_path):
    stock("v1_1").save_pretrained(tmp_path)
    model = T5VAE.from_base(ModelConfig(base=str(tmp_path), latent_dim=UNITS, dropout=0.0))
    labels_BT = batch("v1_1")["labels_BT"]
    torch.testing.assert_close(
        model.reconstruction(latents(), labels_BT), build("v1_1").reconstruction(latents(), labels_BT)
    )


def test_inject_leaves_the_encoder_and_the_rest_of_the_decoder_alone():
    t5, reference = stock("t5"), stock("t5")
    inject(t5, ModelConfig(latent_dim=UNITS), torch.Generator().manual_seed(0))
    kept = dict(t5.named_parameters())
    for name, parameter in reference.named_parameters():
        if ".layer.1." in name and name.startswith("decoder"):
            continue
        assert torch.equal(kept[name], parameter)
    outputs = reference.decoder.block[1].layer[1].EncDecAttention.o.weight
    assert torch.equal(kept["decoder.block.1.layer.1.o.weight"], outputs)


# Exports


@pytest.fixture
def export(tmp_path) -> Path:
    build().save_pretrained(tmp_path / "export", load_tokenizer(tiny.base()))
    return tmp_path / "export"


def test_an_export_says_what_it_is_and_stores_tied_weights_once(export):
    description = json.loads((export / "config.json").read_text())
    assert (description["format"], description["schema_version"]) == ("vae_ds", 1)
    assert description["aliases"]["t5.lm_head.weight"] == "t5.shared.weight"
    from safetensors.torch import load_file

    stored = load_file(export / "model.safetensors")
    assert stored.keys() == dict(build().named_parameters()).keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert not list(export.parent.glob(".*")), "nothing is left beside it"


def test_given_weights_replace_the_module_s_own(tmp_path):
    model = build()
    weights = {name: torch.full_like(parameter, 0.25) for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "export", weights=weights)
    back = T5VAE.from_pretrained(tmp_path / "export")
    assert all(parameter.eq(0.25).all() for parameter in back.parameters())
    weights.pop("bottleneck.mu.weight")
    with pytest.raises(ValueError, match=r"bottleneck\.mu\.weight"):
        model.save_pretrained(tmp_path / "export", weights=weights)


def test_a_newer_export_replaces_an_older_one_but_nothing_else(export, tmp_path):
    newer = build(seed=1)
    newer.save_pretrained(export)
    assert torch.equal(T5VAE.from_pretrained(export).bottleneck.mu.weight, newer.bottleneck.mu.weight)
    other = tmp_path / "thesis"
    other.mkdir()
    newer.save_pretrained(other)  # an empty directory is fine
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a vae_ds export"):
        newer.save_pretrained(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_a_save_that_fails_leaves_the_older_export_whole(export):
    class Broken:
        name_or_path = ""

        def save_pretrained(self, folder):
            raise OSError("disk full")

    expected = build().bottleneck.mu.weight
    with pytest.raises(OSError, match="disk full"):
        build(seed=1).save_pretrained(export, Broken())  # type: ignore[arg-type]
    assert torch.equal(T5VAE.from_pretrained(export).bottleneck.mu.weight, expected)
    assert not list(export.parent.glob(".*"))


def test_the_recipe_s_dropout_and_pooling_survive_an_export(tmp_path):
    build(dropout=0.37, pooling="mean", pool_layers="all").save_pretrained(tmp_path / "export")
    back = T5VAE.from_pretrained(tmp_path / "export")
    assert back.t5.decoder.block[0].layer[1].dropout.p == 0.37
    assert back.t5.encoder.block[0].layer[0].SelfAttention.dropout == 0.37
    assert (back.settings.pooling, back.settings.pool_layers) == ("mean", "all")
    assert not back.training


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit(**changes):
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no exported model"),
        (truncate, "missing or broken"),
        (lambda folder: (folder / "model.safetensors").unlink(), "missing or broken"),
        (lambda folder: (folder / "config.json").write_text("{"), "not written by vae_ds"),
        (edit(format="other"), "not written by vae_ds"),
        (edit(schema_version=2), "version 2"),
        (edit(model={"latent_dim": UNITS, "colour": "red"}), "not a complete"),
        (edit(t5={}), "not a complete"),
        (edit(model={"latent_dim": UNITS + 1}), r"mu\.weight has shape \[5, 32\]"),
        (edit(model={"latent_dim": UNITS, "injection": "none"}), "do not fit config"),
    ],
)
def test_a_broken_export_is_one_clear_error(export, damage, message):
    damage(export)
    with pytest.raises(CheckpointError, match=message):
        T5VAE.from_pretrained(export)


# Bases and tokenizers


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_check_base_accepts_each_kind(kind):
    assert check_base(tiny.base(kind)).model_type == ("mt5" if kind == "mt5" else "t5")


def as_empty(folder: Path) -> None:
    folder.mkdir()


def as_config(config):
    def write(folder: Path) -> None:
        config.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"")

    return write


def as_text(text: str):
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(text)
        (folder / "model.safetensors").write_bytes(b"")

    return write


def as_no_weights(folder: Path) -> None:
    tiny.make_base(folder)
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (as_empty, r"no config\.json"),
        (as_config(BertConfig()), "'bert'"),
        (as_config(GPT2Config()), "'gpt2'"),
        (as_text("{"), "cannot be read"),
        (as_text("[]"), "cannot be read"),
        (as_text('{"model_type": "t5", "d_model": "wide"}'), "cannot be read"),
        (as_text("{}"), "model_type is None"),
        (as_no_weights, "no weights"),
        (lambda folder: build().save_pretrained(folder), "an export of vae_ds"),
        (lambda folder: folder.write_text("x"), "is a file"),
        (lambda folder: None, "no such directory"),
    ],
)
def test_a_wrong_base_is_one_early_error(write, message, tmp_path):
    write(tmp_path / "base")
    with pytest.raises(ConfigError, match=message) as caught:
        check_base(str(tmp_path / "base"))
    assert "\n" not in str(caught.value)


def test_a_hub_name_out_of_reach_says_what_to_do():
    with pytest.raises(ConfigError, match=r"set model\.base to the directory") as caught:
        check_base("nobody/no-such-t5")
    assert "nobody/no-such-t5" in str(caught.value)
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer("nobody/no-such-t5")


def test_a_base_that_lacks_weights_or_has_broken_ones_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.make_base(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    weights.pop("encoder.block.0.layer.0.SelfAttention.q.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack encoder\.block\.0"):
        load_t5(ModelConfig(base=str(tmp_path / "base")))
    truncate(tmp_path / "base")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_t5(ModelConfig(base=str(tmp_path / "base")))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tokenizers_end_each_text_with_the_end_of_sentence(kind):
    tokenizer = load_tokenizer(tiny.base(kind))
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" .", ".") == TEXTS[0].replace(" .", ".")
    assert max(ids) < check_base(tiny.base(kind)).vocab_size


def test_an_export_without_a_tokenizer_has_its_base_s(tmp_path):
    build().save_pretrained(tmp_path / "export")
    found = load_tokenizer(tmp_path / "export")
    assert found(TEXTS[0])["input_ids"] == load_tokenizer(tiny.base())(TEXTS[0])["input_ids"]


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path):
    stock("t5").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(tmp_path)
