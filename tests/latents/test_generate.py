"""The uses of the latent space: right shapes and ends, deterministic by seed, clear errors."""

import json

import pytest
import torch

from support import partitioned_decoding, tiny
from support.launch import launch
from vae_ds.config.settings import ModelConfig
from vae_ds.data.batches import collate, from_texts
from vae_ds.errors import ConfigError, DataError
from vae_ds.latents import generate
from vae_ds.model.t5vae import T5VAE, load_tokenizer

TEXTS = list(tiny.ENGLISH[:6])
SHORT = {"max_new_tokens": 12, "max_tokens": 40}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.make_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def model(base, tokenizer):
    """Briefly trained to reconstruct TEXTS, so that each latent says something of its own."""
    model = T5VAE.from_base(ModelConfig(base=base, latent_dim=5))
    tokens = from_texts(TEXTS, tokenizer, 40)
    batch = collate(tokens, range(len(TEXTS)), pad_id=0, latent_dim=5, seed=0, keys=(), sample=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch.arguments()).rec_B.mean().backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def plain(base):
    return T5VAE.from_base(ModelConfig(base=base, injection="none"))


@pytest.mark.timeout(600)
def test_ranks_decode_texts_of_different_lengths_with_a_divided_model(model, tokenizer, tmp_path):
    """ZeRO 3 gathers weights in each step: a rank that stops at its own end gets out of step with the other."""
    model.save_pretrained(tmp_path / "model", tokenizer)
    wanted = {
        text: [generate.reconstruct(model, tokenizer, [text], max_new_tokens=40, beams=n) for n in (1, 2)]
        for text in TEXTS
    }
    steps = {text: len(tokenizer(found[0][0])["input_ids"]) for text, found in wanted.items()}
    texts = [min(steps, key=steps.get), max(steps, key=steps.get)]
    assert steps[texts[0]] < steps[texts[1]] < 40
    script = [partitioned_decoding.__file__, tmp_path / "model", tmp_path, json.dumps(texts)]
    finished = launch(script, timeout_s=200, check=False)
    assert not finished.timed_out, finished.report()
    for rank, text in enumerate(texts):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == wanted[text], finished.report()


def by_hand(model, tokenizer, z_L):
    """Greedy decoding without cache, batch or generate: feed the argmax back, a token at a time."""
    ids = [model.t5.config.decoder_start_token_id]
    with torch.no_grad():
        for _ in range(SHORT["max_new_tokens"]):
            output = model.t5(
                encoder_outputs=(z_L[None, None],), decoder_input_ids=torch.tensor([ids]), use_cache=False
            )
            ids.append(int(output.logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids, skip_special_tokens=True)


def mu_of(model, tokenizer, text):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return model.encode(ids, torch.ones_like(ids))[0][0]


def test_reconstructions_are_greedy_from_mu_in_the_order_given(model, tokenizer):
    expected = [by_hand(model, tokenizer, mu_of(model, tokenizer, text)) for text in TEXTS]
    assert len(set(expected)) > 3  # else the order could not be told
    assert generate.reconstruct(model, tokenizer, TEXTS, **SHORT) == expected
    assert generate.reconstruct(model, tokenizer, TEXTS, batch=2, **SHORT) == expected
    assert not any("<pad>" in text or "</s>" in text for text in expected)


def test_sampled_reconstructions_follow_the_seed(model, tokenizer):
    first = generate.encode(model, tokenizer, TEXTS, sampled=True, seed=1)
    assert torch.equal(first, generate.encode(model, tokenizer, TEXTS, sampled=True, seed=1))
    torch.testing.assert_close(first, generate.encode(model, tokenizer, TEXTS, sampled=True, seed=1, batch=2))
    assert not torch.allclose(first, generate.encode(model, tokenizer, TEXTS, sampled=True, seed=2))
    assert not torch.allclose(first, generate.encode(model, tokenizer, TEXTS))
    texts = generate.reconstruct(model, tokenizer, TEXTS, sampled=True, seed=1, **SHORT)
    assert texts == generate.decode(model, tokenizer, first, **SHORT)


def test_prior_samples_follow_the_seed_and_not_their_number(model, tokenizer):
    texts = generate.sample(model, tokenizer, 5, 3, **SHORT)
    assert len(texts) == 5
    assert generate.sample(model, tokenizer, 3, 3, **SHORT) == texts[:3]
    assert generate.sample(model, tokenizer, 5, 3, batch=2, **SHORT) == texts
    assert generate.sample(model, tokenizer, 5, 4, **SHORT) != texts


@pytest.mark.parametrize(
    "decoding", [{"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.8}, {"beams": 3}], ids=lambda d: "_".join(d)
)
def test_other_ways_of_choosing_tokens(model, tokenizer, decoding):
    state = torch.random.get_rng_state()
    texts = generate.sample(model, tokenizer, 4, 0, **decoding, **SHORT)
    assert torch.equal(torch.random.get_rng_state(), state)  # a training run's dropout must not feel a sample
    torch.manual_seed(12345)
    assert generate.sample(model, tokenizer, 4, 0, **decoding, **SHORT) == texts
    torch.random.set_rng_state(state)
    assert generate.sample(model, tokenizer, 16, 0, **decoding, **SHORT) != generate.sample(
        model, tokenizer, 16, 0, **SHORT
    )
    if "temperature" in decoding:
        again = generate.reconstruct(model, tokenizer, TEXTS, seed=0, **decoding, **SHORT)
        assert again != generate.reconstruct(model, tokenizer, TEXTS, seed=1, **decoding, **SHORT)


def test_every_token_can_be_drawn(model, tokenizer):
    """At a high temperature all tokens are nearly alike; the library's own default would keep 50 of them."""
    z_BL = torch.zeros(600, model.latent_dim)  # one distribution: each z has 50 likeliest tokens of its own
    drawn = generate.decode(model, tokenizer, z_BL, temperature=1e4, max_new_tokens=1)
    assert len(set(drawn)) > 60


@pytest.mark.parametrize("decoding", [{"temperature": 1e-4}, {"temperature": 1.5, "top_p": 1e-6}], ids=["cold", "thin"])
def test_nearly_no_freedom_is_greedy(model, tokenizer, decoding):
    drawn = generate.sample(model, tokenizer, 4, 0, **decoding, **SHORT)
    assert drawn == generate.sample(model, tokenizer, 4, 0, **SHORT)


@pytest.mark.parametrize("path", ["linear", "slerp"])
def test_the_ends_of_an_interpolation_are_the_reconstructions(model, tokenizer, path):
    a, b = TEXTS[:2]
    texts = generate.interpolate(model, tokenizer, a, b, 4, path=path, **SHORT)
    assert len(texts) == 4
    assert [texts[0], texts[-1]] == generate.reconstruct(model, tokenizer, [a, b], **SHORT)
    assert texts[0] != texts[-1]
    assert generate.interpolate(model, tokenizer, b, a, 4, path=path, **SHORT) == texts[::-1]


def test_paths_between_latents():
    a, b = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    share = torch.linspace(0, 1, 5)
    line, arc = generate.linear(a, b, share), generate.slerp(a, b, share)
    torch.testing.assert_close(line[2], torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(arc.norm(dim=1), torch.full((5,), 2.0))  # the arc stays on the shell
    torch.testing.assert_close(arc[2], torch.tensor([2.0, 2.0, 0.0]) / 2**0.5)
    for points in (line, arc):
        assert torch.equal(points[0], a)
        assert torch.allclose(points[-1], b, atol=1e-12)
    for c in (a, -a, torch.zeros(3)):  # no arc is defined
        assert torch.equal(generate.slerp(a, c, share), generate.linear(a, c, share))


def test_an_analogy_adds_the_difference(model, tokenizer):
    a, b, c = TEXTS[:3]
    za, zb, zc = (mu_of(model, tokenizer, text) for text in (a, b, c))
    expected = by_hand(model, tokenizer, zc + zb - za)
    assert generate.analogy(model, tokenizer, a, b, c, **SHORT) == expected
    assert generate.analogy(model, tokenizer, a, a, c, **SHORT) == by_hand(model, tokenizer, zc)


def test_a_traversal_moves_one_unit_around_the_sentence(model, tokenizer):
    texts = generate.traverse(model, tokenizer, TEXTS[0], 2, reach=6.0, steps=5, **SHORT)
    z = mu_of(model, tokenizer, TEXTS[0])
    unit = torch.eye(5)[2]
    assert texts == [by_hand(model, tokenizer, z + offset * unit) for offset in (-6.0, -3.0, 0.0, 3.0, 6.0)]
    assert len(set(texts)) > 1
    assert generate.traverse(model, tokenizer, TEXTS[0], 2, steps=1, **SHORT) == [by_hand(model, tokenizer, z)]


def test_dropout_is_off_inside_and_modes_come_back(model, tokenizer):
    expected = generate.encode(model, tokenizer, TEXTS)
    model.train()
    model.t5.decoder.eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    try:
        assert torch.equal(generate.encode(model, tokenizer, TEXTS), expected)
        assert [module.training for module in model.modules()] == modes
        with generate.inference(model):
            assert not any(module.training for module in model.modules())
        with pytest.raises(DataError), generate.inference(model):
            raise DataError("a fault inside")
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()


def test_a_plain_language_model_samples_and_has_no_latent(plain, tokenizer):
    texts = generate.sample(plain, tokenizer, 5, 0, temperature=1.0, batch=3, **SHORT)
    assert len(set(texts)) == 5
    assert generate.sample(plain, tokenizer, 5, 0, temperature=1.0, batch=3, **SHORT) == texts
    assert len(set(generate.sample(plain, tokenizer, 3, 0, **SHORT))) == 1
    for use in (
        lambda: generate.reconstruct(plain, tokenizer, TEXTS),
        lambda: generate.interpolate(plain, tokenizer, *TEXTS[:2]),
        lambda: generate.analogy(plain, tokenizer, *TEXTS[:3]),
        lambda: generate.traverse(plain, tokenizer, TEXTS[0], 0),
    ):
        with pytest.raises(ConfigError, match="injection `none`"):
            use()


def test_a_long_text_is_cut_with_a_warning(model, tokenizer):
    with pytest.warns(UserWarning, match="longer than 6 tokens are cut"):
        cut = generate.encode(model, tokenizer, TEXTS[:1], max_tokens=6)
    ids = torch.tensor([[*tokenizer(TEXTS[0])["input_ids"][:5], tokenizer.eos_token_id]])
    with torch.no_grad():
        torch.testing.assert_close(cut, model.encode(ids, torch.ones_like(ids))[0])


@pytest.mark.parametrize(
    ("error", "message", "use"),
    [
        (DataError, "sentence 2 is empty", lambda m, t: generate.reconstruct(m, t, ["a word", " \n"])),
        (DataError, "no sentence", lambda m, t: generate.reconstruct(m, t, [])),
        (DataError, "sentence 1 is empty", lambda m, t: generate.interpolate(m, t, "", "b")),
        (DataError, "sentence 3 is empty", lambda m, t: generate.analogy(m, t, "a", "b", "")),
        (DataError, "sentence 1 is empty", lambda m, t: generate.traverse(m, t, "", 0)),
        (ConfigError, "found 0", lambda m, t: generate.sample(m, t, 0)),
        (ConfigError, "found 1 steps", lambda m, t: generate.interpolate(m, t, "a", "b", 1)),
        (ConfigError, "must be linear or slerp", lambda m, t: generate.interpolate(m, t, "a", "b", path="bent")),
        (ConfigError, "units are 0 to 4; found 5", lambda m, t: generate.traverse(m, t, "a", 5)),
        (ConfigError, "found -1", lambda m, t: generate.traverse(m, t, "a", -1)),
        (ConfigError, "at least 1 step", lambda m, t: generate.traverse(m, t, "a", 0, steps=0)),
        (ConfigError, "temperature", lambda m, t: generate.sample(m, t, 1, temperature=0.0)),
        (ConfigError, "give a temperature", lambda m, t: generate.sample(m, t, 1, top_p=0.5)),
        (ConfigError, "at most 1", lambda m, t: generate.sample(m, t, 1, temperature=1.0, top_p=1.5)),
        (ConfigError, "not both", lambda m, t: generate.sample(m, t, 1, temperature=1.0, beams=2)),
        (ConfigError, "beams must be at least 1", lambda m, t: generate.sample(m, t, 1, beams=0)),
        (ConfigError, "max_tokens must be at least 2", lambda m, t: generate.reconstruct(m, t, ["a"], max_tokens=1)),
    ],
)
def test_wrong_input_gets_one_clear_error(model, tokenizer, error, message, use):
    with pytest.raises(error, match=message):
        use(model, tokenizer)


@pytest.mark.parametrize("prior", ["normal", "flow"])
def test_samples_are_the_texts_of_the_codes_of_the_prior(prior: str) -> None:
    model, tokenizer = (
        T5VAE.from_base(ModelConfig(base=tiny.base(), latent_dim=4, prior=prior)),
        load_tokenizer(tiny.base()),
    )
    z_NL = generate.prior_codes(model, 3, seed=2)
    assert generate.decode(model, tokenizer, z_NL) == generate.sample(model, tokenizer, 3, seed=2)
    assert torch.equal(generate.prior_codes(model, 1, seed=2, first=2), z_NL[2:])
