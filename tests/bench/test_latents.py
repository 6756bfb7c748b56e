"""`bench latents`: both sides do the same work, and the result is whole."""

import json
import math

import pytest
import torch

from support import tiny
from vae_ds import cli
from vae_ds.bench import latents
from vae_ds.config import ModelConfig
from vae_ds.model import T5VAE, load_t5, load_tokenizer
from vae_ds.textvae import TextVAE

TEXTS = list(tiny.ENGLISH[:10])


def test_the_stock_model_does_the_same_work() -> None:
    base = tiny.base()
    vae = TextVAE(T5VAE.from_base(ModelConfig(base=base)), load_tokenizer(base), 64, "cpu", batch=4)
    stock, t5 = latents._Stock(base, vae), load_t5(ModelConfig(base=base)).eval()
    states = stock.encode(TEXTS)
    assert [len(part) for part, _ in states] == [4, 4, 2]
    longest = max(TEXTS, key=lambda text: len(vae.tokenizer(text)["input_ids"]))
    ids = torch.tensor([vae.tokenizer(longest)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(states[0][0][0], t5.encoder(ids).last_hidden_state[0], atol=1e-5, rtol=1e-5)
        expected = -float(t5(input_ids=ids, labels=ids).loss) * ids.shape[1]
    assert stock.log_prob(TEXTS, 2)[0] == pytest.approx(expected, rel=1e-4)
    # Neither may end early.
    seen: dict[str, list[int]] = {"vae": [], "stock": []}
    for name, model in (("vae", vae.model.t5), ("stock", stock._t5)):
        model.decoder.register_forward_hook(lambda *_, name=name: seen[name].append(1))
    longer = {"min_new_tokens": 9}
    assert len(latents._decode(vae, vae.encode(TEXTS), 9, longer)) == len(stock.decode(states, 9, longer)) == 10
    assert len(seen["vae"]) == len(seen["stock"]) == 3 * 9


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "latents", "--base", tiny.base(), "--device", "cpu", "--sentences", "6", "--rounds", "3"]
    assert cli.run([*words, "--new-tokens", "4", "--samples", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["work"] for row in found["rows"]] == list(latents.WORKS)
    for row in found["rows"]:
        assert 0 < row["vae"]["lower"] <= row["vae"]["median"] <= row["vae"]["upper"] < math.inf
        assert row["ratio"]["lower"] <= row["ratio"]["median"]
    assert (found["sentences"], found["rounds"], found["device"]) == (6, 3, "cpu")


def test_a_ratio_is_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that comes and goes with the rounds does not move the ratio."""
    slow = [float(factor) for factor in (1, 1, 5, 5, 2, 2, 9, 9)]
    took = {"vae": 1.0, "stock": 2.0}
    monkeypatch.setattr(latents, "_duration_s", lambda work: took[work()] * slow.pop(0))
    row = latents._measure("encode", lambda: "vae", lambda: "stock", 10, 3)
    assert (row.ratio.lower, row.ratio.median, row.ratio.upper) == (2, 2, 2)
    assert (row.vae.median, row.stock.median) == (2, 1)
