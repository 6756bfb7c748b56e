"""Metrics of written texts: against sacrebleu, a plain count and a trigram worked by hand; the same on two ranks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch

from support import tiny
from support.launch import launch
from vae_ds import config as configuration
from vae_ds import distributed
from vae_ds.cli import run as command
from vae_ds.config import DataConfig
from vae_ds.config.settings import EvaluationConfig, ModelConfig
from vae_ds.data import corpora, tokenise
from vae_ds.data.batches import collate, from_texts
from vae_ds.evaluation import data_fingerprint, mauve
from vae_ds.evaluation.metrics import evaluate
from vae_ds.evaluation.text_metrics import Trigram, distinct, ngrams, self_bleu, text_metrics
from vae_ds.latents import Decoding, generate
from vae_ds.model.t5vae import T5VAE, load_tokenizer
from vae_ds.runtime import evaluations

ALONE = distributed.Ranks(0, 0, 1, torch.device("cpu"))
TEXTS = list(dict.fromkeys(tiny.ENGLISH))[:20]
SETTINGS = EvaluationConfig(iw_samples=2, iw_sentences=3, bleu_sentences=18, samples=35, mauve="base")
FEW_FOR_MAUVE = """
import sys
from vae_ds import cli
from vae_ds.evaluation import mauve
mauve.LEAST = 20
sys.exit(cli.run(sys.argv[1:]))
"""
ODD = ["", "a a a a b", "a b a b a b", "one word", "Well, it's 3.5% (or so).", "a b"]


@pytest.fixture(scope="module")
def base() -> str:
    return tiny.base()


@pytest.fixture(scope="module")
def trained(base: str) -> T5VAE:
    """A small VAE that has learned most of TEXTS, with the sampled objective at beta 0."""
    model = T5VAE.from_base(ModelConfig(base=base, latent_dim=6, mu_std=0.6, logvar_std=0.3, dropout=0.0))
    tokens = from_texts(TEXTS, load_tokenizer(base), 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(60):
        batch = collate(tokens, np.arange(len(tokens)), pad_id=0, latent_dim=6, seed=0, keys=(step,))
        optimizer.zero_grad()
        model(**batch.arguments()).rec_B.mean().backward()
        optimizer.step()
    return model


def measure(model: T5VAE, base: str, settings: EvaluationConfig = SETTINGS, **options: Any) -> dict[str, Any]:
    tokenizer = load_tokenizer(base)
    tokens = from_texts(TEXTS, tokenizer, 24)
    return text_metrics(model, tokenizer, tokens, ALONE, settings, seed=3, max_tokens=24, **options)


def drawn_ids(model: T5VAE, tokenizer: Any, size: int, seed: int) -> list[tuple[str, list[int]]]:
    """The samples of one batch, at most 24 tokens each, and the ids that the stock `generate` gave."""
    z_BL = torch.stack(
        [torch.as_tensor(distributed.stream(seed, "prior", row).standard_normal(6)).float() for row in range(size)]
    )
    return written_ids(model, tokenizer, z_BL, seed)


def written_ids(model: T5VAE, tokenizer: Any, z_BL: torch.Tensor, seed: int) -> list[tuple[str, list[int]]]:
    how = Decoding(max_new_tokens=24, temperature=1.0, seed=seed)
    with generate.inference(model):
        ids_BT = model.generate(z_BL, 24, **how.arguments(np.arange(len(z_BL)), z_BL.device))
    return list(zip(tokenizer.batch_decode(ids_BT, skip_special_tokens=True), ids_BT.tolist(), strict=True))


def test_self_bleu_is_sacrebleus_sentence_bleu_against_all_others() -> None:
    texts = [*TEXTS[:12], TEXTS[0], *ODD]
    expected = [
        sacrebleu.sentence_bleu(text, [*texts[:row], *texts[row + 1 :]]).score for row, text in enumerate(texts)
    ]
    found = self_bleu([ngrams(text) for text in texts], ALONE)
    assert found["self_bleu"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert found["self_bleu_se"] == pytest.approx(np.std(expected, ddof=1) / len(texts) ** 0.5, rel=1e-12)
    assert 5 < np.mean(expected) < 95
    assert self_bleu([ngrams(text) for text in ["the same words here"] * 2], ALONE)["self_bleu"] == pytest.approx(100)
    assert self_bleu([ngrams("alone")], ALONE)["self_bleu"] is None


def test_distinct_counts_different_ngrams() -> None:
    grams = [ngrams(text) for text in ("a b a b", "a b", "")]
    assert distinct(grams, 1) == 2 / 6
    assert distinct(grams, 2) == 2 / 4  # a b, b a, a b and a b
    assert distinct(grams, 4) == 1
    assert distinct([ngrams("a b")], 3) is None


def test_a_trigram_model_sums_to_one_and_is_wittens_and_bells() -> None:
    vocabulary = 7
    model = Trigram([[3, 4, 1], [3, 4, 4, 1], [5, 1]], vocabulary)
    for history in [(-1, -1), (-1, 3), (3, 4), (4, 4), (6, 6), (6, 4), (0, 2)]:
        assert math.fsum(model.probability(token, history) for token in range(vocabulary)) == pytest.approx(1)
    # Unigrams: 1 three times, 4 three times, 3 twice, 5 once: 9 tokens of 4 kinds.
    one_of_4 = (3 + 4 / 7) / (9 + 4)
    # After 4: 1 twice, 4 once. After 3 4: 1 and 4 once each.
    after_4 = (1 + 2 * one_of_4) / (3 + 2)
    assert model.probability(4, (3, 4)) == pytest.approx((1 + 2 * after_4) / (2 + 2))
    assert model.probability(4, (6, 4)) == pytest.approx(after_4)
    assert model.probability(4, (6, 6)) == pytest.approx(one_of_4)
    assert model.probability(6, (6, 6)) == pytest.approx(4 / 7 / 13)
    first, second, third = (model.probability(*at) for at in ((3, (-1, -1)), (4, (-1, 3)), (1, (3, 4))))
    assert model.nll([3, 4, 1]) == pytest.approx(-math.log(first * second * third))


def test_a_trigram_of_text_finds_like_text_more_likely(base: str) -> None:
    tokenizer = load_tokenizer(base)
    lines = list(dict.fromkeys(tiny.ENGLISH))
    held = [tokenizer(text)["input_ids"] for text in lines[300:320]]
    nll = {}
    for name, texts in {"few": lines[:20], "many": lines[:300], "other": ["zebra xylophone"] * 300}.items():
        model = Trigram((tokenizer(text)["input_ids"] for text in texts), len(tokenizer))
        nll[name] = sum(map(model.nll, held)) / len(held)
    assert nll["many"] < nll["few"] - 3 < nll["other"] - 10
    assert math.isfinite(nll["other"])


@pytest.mark.timeout(240)
def test_each_metric_is_what_it_says(base: str, trained: T5VAE) -> None:
    yardstick = T5VAE.from_base(ModelConfig(base=base, injection="none")), load_tokenizer(base)
    state = torch.random.get_rng_state()
    train = from_texts(TEXTS[:20], yardstick[1], 24)
    features = mauve.features_of("base", base, load_tokenizer(base), 24, ALONE.device)
    others = {"yardstick": yardstick, "train": train, "features": features}
    found = measure(trained, base, **others)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found == measure(trained, base, **others)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert None not in found.values()

    tokenizer = load_tokenizer(base)
    again = generate.reconstruct(trained, tokenizer, TEXTS[:18], max_new_tokens=23, max_tokens=24)
    kept = from_texts(TEXTS, tokenizer, 24)
    assert not kept.truncated_N.any()
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(again, [TEXTS[:18]]).score, abs=1e-6)
    assert 20 < found["bleu"] <= 100
    assert (found["bleu_sentences"], found["samples"], found["sample_temperature"]) == (18, 35, 1.0)
    assert found["bleu_signature"].startswith(
        "nrefs:1|bs:1000|seed:12345|case:mixed|eff:no|tok:13a|smooth:exp|version:"
    )

    groups = [(0, 16), (16, 16), (32, 3)]
    seeds = [int(distributed.stream(3, "text-metrics", start).integers(2**31)) for start, _ in groups]
    written = [
        pair
        for seed, (_, size) in zip(seeds, groups, strict=True)
        for pair in drawn_ids(trained, tokenizer, size, seed)
    ]
    texts = [text for text, _ in written]
    assert len(set(texts)) > 5
    has_end = [tokenizer.eos_token_id in row for _, row in written]
    assert 0 < sum(has_end) < len(texts)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    drawn = [row if end else row[:-1][:23] for row, end in zip(ids, has_end, strict=True)]
    words = int(from_texts(texts, tokenizer, 24, has_end).words_N.sum())
    assert 0 <= sum(len(text.split()) for text in texts) + sum(has_end) - words <= len(texts) - sum(has_end)
    with torch.no_grad():
        nll = [float(yardstick[0].reconstruction(None, torch.as_tensor(row)[None])) for row in drawn]
    assert found["forward_ppl"] == pytest.approx(math.exp(sum(nll) / words), rel=1e-4)
    trigram = Trigram(drawn, len(tokenizer))
    words = sum(len(text.split()) + 1 for text in TEXTS)
    total = sum(trigram.nll(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert found["reverse_ppl"] == pytest.approx(math.exp(total / words), rel=1e-9)
    assert found["self_bleu"] == self_bleu([ngrams(text) for text in texts], ALONE)["self_bleu"]

    # From codes of training sentences: 35 texts of 20 sentences, so some are taken twice.
    chosen = distributed.stream(3, "text-metrics", "train").choice(20, 35, replace=True)
    nll, words = [], 0
    for seed, (start, size) in zip(seeds, groups, strict=True):
        sources = [TEXTS[row] for row in chosen[start : start + size]]
        z_BL = generate.encode(trained, tokenizer, sources, sampled=True, seed=seed, max_tokens=24)
        for text, row in written_ids(trained, tokenizer, z_BL, seed):
            end = tokenizer.eos_token_id in row
            ids = tokenizer(text)["input_ids"]
            words += int(from_texts([text], tokenizer, 24, [end]).words_N.sum())
            with torch.no_grad():
                labels_BT = torch.as_tensor(ids if end else ids[:-1][:23])[None]
                nll.append(float(yardstick[0].reconstruction(None, labels_BT)))
    assert found["forward_ppl_train"] == pytest.approx(math.exp(sum(nll) / words), rel=1e-4)
    assert found["distinct_2"] == distinct([ngrams(text) for text in texts], 2)


def test_what_is_turned_off_is_null(base: str, trained: T5VAE) -> None:
    for off in (0, None):
        found = measure(trained, base, EvaluationConfig(bleu_sentences=off, samples=off))
        assert set(found.values()) == {None}
    one = measure(trained, base, EvaluationConfig(bleu_sentences=0, samples=1))
    assert (one["self_bleu"], one["samples"], one["bleu"]) == (None, 1, None)
    assert one["reverse_ppl"] > 1
    greedy = measure(trained, base, EvaluationConfig(bleu_sentences=0, samples=20, sample_temperature=None))
    assert greedy["sample_temperature"] is None
    assert greedy["self_bleu"] != measure(trained, base, EvaluationConfig(bleu_sentences=0, samples=20))["self_bleu"]


def test_a_plain_language_model_has_samples_and_no_reconstructions(base: str) -> None:
    found = measure(T5VAE.from_base(ModelConfig(base=base, injection="none")), base)
    assert {key for key, value in found.items() if value is None} == {
        *("bleu", "bleu_se", "bleu_sentences", "bleu_signature", "forward_ppl", "forward_ppl_se"),
        *("forward_ppl_train", "forward_ppl_train_se"),
        *("mauve", "mauve_sd", "mauve_train", "mauve_train_sd", "mauve_texts", "mauve_features"),  # without features
    }
    assert found["self_bleu"] < 90  # drawn tokens: not the same text again and again


def test_a_cut_sentence_is_compared_as_far_as_it_was_kept(base: str, trained: T5VAE) -> None:
    tokenizer = load_tokenizer(base)
    settings = EvaluationConfig(bleu_sentences=20, samples=0)
    short = from_texts(TEXTS, tokenizer, 5)
    assert short.truncated_N.all()
    found = text_metrics(trained, tokenizer, short, ALONE, settings, seed=0, max_tokens=5)
    kept = [tokenizer.decode(tokenizer(text)["input_ids"][:4]) for text in TEXTS]
    again = generate.reconstruct(trained, tokenizer, kept, max_new_tokens=4, max_tokens=5)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(again, [kept]).score, abs=1e-6)


def test_a_cut_sentence_has_no_end_for_the_trigram_model(base: str, trained: T5VAE) -> None:
    """`reverse_ppl` of cut sentences: their kept tokens and kept words, as for `ppl`."""
    tokenizer = load_tokenizer(base)
    settings = EvaluationConfig(bleu_sentences=0, samples=16, sample_temperature=None)
    short = from_texts(TEXTS, tokenizer, 9)
    assert 0 < short.truncated_N.sum() < len(TEXTS)
    found = text_metrics(trained, tokenizer, short, ALONE, settings, seed=0, max_tokens=40)
    seed = int(distributed.stream(0, "text-metrics", 0).integers(2**31))
    samples = generate.sample_with_ends(trained, tokenizer, 16, seed, max_new_tokens=40)
    drawn = [
        row if end else row[:-1][:39] for row, end in ((tokenizer(text)["input_ids"], end) for text, end in samples)
    ]
    trigram = Trigram(drawn, len(tokenizer))
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    total = sum(trigram.nll(row if len(row) <= 9 else row[:8]) for row in ids)
    assert found["reverse_ppl"] == pytest.approx(math.exp(total / short.words_N.sum()), rel=1e-9)


@pytest.fixture(scope="module")
def exports(base: str, trained: T5VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exported VAE (`vae`), a yardstick (`plain`) and a recipe that names their text."""
    folder = tmp_path_factory.mktemp("exports")
    tokenizer = load_tokenizer(base)
    trained.save_pretrained(folder / "vae", tokenizer)
    plain = T5VAE.from_base(ModelConfig(base=base, injection="none"))
    plain.save_pretrained(folder / "plain", tokenizer)
    tokens = from_texts(TEXTS, tokenizer, 24)
    metrics, sentences = evaluate(plain, tokens, ALONE, SETTINGS, seed=0, pad_id=0)
    evaluations.write(
        folder / "plain", "test", metrics | {"data_fingerprint": data_fingerprint(tokens, tokenizer)}, sentences
    )
    text = tiny.write_splits(folder / "text", TEXTS, TEXTS, TEXTS)
    (folder / "recipe.yaml").write_text(
        f"data: {{corpus: text, path: {text}, max_tokens: 24, cache_dir: {folder / 'cache'}}}\n"
        "phases: [{name: only, steps: 1}]\n"
        "evaluation: {iw_samples: 9, iw_sentences: 3, batch: 4, bleu_sentences: 18, samples: 100}\n",
        encoding="utf-8",
    )
    return folder


@pytest.mark.timeout(560)
def test_two_ranks_write_what_one_writes(exports: Path) -> None:
    common = ["--recipe", exports / "recipe.yaml"]
    found = {}
    for world in (1, 2):
        words = ["evaluate", exports / "vae", *common, "--yardstick", exports / "plain", "--samples", "35"]
        output = launch(["-c", FEW_FOR_MAUVE, *words, "--mauve", "base"], processes=world).output
        assert "vae: KL of each unit, the largest first:" in output
        found[world] = json.loads((exports / "vae" / "eval-test.json").read_text(encoding="utf-8"))
    assert found[1]["samples"] == 35
    assert found[1]["verdict"] == "uses z"
    assert {key for key, value in found[1].items() if value is None} == set()
    for key, value in found[1].items():
        same = value if isinstance(value, str | dict) else pytest.approx(value, rel=1e-5, abs=1e-5)
        assert found[2][key] == same, key


def test_a_yardstick_with_a_latent_is_refused(exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (exports / "vae" / "eval-test.json").touch()  # another test may not have written it yet
    words = ["evaluate", exports / "vae", "--recipe", exports / "recipe.yaml", "--yardstick", exports / "vae"]
    assert command([str(word) for word in words]) == 2
    assert "has injection `cross_attention`; a yardstick must be a run with `none`" in capsys.readouterr().err


def test_the_values_of_the_sentences_explain_the_means_and_the_difference_to_the_yardstick(exports: Path) -> None:
    words = ["evaluate", exports / "vae", "--recipe", exports / "recipe.yaml", "--yardstick", exports / "plain"]
    assert command([*map(str, words), "--samples", "0", "--bleu-sentences", "0"]) == 0
    found = evaluations.read(exports / "vae", "test")
    own, plain = (evaluations.read_values(exports / name, "test") for name in ("vae", "plain"))
    for name in ("rec", "kl"):
        assert found[name] == pytest.approx(own[name].mean(), rel=1e-6)
    assert found["z_gain"] == pytest.approx((own["rec_swapped"] - own["rec"]).mean(), rel=1e-5)
    assert len(own["iw_nll"]) == found["iw_sentences"] == 3
    difference_3 = own["iw_nll"] - plain["rec"][:3]
    assert found["above_yardstick"] == pytest.approx(difference_3.mean(), rel=1e-5)
    assert found["above_yardstick_se"] == pytest.approx(difference_3.std(ddof=1) / 3**0.5, rel=1e-4)
    assert found["lm_gain"] == pytest.approx((plain["rec"] - own["rec"]).mean(), rel=1e-5)
    assert found["yardstick"] == str(exports / "plain")
    # Twenty training sentences, which are those of the test split.
    assert found["mi_train_sentences"] == 20
    assert 0 < found["mi_train"] <= math.log(21)


@pytest.mark.parametrize(
    ("texts", "max_tokens", "differs"),
    [
        (TEXTS[:7], 6, "other sentences"),
        (TEXTS, 6, "it has other lengths of the kept text"),
        ([*TEXTS[:-1], TEXTS[-1] + "!"], 24, "other sentences"),
    ],
)
def test_a_yardstick_of_other_data_is_refused(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: list[str], max_tokens: int, differs: str
) -> None:
    """Version 0.1 subtracted them: 7 sentences cut to 6 tokens against 24 whole ones gave a gain of 6.51."""
    text = tiny.write_splits(tmp_path / "text", TEXTS, TEXTS, texts)
    other = tmp_path / "other.yaml"
    recipe = (exports / "recipe.yaml").read_text(encoding="utf-8")
    other.write_text(
        recipe.replace(str(exports / "text"), str(text)).replace("max_tokens: 24", f"max_tokens: {max_tokens}"),
        encoding="utf-8",
    )
    words = ["evaluate", exports / "vae", "--recipe", other, "--yardstick", exports / "plain"]
    assert command([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert f"the yardstick {exports / 'plain'} cannot be compared with {exports / 'vae'}" in line
    assert differs in line


def test_the_fingerprint_is_of_the_sentences_and_not_of_their_files(base: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    found = data_fingerprint(from_texts(TEXTS, tokenizer, 24), tokenizer)
    text = tiny.write_splits(tmp_path / "text", TEXTS[:2], TEXTS[2:4], TEXTS)
    data = configuration.build(DataConfig, {"corpus": "text", "path": str(text), "cache_dir": str(tmp_path)}, "test")
    from_file = tokenise(corpora.load(data), "test", tokenizer, 24, tmp_path)
    assert data_fingerprint(from_file, tokenizer) == found
    moved = data_fingerprint(from_texts([TEXTS[0] + TEXTS[1][:3], TEXTS[1][3:], *TEXTS[2:]], tokenizer, 24), tokenizer)
    assert moved["texts"] != found["texts"]
    assert moved["tokenizer"] == found["tokenizer"]
