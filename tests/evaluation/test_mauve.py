"""MAUVE: near 1 for texts of the same corpus, lower for others; its features; what is refused before the work."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

from support import tiny
from vae_ds.config import ModelConfig
from vae_ds.config.settings import EvaluationConfig
from vae_ds.errors import ConfigError, DataError
from vae_ds.evaluation import mauve, pooled_base
from vae_ds.model.t5vae import T5VAE, load_tokenizer

CPU = torch.device("cpu")
ENOUGH = mauve.LEAST


@pytest.fixture(scope="module")
def base() -> str:
    return tiny.base()


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str], list[str]]:
    """Two halves of a corpus, and the first words of the second one."""
    drawn = np.random.default_rng(0).permutation(len(tiny.ENGLISH))
    one, other = ([tiny.ENGLISH[index] for index in half] for half in np.array_split(drawn, 2))
    return one, other, [" ".join(text.split()[:3]) for text in other]


def gpt2(folder: Path, texts: Sequence[str]) -> Path:
    """A small random GPT-2 with a tokenizer of whole words."""
    words = sorted({word for text in texts for word in text.split()})
    tokenizer = Tokenizer(
        models.WordLevel({word: row for row, word in enumerate(["<end>", *words])}, unk_token="<end>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=len(words) + 1, n_positions=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("kind", ["base", "gpt2"])
def test_texts_of_the_same_corpus_are_closer(
    kind: str, base: str, texts: tuple[list[str], list[str], list[str]], tmp_path: Path
) -> None:
    one, other, beginnings = texts
    name = "base" if kind == "base" else str(gpt2(tmp_path / "gpt2-small", tiny.ENGLISH))
    features = mauve.features_of(name, base, load_tokenizer(base), 24, CPU)
    found = mauve.mauve(beginnings, one, other, features)
    assert found["mauve_texts"] == 200
    assert 0 < found["mauve"] < 0.5
    assert 0.7 < found["mauve_train"] <= 1
    assert found["mauve_sd"] >= 0
    for few in (None, other[:199]):
        assert mauve.mauve(one, one, few, features)["mauve_train"] is None
    assert mauve.mauve(one, one, None, features) == {
        "mauve_texts": 200, "mauve": pytest.approx(1), "mauve_sd": pytest.approx(0, abs=1e-6),
        "mauve_train": None, "mauve_train_sd": None,
    }  # fmt: skip


def test_the_features_are_means_of_the_states(base: str) -> None:
    """Of the tokens of each text, whatever it is batched with."""
    tokenizer = load_tokenizer(base)
    texts = [*tiny.ENGLISH[:5], "", "one"]
    found = pooled_base(base, tokenizer, texts, 24, CPU)
    encoder = T5VAE.from_base(ModelConfig(base=base, latent_dim=1)).t5.encoder
    for text, row_H in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            expected_H = encoder(input_ids=ids).last_hidden_state[0].mean(0)
        assert row_H == pytest.approx(expected_H.numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "samples", "sentences", "kind", "said"),
    [
        ("base", 256, ENOUGH, ConfigError, "needs 2,000 samples or more, evaluation.samples is 256"),
        ("base", ENOUGH, 300, DataError, "needs 2,000 sentences or more; the split has 300"),
        ("gpt2-nowhere/at/all", ENOUGH, ENOUGH, ConfigError, "gpt2-nowhere/at/all is neither `base` nor a GPT-2"),
    ],
)
def test_what_cannot_be_computed_is_said_before_the_work(
    name: str, samples: int, sentences: int, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        mauve.check(EvaluationConfig(mauve=name, samples=samples), sentences)


def test_a_model_of_another_kind_is_refused(base: str) -> None:
    with pytest.raises(ConfigError, match="mauve-text knows only names with gpt2 or bert"):
        mauve.check(EvaluationConfig(mauve=base, samples=ENOUGH), ENOUGH)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mauve", None)
    with pytest.raises(ConfigError, match=r'needs the package mauve-text .*pip install "vae_ds\[mauve\]"'):
        mauve.check(EvaluationConfig(mauve="base", samples=ENOUGH), ENOUGH)
    mauve.check(EvaluationConfig(), 3)
