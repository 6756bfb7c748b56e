"""The self-attention and embedding schemes against stock T5 modules, in caches and beams, in training and groups."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from support.models import TEXTS, UNITS, batch, build, groups_by_module, latents, stock
from vae_ds.model.t5vae import T5VAE
from vae_ds.training import phases

pytestmark = pytest.mark.timeout(240)
SCHEMES = ("self_attention", "embedding", "self_attention+embedding")
TOKENS = 9


def ids(rows: int = len(TEXTS)) -> Tensor:
    return torch.randint(3, 60, (rows, TOKENS), generator=torch.Generator().manual_seed(3))


def logits(model: T5VAE, z_BL: Tensor, ids_BT: Tensor, **options) -> Tensor:
    output = BaseModelOutput(last_hidden_state=z_BL[:, None])
    return model.t5(encoder_outputs=output, decoder_input_ids=ids_BT, **options).logits


# The formula


class Prepended(nn.Module):
    """A stock key or value projection; its first rows, of dummy states, give way to the slots of z W_n."""

    def __init__(self, stock_layer: nn.Module, memory: nn.Linear, z_BL: Tensor, slots: int) -> None:
        super().__init__()
        self.stock, self.memory, self.z_BL, self.slots = stock_layer, copy.deepcopy(memory), z_BL, slots

    def forward(self, states_BTH: Tensor) -> Tensor:
        slots_BKX = self.memory(self.z_BL).view(len(states_BTH), self.slots, -1)
        return torch.cat([slots_BKX, self.stock(states_BTH[:, self.slots :])], 1)


def reference(model: T5VAE, kind: str, z_BL: Tensor, ids_BT: Tensor):
    """The stock modules called by hand, z in front of the keys and values; returns the logits and the stock T5."""
    t5, tokens = stock(kind), ids_BT.shape[1]
    hidden_BTH = t5.shared(ids_BT)
    ways = model.settings.injection.split("+")
    if "embedding" in ways:
        t5.embedding_memory = copy.deepcopy(model.t5.decoder.memory)
        hidden_BTH = hidden_BTH + t5.embedding_memory(z_BL)[:, None]
    extra = model.settings.slots if "self_attention" in ways else 0
    # The first columns are z's: bias 0, seen by all. The others are the stock's own, each at its own distance.
    bias = nn.functional.pad(t5.decoder.block[0].layer[0].SelfAttention.compute_bias(tokens, tokens), (extra, 0))
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)
    mask = nn.functional.pad(mask, (extra, 0))[None, None]
    for block, ours in zip(t5.decoder.block, model.t5.decoder.block, strict=True):
        layer = block.layer[0]
        attention = layer.SelfAttention
        if extra:
            attention.k = Prepended(attention.k, ours.layer[0].memory, z_BL, extra)
            attention.v = Prepended(attention.v, ours.layer[0].memory, z_BL, extra)
        normed_BTH = layer.layer_norm(hidden_BTH)
        # Called as a cross-attention, the stock module takes keys of another number than the queries'.
        states_BKH = nn.functional.pad(normed_BTH, (0, 0, extra, 0))
        added_BTH = attention(normed_BTH, mask=mask, key_value_states=states_BKH, position_bias=bias)[0]
        hidden_BTH = block.layer[2](hidden_BTH + added_BTH)
    hidden_BTH = t5.decoder.final_layer_norm(hidden_BTH)
    if kind == "t5":
        hidden_BTH = hidden_BTH * hidden_BTH.shape[-1] ** -0.5
    return t5.lm_head(hidden_BTH), t5


@pytest.mark.parametrize("kind", ["t5", "v1_1", "mt5", "byt5"])
@pytest.mark.parametrize(("injection", "slots"), [*((name, 1) for name in SCHEMES), ("self_attention+embedding", 3)])
def test_it_is_stock_attention_with_more_keys_gradients_too(kind, injection, slots):
    model = build(kind, injection=injection, slots=slots)
    z_BL, z_stock_BL, ids_BT = latents().requires_grad_(), latents().requires_grad_(), ids()
    found_BTV = logits(model, z_BL, ids_BT)
    expected_BTV, t5 = reference(model, kind, z_stock_BL, ids_BT)
    torch.testing.assert_close(found_BTV, expected_BTV, atol=1e-5, rtol=1e-5)
    (found_BTV.log_softmax(-1) ** 2).mean().backward()
    (expected_BTV.log_softmax(-1) ** 2).mean().backward()
    assert z_BL.grad.abs().max() > 1e-3
    torch.testing.assert_close(z_BL.grad, z_stock_BL.grad, atol=1e-6, rtol=1e-4)
    theirs = {name: parameter.grad for name, parameter in t5.named_parameters()}
    compared = set()
    for name, parameter in model.t5.named_parameters():
        if name.startswith("encoder."):
            continue
        prefix = name.removesuffix(".memory.weight") + ".SelfAttention."
        if name == "decoder.memory.weight":
            expected = theirs["embedding_memory.weight"]
        elif ".memory." in name:
            # One projection is both key and value here: its gradient is the sum of theirs.
            expected = theirs[f"{prefix}k.memory.weight"] + theirs[f"{prefix}v.memory.weight"]
        elif "self_attention" in injection and name.endswith((".k.weight", ".v.weight")):
            expected = theirs[name.removesuffix("weight") + "stock.weight"]
        else:
            expected = theirs[name]
        compared.add(name)
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4, msg=name)
    assert len(compared) > 10


@pytest.mark.parametrize("injection", SCHEMES)
def test_the_rest_of_the_decoder_is_the_stock_s_and_no_cross_attention_is_left(injection):
    model, t5 = build(injection=injection), stock("t5")
    kept = {name: parameter for name, parameter in model.t5.named_parameters() if ".memory." not in f".{name}"}
    expected = {n: p for n, p in t5.named_parameters() if not (n.startswith("decoder.") and ".layer.1." in n)}
    assert kept.keys() == expected.keys()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in kept.items())


@pytest.mark.parametrize("injection", SCHEMES)
def test_z_reaches_each_position_of_its_own_sentence_alone(injection):
    model, z_BL, ids_BT = build(injection=injection), latents(), ids()
    whole_BTV = logits(model, z_BL, ids_BT)
    for b in range(len(TEXTS)):
        torch.testing.assert_close(
            logits(model, z_BL[b : b + 1], ids_BT[b : b + 1])[0], whole_BTV[b], atol=2e-6, rtol=0
        )
    moved = z_BL.clone()
    moved[1] += 1.0
    difference_BT = (logits(model, moved, ids_BT) - whole_BTV).abs().amax(-1)
    assert difference_BT[1].min() > 1e-3, "each position sees z"
    assert difference_BT[[0, 2, 3]].max() == 0
    changed_BT = ids_BT.clone()
    changed_BT[:, 5] += 1
    difference_BT = (logits(model, z_BL, changed_BT) - whole_BTV).abs().amax(-1)
    assert difference_BT[:, :5].max() == 0, "no token sees a later one"
    assert difference_BT[:, 5:].amin() > 0


# Caches and beams


def caches(model: T5VAE) -> dict[str, Cache | None]:
    return {
        "ours": model._cache(None, TOKENS),
        "static": model._cache("static", TOKENS + 3),
        "the stack's own": None,
        "no pair": DynamicCache(),
    }


@pytest.mark.parametrize("injection", SCHEMES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_decoding_equals_teacher_forcing_step_by_step(injection, attention):
    model, z_BL, ids_BT = build(injection=injection), latents(), ids()
    model.t5.set_attn_implementation(attention)
    with torch.no_grad():
        expected_BTV = logits(model, z_BL, ids_BT, use_cache=False)
        for first in (1, 4):  # one token, or several at once into the empty cache
            for name, cache in caches(model).items():
                start = 0
                for end in (first, *range(first + 1, TOKENS + 1)):
                    output = model.t5(
                        encoder_outputs=BaseModelOutput(last_hidden_state=z_BL[:, None]),
                        decoder_input_ids=ids_BT[:, start:end],
                        past_key_values=cache,
                        use_cache=True,
                    )
                    cache = output.past_key_values
                    torch.testing.assert_close(
                        output.logits, expected_BTV[:, start:end], atol=1e-5, rtol=1e-5, msg=f"{name}, {first}, {end}"
                    )
                    start = end
                if isinstance(cache, EncoderDecoderCache):
                    assert int(cache.self_attention_cache.get_seq_length()) == TOKENS, "z is no token of a cache"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padding_mask_of_the_decoder_is_kept(attention):
    """Padding on the left shifts all positions alike; only distances count."""
    model, z_BL, ids_BT = build(injection="self_attention+embedding"), latents(), ids()
    model.t5.set_attn_implementation(attention)
    padded_BT = nn.functional.pad(ids_BT, (2, 0), value=7)
    mask_BT = nn.functional.pad(torch.ones_like(ids_BT), (2, 0))
    found_BTV = logits(model, z_BL, padded_BT, decoder_attention_mask=mask_BT)
    torch.testing.assert_close(found_BTV[:, 2:], logits(model, z_BL, ids_BT), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("injection", SCHEMES)
def test_a_beam_s_score_is_its_log_likelihood_under_its_own_z(injection):
    model, z_BL = build(injection=injection), 2 * latents()
    found = model.generate(
        z_BL, 6, num_beams=4, num_return_sequences=3, eos_token_id=None, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    beams_NT, z_NL = found.sequences, z_BL.repeat_interleave(3, 0)
    log_NTV = logits(model, z_NL, beams_NT[:, :-1]).log_softmax(-1)
    score_N = log_NTV.gather(-1, beams_NT[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores, score_N, atol=1e-4, rtol=1e-5)
    assert len({tuple(beam.tolist()) for beam in beams_NT[::3]}) > 1, "different z, different text"
    greedy = model.generate(z_BL, 6, eos_token_id=None)
    score_B = logits(model, z_BL, greedy[:, :-1]).log_softmax(-1).gather(-1, greedy[:, 1:, None]).sum((1, 2))
    assert (score_N[::3] >= score_B - 1e-4).all()


# Training


@pytest.mark.parametrize("injection", SCHEMES)
def test_gradient_checkpointing_gives_the_same_gradients_dropout_too(injection):
    """Two passes before one backward: each recomputes with its own z."""
    gradients, losses = [], []
    for checkpointing in (False, True):
        model = build(injection=injection, dropout=0.2, gradient_checkpointing=checkpointing)
        runs: list[int] = []
        model.t5.decoder.block[1].layer[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        phases.freeze(model, ["t5.decoder.block.0.*", "embeddings"])
        phases.train_mode(model)
        torch.manual_seed(0)
        first, second = batch(), batch()
        second = second | {"eps_BL": second["eps_BL"].flip(0), "labels_BT": second["labels_BT"].roll(1, 0)}
        loss = model(**first).rec_B.mean() + model(**second).rec_B.mean()
        free = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        gradients.append(dict(zip(free, torch.autograd.grad(loss, list(free.values())), strict=True)))
        losses.append(loss.item())
        assert len(runs) == (4 if checkpointing else 2)
    assert losses[0] == losses[1]
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


@pytest.mark.parametrize("injection", SCHEMES)
def test_a_few_steps_lower_the_loss_and_the_decoder_comes_to_use_z(injection):
    model, data = build(injection=injection), batch()
    phases.train_mode(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    draw, losses = torch.Generator().manual_seed(0), []
    for _ in range(60):
        # Fresh noise: a fixed draw would itself tell the sentences apart.
        terms = model(**data | {"eps_BL": torch.randn(len(TEXTS), UNITS, generator=draw)})
        loss = (terms.rec_B + 0.1 * terms.kl_BL.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    model.eval()
    with torch.no_grad():
        mu_BL = model.encode(data["input_ids_BT"], data["attention_mask_BT"])[0]
        own_B = model.reconstruction(mu_BL, data["labels_BT"])
        other_B = model.reconstruction(mu_BL.roll(1, 0), data["labels_BT"])
    assert (other_B - own_B).mean() > 3.0, "another sentence's z must cost nats"


@pytest.mark.parametrize("injection", SCHEMES)
def test_parameters_are_in_their_groups_and_frozen_parts_run_without_dropout(injection):
    model = build(injection=injection, dropout=0.3)
    names = [name for name, _ in model.named_parameters()]
    assert {name: phases.group_of(name) for name in names} == groups_by_module(model)
    memory = {name for name in names if phases.group_of(name) == "memory"}
    expected = {f"t5.decoder.block.{n}.layer.0.memory.weight" for n in range(3)} if "self" in injection else set()
    assert memory == expected | ({"t5.decoder.memory.weight"} if "embedding" in injection else set())
    assert memory == {name for name, weight in model.named_parameters() if weight.shape[-1] == UNITS}
    phases.freeze(model, ["decoder", "embeddings"])
    phases.train_mode(model)
    z_BL, labels_BT = latents(), batch()["labels_BT"]
    first_B = model.reconstruction(z_BL, labels_BT)
    assert torch.equal(first_B, model.reconstruction(z_BL, labels_BT))
    first_B.sum().backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == memory
    phases.freeze(model, [])
    phases.train_mode(model)
    assert not torch.allclose(model.reconstruction(z_BL, labels_BT), model.reconstruction(z_BL, labels_BT))


def test_dropout_acts_on_attention_weights_as_in_the_stock_layer():
    """All that the sentence adds is nothing where all weights are dropped: z's too."""
    model = build(injection="self_attention", dropout=0.0).train()
    layer = model.t5.decoder.block[0].layer[0]
    hidden_BTH = torch.randn(len(TEXTS), 6, 32, generator=torch.Generator().manual_seed(1))
    layer.SelfAttention.dropout = 1.0
    assert torch.equal(layer(hidden_BTH, latent=latents()[:, None])[0], hidden_BTH)
    layer.eval()
    assert not torch.allclose(layer(hidden_BTH, latent=latents()[:, None])[0], hidden_BTH)


def test_initial_values_are_a_function_of_the_seed_and_of_the_stated_scale():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    settings = {"injection": "self_attention+embedding", "latent_dim": 64, "overrides": {"d_model": 256, "d_kv": 32}}
    first, again, other = (build(seed=seed, **copy.deepcopy(settings)) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    names = ("t5.decoder.memory", "t5.decoder.block.0.layer.0.memory", "t5.decoder.block.2.layer.0.memory")
    weights = [first.get_submodule(name).weight.detach() for name in names]
    assert [tuple(weight.shape) for weight in weights] == [(256, 64), (4 * 32, 64), (4 * 32, 64)]
    for name, weight in zip(names, weights, strict=True):
        assert float(weight.std()) == pytest.approx(64**-0.5, rel=0.05)
        assert not torch.equal(weight, other.get_submodule(name).weight)
    assert not torch.equal(weights[1], weights[2])
