"""`TextVAE`: results that depend on no batch and no order, the lengths of the training, arrays in and out, errors."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import vae_ds
from support import tiny
from support.launch import clean_environment
from support.models import taught
from vae_ds.config import ModelConfig
from vae_ds.errors import CheckpointError, ConfigError, DataError
from vae_ds.model import T5VAE, auto_code, gaussian, load_tokenizer
from vae_ds.textvae import TextVAE

UNITS = 5
LONG = " ".join(tiny.ENGLISH[20:26])
# Very different lengths, in an order that no sorting keeps.
TEXTS = [*tiny.ENGLISH[:5], LONG, "a cat", *tiny.ENGLISH[5:9], LONG + " " + LONG, "letters"]
LONGEST = 200


@pytest.fixture(scope="module")
def vae() -> TextVAE:
    """Its texts differ from code to code."""
    return TextVAE(taught(UNITS), load_tokenizer(tiny.base()), LONGEST, device="cpu")


def plain() -> TextVAE:
    base = tiny.base()
    return TextVAE(T5VAE.from_base(ModelConfig(base=base, injection="none")), load_tokenizer(base), 40, device="cpu")


def alone(vae: TextVAE, text: str) -> torch.Tensor:
    """mu and logvar of one text, without padding."""
    ids = torch.tensor([vae.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return torch.stack(vae.model.encode(ids, torch.ones_like(ids)), 1)[0]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_codes_are_those_of_one_text_at_a_time(vae: TextVAE, batch: int) -> None:
    expected_N2L = torch.stack([alone(vae, text) for text in TEXTS])
    assert len({len(vae.tokenizer(text)["input_ids"]) for text in TEXTS}) > 5
    torch.testing.assert_close(vae.encode(TEXTS, batch=batch), expected_N2L[:, 0], atol=1e-5, rtol=0)
    mu_NL, logvar_NL = vae.posterior(TEXTS, batch=batch)
    torch.testing.assert_close(mu_NL, expected_N2L[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logvar_NL, expected_N2L[:, 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.0}, {"temperature": 1.2, "top_p": 0.9}, {"beams": 2}], ids=lambda how: "-".join(how)
)
def test_no_text_depends_on_the_batch_or_on_the_others(vae: TextVAE, how: dict[str, float]) -> None:
    short = {"max_new_tokens": 12, "seed": 3, **how}
    expected = vae.reconstruct(TEXTS, **short)
    assert len(set(expected)) > 3
    for batch in (1, 4, 100):
        assert vae.reconstruct(TEXTS, batch=batch, **short) == expected
    # In parts, each text keeps its own number.
    parts = [vae.reconstruct(TEXTS[start : start + 5], first=start, **short) for start in range(0, len(TEXTS), 5)]
    assert [text for part in parts for text in part] == expected
    assert vae.decode(vae.encode(TEXTS), batch=2, **short) == expected
    samples = vae.sample(20, **short)
    assert vae.sample(20, batch=1, **short) == samples
    assert vae.sample(7, **short) == samples[:7]
    assert vae.sample(5, first=15, **short) == samples[15:]
    if "temperature" in how:
        assert vae.sample(20, **{**short, "seed": 4}) != samples
        assert vae.reconstruct([TEXTS[0]] * 40, **short).count(expected[0]) < 40  # each has a stream of its own


def test_sampled_codes_depend_on_seed_and_number_only(vae: TextVAE) -> None:
    z_NL = vae.encode(TEXTS, sampled=True, seed=5)
    torch.testing.assert_close(vae.encode(TEXTS, sampled=True, seed=5, batch=2), z_NL, atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.encode(TEXTS[4:], sampled=True, seed=5, first=4), z_NL[4:], atol=1e-5, rtol=0)
    assert not torch.allclose(vae.encode(TEXTS, sampled=True, seed=6), z_NL)
    mu_NL, logvar_NL = vae.posterior(TEXTS)
    eps_NL = (z_NL - mu_NL) / torch.exp(logvar_NL / 2)
    assert eps_NL.abs().max() < 5
    assert 0.5 < eps_NL.std() < 1.5


@pytest.mark.parametrize("top_p", [None, 0.6])
def test_drawn_tokens_have_the_probabilities_of_the_model(vae: TextVAE, top_p: float | None) -> None:
    """The first token of many texts from one code, against the softmax of the model."""
    count = 3000
    z_1L = vae.encode(TEXTS[:1])
    with torch.no_grad():
        start = torch.full((1, 1), vae.model.t5.config.decoder_start_token_id)
        logits_V = vae.model.t5(encoder_outputs=(z_1L[:, None],), decoder_input_ids=start, use_cache=False).logits[0, 0]
    chance_V = (logits_V.double() / 3).softmax(-1)
    if top_p is not None:
        sorted_V, order_V = chance_V.sort(descending=True)
        kept = int((sorted_V.cumsum(0) < top_p).sum()) + 1
        chance_V[order_V[kept:]] = 0
        chance_V /= chance_V.sum()
    drawn = vae.decode(z_1L.expand(count, -1), temperature=3.0, top_p=top_p, max_new_tokens=1, batch=1024)
    found = {text: drawn.count(text) / count for text in set(drawn)}
    expected: dict[str, float] = {}
    for token, chance in enumerate(chance_V.tolist()):
        text = vae.tokenizer.decode([token], skip_special_tokens=True)
        expected[text] = expected.get(text, 0.0) + chance
    assert len(found) > 5
    for text, chance in expected.items():
        error = math.sqrt(chance * (1 - chance) / count)
        assert abs(found.get(text, 0.0) - chance) < 5 * error + 1e-9, text


def test_codes_go_in_and_out_of_numpy(vae: TextVAE) -> None:
    z_NL = vae.encode(TEXTS[:3])
    assert z_NL.dtype == torch.float32
    assert z_NL.device.type == "cpu"
    array = np.asarray(z_NL)
    expected = vae.decode(z_NL, max_new_tokens=8)
    for z in (array, array.astype(np.float64), array.tolist(), list(z_NL), z_NL.clone().requires_grad_()):
        assert vae.decode(z, max_new_tokens=8) == expected


def test_neighbours_are_the_nearest_codes(vae: TextVAE) -> None:
    corpus = list(tiny.ENGLISH[:60])
    z_NL, z_L = np.asarray(vae.encode(corpus), np.float64), np.asarray(vae.encode([TEXTS[2]])[0], np.float64)
    distance_N = np.linalg.norm(z_NL - z_L, axis=1)
    found = vae.neighbours(TEXTS[2], corpus, 4)
    assert [one.row for one in found] == np.argsort(distance_N, kind="stable")[:4].tolist()
    assert [one.distance for one in found] == pytest.approx(np.sort(distance_N)[:4], abs=1e-4)
    assert (found[0].text, [corpus[one.row] for one in found]) == (TEXTS[2], [one.text for one in found])
    assert vae.neighbours(TEXTS[2], iter(corpus), 4, z=vae.encode(corpus)) == found
    cosine_N = 1 - z_NL @ z_L / np.linalg.norm(z_NL, axis=1) / np.linalg.norm(z_L)
    near = vae.neighbours(TEXTS[2], corpus, 100, metric="cosine")
    assert [one.distance for one in near] == pytest.approx(np.sort(cosine_N), abs=1e-4)


def test_a_shift_goes_along_the_difference_of_the_means(vae: TextVAE) -> None:
    negative, positive = tiny.ENGLISH[:4], tiny.ENGLISH[6:12]
    direction_L = vae.direction(negative, positive)
    expected_L = vae.encode(positive).mean(0) - vae.encode(negative).mean(0)
    torch.testing.assert_close(direction_L, expected_L)
    short = {"max_new_tokens": 12}
    moved = vae.shift(TEXTS, direction_L.numpy(), 1.5, **short)
    assert moved == vae.decode(vae.encode(TEXTS) + 1.5 * expected_L, **short)
    assert vae.shift(TEXTS, direction_L, 0, **short) == vae.reconstruct(TEXTS, **short) != moved


def test_log_prob_is_the_importance_weighted_estimate(vae: TextVAE) -> None:
    """With many samples of a narrow posterior, against the definition with samples of its own."""
    texts, count = TEXTS[:3], 400
    found_N = vae.log_prob(texts, samples=count)
    torch.manual_seed(1)
    for text, found in zip(texts, found_N.tolist(), strict=True):
        mu_L, logvar_L = alone(vae, text).double()
        z_KL = mu_L + torch.exp(logvar_L / 2) * torch.randn(count, UNITS, dtype=torch.float64)
        ids_KT = torch.tensor([vae.tokenizer(text)["input_ids"]] * count)
        with torch.no_grad():
            rec_K = vae.model.reconstruction(z_KL.float(), ids_KT).double()
        weights_K = gaussian.log_prior(z_KL) - gaussian.log_density(z_KL, mu_L, logvar_L) - rec_K
        assert found == pytest.approx(float(torch.logsumexp(weights_K, 0)) - math.log(count), abs=1.5)
    # A text does not depend on its neighbours: its noise is its own.
    assert vae.log_prob(texts[1:], samples=count, first=1).tolist() == pytest.approx(found_N[1:].tolist(), abs=1e-3)
    assert vae.log_prob(texts, samples=1).mean() < found_N.mean()


def test_a_plain_language_model_has_exact_probabilities_and_samples() -> None:
    vae = plain()
    ids = torch.tensor([vae.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        expected = -float(vae.model.reconstruction(None, ids))
    assert vae.log_prob(TEXTS[:2])[0].item() == pytest.approx(expected, abs=1e-4)
    samples = vae.sample(9, temperature=1.0, max_new_tokens=8)
    assert len(set(samples)) > 1
    assert vae.sample(9, temperature=1.0, max_new_tokens=8, batch=2) == samples
    for use in (lambda: vae.encode(TEXTS), lambda: vae.decode([[]]), lambda: vae.shift(TEXTS, [])):
        with pytest.raises(ConfigError, match="injection `none`"):
            use()


def test_an_export_keeps_the_length_of_the_training(vae: TextVAE, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "model")
    again = TextVAE.from_pretrained(tmp_path / "model", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(again.encode(TEXTS), vae.encode(TEXTS))  # the longest has more than 64 tokens
    assert len(vae.tokenizer(TEXTS[11])["input_ids"]) > 64
    assert (again.max_tokens, again.fingerprint) == (LONGEST, vae.fingerprint)
    # An export of an earlier version does not have it.
    file = tmp_path / "model" / "config.json"
    description = json.loads(file.read_text())
    assert description.pop("max_tokens") == LONGEST
    file.write_text(json.dumps(description))
    old = TextVAE.from_pretrained(tmp_path / "model", device="cpu")
    assert old.max_tokens == 64
    with pytest.warns(UserWarning, match="longer than 64 tokens are cut"):
        old.encode(TEXTS)
    file.write_text(json.dumps(description | {"max_tokens": "many"}))
    with pytest.raises(CheckpointError, match="max_tokens is 'many'"):
        TextVAE.from_pretrained(tmp_path / "model")


def test_a_hub_name_is_found_in_the_cache(vae: TextVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^someone/vae: no such directory, and the hub"):
        TextVAE.from_pretrained("someone/vae")
    stored = tmp_path / "models--someone--vae"
    vae.save_pretrained(stored / "snapshots" / ("0" * 40))
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0" * 40)
    assert TextVAE.from_pretrained("someone/vae", device="cpu").fingerprint == vae.fingerprint
    with pytest.raises(CheckpointError, match=r"^nope: no such directory$"):
        TextVAE.from_pretrained("nope")


def test_the_fingerprint_tells_models_apart(vae: TextVAE) -> None:
    same = TextVAE(vae.model, vae.tokenizer, 10, device="cpu")
    assert same.fingerprint == vae.fingerprint
    other = T5VAE.from_base(vae.model.settings)
    other.load_state_dict(vae.model.state_dict())
    assert TextVAE(other, vae.tokenizer, device="cpu").fingerprint == vae.fingerprint
    with torch.no_grad():
        other.bottleneck.mu.weight.mul_(1.001)
    assert TextVAE(other, vae.tokenizer, device="cpu").fingerprint != vae.fingerprint


@pytest.mark.parametrize(
    ("error", "message", "use"),
    [
        (DataError, "one string was given", lambda v: v.encode("a text")),
        (DataError, "one string was given", lambda v: v.neighbours("a", "corpus")),
        (DataError, "no sentence", lambda v: v.encode([])),
        (DataError, "no sentence", lambda v: v.log_prob([])),
        (DataError, "sentence 1500 is empty", lambda v: v.encode(["a"] * 1499 + [" "])),
        (DataError, "sentence 2 is no text but NoneType", lambda v: v.reconstruct(["a", None])),
        (DataError, "sentence 2 has bytes that are not UTF-8", lambda v: v.log_prob(["é", "caf\udce9"])),
        (DataError, r"shape \(2, 4\); this model needs \(N, 5\)", lambda v: v.decode(np.zeros((2, 4)))),
        (DataError, r"shape \(5,\); this model needs", lambda v: v.decode(np.zeros(5))),
        (DataError, r"shape \(0, 5\)", lambda v: v.decode(np.zeros((0, 5)))),
        (DataError, r"shape \(1, 4\)", lambda v: v.shift(["a"], np.zeros(4))),
        (DataError, "row 1 ", lambda v: v.decode([[0.0] * 5, [0.0] * 4 + [math.nan]])),
        (DataError, "no matrix of numbers", lambda v: v.decode([["a"] * 5])),
        (DataError, "1 codes for 2 texts", lambda v: v.neighbours("a", ["a", "b"], z=np.zeros((1, 5)))),
        (ConfigError, "must be euclidean or cosine", lambda v: v.neighbours("a", ["a"], metric="city")),
        (ConfigError, "neighbours must be at least 1", lambda v: v.neighbours("a", ["a"], 0)),
        (ConfigError, "number of samples must be", lambda v: v.log_prob(["a"], samples=0)),
        (ConfigError, "number of samples must be", lambda v: v.sample(0)),
        (ConfigError, "temperature must be above 0", lambda v: v.decode(np.zeros((1, 5)), temperature=0)),
        (ConfigError, "at least 2; found 1", lambda v: v.encode(["a"], max_tokens=1)),
        (ConfigError, "device tpu9 is unknown", lambda v: TextVAE(v.model, v.tokenizer, device="tpu9")),
        (ConfigError, "no such usable GPU", lambda v: TextVAE(v.model, v.tokenizer, device="cuda:99")),
    ],
)
def test_wrong_input_gets_one_clear_error(vae: TextVAE, error: type[Exception], message: str, use) -> None:
    with pytest.raises(error, match=message) as found:
        use(vae)
    assert "\n" not in str(found.value)


def test_the_import_of_the_package_is_light(vae: TextVAE, tmp_path: Path) -> None:
    """torch and transformers are imported later. When transformers is, it knows exports, without code of the export."""
    vae.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / auto_code.CODE).unlink()
    asks = """
import sys, vae_ds
assert not {"torch", "transformers"} & sys.modules.keys()
from transformers import AutoModel
print(type(AutoModel.from_pretrained(sys.argv[1])).__module__, vae_ds.TextVAE.__name__)
"""
    words = [sys.executable, "-c", asks, str(tmp_path / "mine")]
    done = subprocess.run(words, env=clean_environment(tmp_path), capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("vae_ds.model.auto TextVAE\n", 0), done.stderr
    assert vae_ds.TextVAE is TextVAE


def test_nothing_is_shown_away_from_a_terminal(
    vae: TextVAE, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vae_ds.data.progress.FIRST_S", 0.0)
    vae.encode(TEXTS)
    vae.log_prob(TEXTS[:2], samples=2)
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")
