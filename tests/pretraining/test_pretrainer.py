"""Pretraining: the examples are T5's, the vocabulary has T5's layout, the run resumes exactly, the model loads."""

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vae_ds import config as configuration
from vae_ds import distributed
from vae_ds.config.settings import ArchitectureConfig, PretrainConfig
from vae_ds.errors import ConfigError, DataError
from vae_ds.pretraining import pretrainer as pretraining
from vae_ds.pretraining import vocabulary
from vae_ds.pretraining.basemodel import TextToText, build_t5, continue_text
from vae_ds.pretraining.pretrainer import pretrain
from vae_ds.pretraining.span_corruption import DENOISING, PREFIX, SPANS, pairs, plan_epoch, tokenise_texts, whole_texts

# Minutes on a machine that is busy with other tests, seconds on a free one.
pytestmark = pytest.mark.timeout(600)

NOUNS = ["reader", "writer", "tensor", "module", "parser", "socket", "matrix", "string"]
VERBS = ["returns", "copies", "checks", "closes", "opens", "prints"]
TEXTS = [f"The {a} {verb} the {b} of each {c}." for a in NOUNS for verb in VERBS for b in NOUNS for c in NOUNS[:4]]
# Enough different words that 300 pieces can be learned from them.
SYLLABLES = [a + b + c for a in "bdfgklmnprst" for b in ("a", "e", "i", "ou") for c in ("", "n", "st")]
WORDS = ["".join(row) for row in distributed.stream("words").choice(SYLLABLES, (600, 3)).tolist()]
WIDE = [*TEXTS[::4], *(f"{a.title()} is {b}, e.g. `x_{i} = {i}`?" for i, (a, b) in enumerate(pairwise(WORDS)))]
SMALL = ArchitectureConfig(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def pieces() -> bytes:
    return vocabulary.train_pieces(WIDE, 300)


@pytest.fixture(scope="module")
def tokenizer(pieces: bytes) -> Any:
    return vocabulary.tokenizer_from_pieces(pieces)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., PretrainConfig]:
    """A recipe on text files that takes seconds; overrides are dotted."""
    data = tmp_path / "data"
    data.mkdir()
    shuffled = distributed.stream("test").permutation(WIDE).tolist()
    for split, rows in {"train": shuffled[:800], "valid": shuffled[800:860], "test": shuffled[860:900]}.items():
        (data / f"{split}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    tree = {
        "architecture": SMALL.model_dump(),
        "data": {"corpus": "text", "path": str(data), "max_tokens": 40, "cache_dir": str(tmp_path / "cache")},
        "batch": {"global": 16, "bucket_batches": 4},
        "steps": 12,
        "precision": "fp32",
        "optimizer": {"lr": 5e-3, "clip": 1.0},
        "learning_rate": {"schedule": "cosine", "warmup_steps": 2},
        "validation": {"every_steps": 12, "sentences": 40},
        "checkpoint": {"every_steps": 12, "keep": 1},
        "logging": {"every": 1, "tensorboard": False, "progress": False},
    }
    return lambda *overrides: configuration.build(PretrainConfig, configuration.override(tree, overrides), "test")


def restored(source: list[int], target: list[int], sentinels: list[int], eos: int) -> list[int]:
    """The text that a pair of span corruption stands for."""
    spans: dict[int, list[int]] = {}
    mark = -1
    for token in target[:-1]:
        if token in sentinels:
            mark = token
            spans[mark] = []
        else:
            spans[mark].append(token)
    assert spans[mark] == [], "the last sentinel closes the target"
    assert target[-1] == source[-1] == eos
    whole = [token for item in source[:-1] for token in (spans[item] if item in sentinels else [item])]
    assert len([item for item in source if item in sentinels]) == len(spans) - 1
    return whole


def test_the_speed_of_a_row_is_that_of_all_its_steps(
    tmp_path: Path, recipe: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation comes after each step. A clock that it restarts would count the last step of a row alone."""
    durations: list[float] = []
    step = pretraining.Pretrainer.step

    def timed(self: pretraining.Pretrainer, *arguments: Any) -> Any:
        began_s = time.perf_counter()
        time.sleep(0.05)
        requests = step(self, *arguments)
        durations.append(time.perf_counter() - began_s)
        return requests

    monkeypatch.setattr(pretraining.Pretrainer, "step", timed)
    pretrain(recipe("steps=4", "validation.every_steps=1", "logging.every=4"), tmp_path / "run")
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    progress = json.loads((tmp_path / "run" / "status.json").read_text())
    assert progress["state"] == "done"
    seconds = 64 / row["texts_per_s"]
    assert seconds == pytest.approx(sum(durations), rel=0.05)
    assert row["positions_per_s"] == pytest.approx(row["tokens_per_s"] / (1 - row["padding"]))
    assert row["share_forward"] > 0
    assert "mfu" not in row


def test_each_example_is_its_text_and_has_the_planned_lengths(tokenizer: Any) -> None:
    texts = tokenise_texts([*TEXTS[:200], " ".join(TEXTS[:3])], tokenizer, 64)
    config = PretrainConfig(span_corruption=0.4, denoising=0.3, deletion=0.25)
    sentinels = vocabulary.sentinel_ids(tokenizer)
    plan = plan_epoch(texts.lengths_N, config, epoch=3)
    index_B = np.arange(len(texts))
    made = pairs(texts, index_B, plan, config, sentinels=sentinels, eos=1, pad=0, epoch=3)
    for row in index_B:
        source = made.input_ids_BT[row][made.attention_mask_BT[row] > 0].tolist()
        target = made.labels_BT[row][made.labels_BT[row] >= 0].tolist()
        assert (len(source), len(target)) == (plan.source_N[row], plan.target_N[row])
        if plan.kind_N[row] == SPANS:
            assert restored(source, target, sentinels, 1) == texts[row].tolist()
        elif plan.kind_N[row] == DENOISING:
            assert target == [*texts[row], 1]
            assert len(source) == len(target) - round(0.25 * len(texts[row]))
            rest = iter(target)
            assert all(token in rest for token in source), "what is left stays in order"
        else:
            cut = plan.cut_N[row]
            mark = sentinels[: min(cut, 1)]
            assert source == [*texts[row][:cut], *mark, 1]
            assert target == [*mark, *texts[row][cut:], 1]
    assert {SPANS, DENOISING, PREFIX} == set(plan.kind_N.tolist())


def test_replaced_tokens_lie_anywhere_in_the_text(tokenizer: Any) -> None:
    texts = tokenise_texts(TEXTS[:1] * 400, tokenizer, 64)
    config = PretrainConfig(span_corruption=1.0)
    plan = plan_epoch(texts.lengths_N, config, 0)
    sentinels = vocabulary.sentinel_ids(tokenizer)
    made = pairs(texts, np.arange(400), plan, config, sentinels=sentinels, eos=1, pad=0, epoch=0)
    places = (made.input_ids_BT == sentinels[0]).nonzero()[:, 1]
    kept = int(plan.source_N[0]) - 2
    assert set(places.tolist()) == set(range(kept + 1))


def test_tokens_are_deleted_anywhere_and_never_all(tokenizer: Any) -> None:
    texts = tokenise_texts(TEXTS[:1] * 400, tokenizer, 64)
    length = int(texts.lengths_N[0])
    for deletion, left in ((0.2, length - round(0.2 * length)), (0.999, 1)):
        config = PretrainConfig(span_corruption=0, denoising=1, deletion=deletion)
        plan = plan_epoch(texts.lengths_N, config, 0)
        made = pairs(texts, np.arange(400), plan, config, sentinels=range(300, 400), eos=1, pad=0, epoch=0)
        sources = [row[:left].tolist() for row in made.input_ids_BT]
        assert made.input_ids_BT.shape == (400, left + 1)
        assert {token for row in sources for token in row} == set(texts[0].tolist())


def test_examples_are_a_function_of_seed_and_epoch(tokenizer: Any) -> None:
    texts = tokenise_texts(TEXTS[:300], tokenizer, 64)
    plans = [plan_epoch(texts.lengths_N, PretrainConfig(seed=seed), epoch) for seed, epoch in [(0, 0), (0, 0), (0, 1)]]
    assert np.array_equal(plans[0].order_N, plans[1].order_N)
    assert not np.array_equal(plans[0].order_N, plans[2].order_N)
    alone = pairs(texts, np.asarray([7]), plans[0], PretrainConfig(), sentinels=range(300, 400), eos=1, pad=0, epoch=0)
    rows = pairs(texts, np.arange(9), plans[0], PretrainConfig(), sentinels=range(300, 400), eos=1, pad=0, epoch=0)
    width = alone.labels_BT.shape[1]
    assert torch.equal(rows.labels_BT[7][:width], alone.labels_BT[0])


def test_shares_of_the_kinds_are_the_recipes(tokenizer: Any) -> None:
    lengths_N = np.full(20_000, 20)
    plan = plan_epoch(lengths_N, PretrainConfig(span_corruption=0.3, denoising=0.2, empty_prefix=0.5), 0)
    assert np.mean(plan.kind_N == SPANS) == pytest.approx(0.3, abs=0.02)
    assert np.mean(plan.kind_N == DENOISING) == pytest.approx(0.2, abs=0.02)
    prefix_N = plan.kind_N == PREFIX
    # Half are cut at nothing on purpose, and of the rest one in twenty by chance.
    assert np.mean(plan.cut_N[prefix_N] == 0) == pytest.approx(0.525, abs=0.02)
    assert plan.cut_N.max() == 19


def test_long_texts_are_cut_between_sentences(tokenizer: Any) -> None:
    sentences = TEXTS[:6]
    (limit,) = {len(ids) for ids in tokenizer(TEXTS[:1], add_special_tokens=False)["input_ids"]}
    texts = tokenise_texts([" ".join(sentences)], tokenizer, 2 * limit + 4)
    found = [tokenizer.decode(texts[i]) for i in range(len(texts))]
    assert len(found) >= 3
    assert " ".join(found) == " ".join(sentences)
    assert texts.lengths_N.max() < 2 * limit + 4


def test_a_sentence_that_never_fits_is_left_out(tokenizer: Any) -> None:
    texts = tokenise_texts([TEXTS[0], "reader " * 80 + "end. " + TEXTS[1]], tokenizer, 40)
    assert [tokenizer.decode(texts[i]) for i in range(len(texts))] == TEXTS[:2]
    with pytest.raises(DataError, match="max_tokens"):
        tokenise_texts(["reader " * 80], tokenizer, 40)


def test_vocabulary_has_t5s_layout_and_gives_text_back(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert len(tokenizer) == 400
    assert vocabulary.sentinel_ids(tokenizer) == list(range(399, 299, -1))
    for text in [*WIDE[:50], *WIDE[-50:], 'Case & "marks" ~ {all} <of> [ASCII] $^|#@%*+\\;/']:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("The <extra_id_3> of")["input_ids"].count(396) == 1


def test_same_texts_give_the_same_pieces(pieces: bytes) -> None:
    assert vocabulary.train_pieces(WIDE, 300) == pieces


def test_too_large_a_vocabulary_is_the_users_error() -> None:
    with pytest.raises(DataError, match="vocab_size"):
        vocabulary.train_pieces(["too few words"], 4000)


def test_saved_tokenizer_loads_as_transformers_does(tokenizer: Any, pieces: bytes, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5Tokenizer

    vocabulary.save_tokenizer(tokenizer, pieces, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    wanted = tokenizer(TEXTS[5] + " <extra_id_0>")["input_ids"]
    for kind in (AutoTokenizer, T5Tokenizer):
        assert kind.from_pretrained(tmp_path)(TEXTS[5] + " <extra_id_0>")["input_ids"] == wanted
    # The hub's oldest T5 directories have the SentencePiece file alone.
    (tmp_path / "tokenizer.json").unlink()
    assert T5Tokenizer.from_pretrained(tmp_path)(TEXTS[5] + " <extra_id_0>")["input_ids"] == wanted


def test_nats_are_those_of_transformers_and_ignore_padding(tokenizer: Any) -> None:
    stock = build_t5(SMALL, tokenizer, seed=1).eval()
    model = TextToText(build_t5(SMALL, tokenizer, seed=1)).eval()
    texts = tokenise_texts([TEXTS[0], " ".join(TEXTS[1:3])], tokenizer, 64)
    plan, config = whole_texts(texts.lengths_N), PretrainConfig()
    sentinels = vocabulary.sentinel_ids(tokenizer)

    def nats(*index: int) -> torch.Tensor:
        made = pairs(texts, np.asarray(index), plan, config, sentinels=sentinels, eos=1, pad=0, epoch=0)
        with torch.no_grad():
            return model(**made._asdict())

    assert nats(0, 1)[0].item() == pytest.approx(nats(0)[0].item(), rel=1e-5)
    labels_BT = torch.tensor([[*texts[0].tolist(), 1]])
    with torch.no_grad():
        mean = stock(input_ids=torch.tensor([[1]]), labels=labels_BT).loss
    assert nats(0)[0].item() == pytest.approx(mean.item() * labels_BT.numel(), rel=1e-5)


def test_float16_does_not_overflow(tokenizer: Any) -> None:
    """Feed-forward outputs past 65504, float16's largest number; an engine casts all weights."""
    model = TextToText(build_t5(SMALL, tokenizer, seed=1)).eval()
    t5: Any = model.t5
    with torch.no_grad():
        for block in (*t5.encoder.block, *t5.decoder.block):
            wo = block.layer[-1].DenseReluDense.wo.weight
            wo.mul_(1e4 / wo.abs().max())
            block.layer[-1].layer_norm.weight.mul_(200.0)
    ids_BT = torch.tensor([[9, 8, 7, 1], [6, 5, 4, 1]])
    expected = model(ids_BT, torch.ones_like(ids_BT), ids_BT)
    found = model.half()(ids_BT, torch.ones_like(ids_BT), ids_BT)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_weights_of_sizes_that_suit_adam_are_the_stock_models_when_exported(tokenizer: Any) -> None:
    stock = build_t5(SMALL, tokenizer, seed=1)
    model = TextToText(build_t5(SMALL, tokenizer, seed=1))
    exported = model.plain({name: parameter.detach() for name, parameter in model.named_parameters()})
    assert exported.keys() == dict(stock.named_parameters()).keys()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(exported[name], parameter.detach())
    sizes = [p.std().item() for name, p in model.named_parameters() if p.dim() == 2]
    assert max(sizes) < 4 * min(sizes)


def greedy_continuation(model: Any, tokenizer: Any, prefix: str) -> str:
    """The prefix and the tokens of the largest logits after it, one forward pass a token."""
    before = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    source = torch.tensor([[*before, *tokenizer.convert_tokens_to_ids(["<extra_id_0>", "</s>"])]])
    made = [model.config.decoder_start_token_id]
    with torch.no_grad():
        while len(made) <= 48 and made[-1] != tokenizer.eos_token_id:
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([made])).logits
            made.append(int(logits[0, -1].argmax()))
    return str(tokenizer.decode([*before, *made], skip_special_tokens=True))


def test_a_run_learns_and_exports_what_transformers_loads(
    recipe: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    run_dir = tmp_path / "run"
    config = recipe(
        "steps=60", "validation.every_steps=20", "checkpoint.every_steps=60", "learning_rate.warmup_steps=5"
    )
    assert pretrain(config, run_dir) == run_dir
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    held_out = [json.loads(row) for row in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in held_out] == [20, 40, 60]
    assert held_out[2]["lm_per_token"] < held_out[0]["lm_per_token"] < 4.5
    assert held_out[2]["lm_per_token"] * held_out[2]["tokens"] == pytest.approx(
        held_out[2]["lm_per_sentence"] * held_out[2]["sentences"]
    )
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"

    model_dir = run_dir / "model"
    model, info = T5ForConditionalGeneration.from_pretrained(model_dir, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr()
    assert model.config.decoder_start_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prefix = "The reader returns"
    continued = greedy_continuation(model, tokenizer, prefix)
    assert len(continued) > len(prefix)
    assert continue_text(model, tokenizer, prefix) == continued
    card = (model_dir / "README.md").read_text()
    assert f"{held_out[2]['lm_per_token']:.3f}" in card
    assert "Training is finished." in card
    before = (model_dir / "model.safetensors").stat().st_mtime_ns
    pretrain(config, run_dir)
    assert (model_dir / "model.safetensors").stat().st_mtime_ns == before, "a run that is done is left alone"
    with pytest.raises(ConfigError, match="seed"):
        pretrain(recipe("steps=60", "seed=3"), run_dir)


def losses(run_dir: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_micro_batches_do_not_change_the_run(recipe: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    for name, micro in {"one": 16, "four": 4}.items():
        pretrain(recipe(f"batch.micro={micro}"), tmp_path / name)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_stopped_run_goes_on_as_if_never_stopped(
    recipe: Callable[..., PretrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe("checkpoint.every_steps=5")
    pretrain(config, tmp_path / "whole")
    take = pretraining.Pretrainer.step

    def step_then_signal(self: pretraining.Pretrainer, *arguments: Any) -> bool:
        stop = take(self, *arguments)
        self.stop.raised = "SIGTERM" if self.state.step == 6 else None
        return stop

    with monkeypatch.context() as patch:
        patch.setattr(pretraining.Pretrainer, "step", step_then_signal)
        with pytest.raises(pretraining.Stopped, match="step 7 of 12"):
            pretrain(config, tmp_path / "halves")
    assert json.loads((tmp_path / "halves" / "status.json").read_text())["state"] == "stopped"
    pretrain(config, tmp_path / "halves")
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


def test_a_time_limit_ends_the_run_and_its_decay(recipe: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    config = recipe("steps=1000000", "minutes=0.1", "learning_rate.warmup_steps=1", "validation.every_steps=1000000")
    pretrain(config, tmp_path / "run")
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 5 < len(rows) < 1_000_000
    assert rows[-1]["lr"] < 0.3 * rows[1]["lr"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def test_the_shipped_recipe_loads() -> None:
    config = configuration.load(PretrainConfig, "pretrain-tiny")
    assert (config.architecture.vocab_size + vocabulary.SENTINELS) % 64 == 0
