"""What would silently break training: who sees which sentence, what is drawn for it, and how words are counted."""

import io
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from datasets import Dataset
from transformers import BertGenerationTokenizer, ByT5Tokenizer, T5Tokenizer

from vae_ds.data import tokens as tokens_room
from vae_ds.data.batches import (
    collate,
    epoch_batches,
    from_texts,
    steps_per_epoch,
    tokenise,
)
from vae_ds.data.cuts import Limits, share
from vae_ds.data.fingerprints import tokenizer_fingerprint
from vae_ds.distributed import stream
from vae_ds.errors import ConfigError, DataError

WORDS = [
    "the",
    "a",
    "value",
    "of",
    "to",
    "returns",
    "function",
    "and",
    "list",
    "string",
    "if",
    "not",
    "none",
    "given",
    "each",
    "key",
    "file",
    "path",
    "name",
    "set",
]


@dataclass(frozen=True)
class ACorpus:
    """The shape of a loaded corpus."""

    name: str
    fingerprint: str
    splits: dict[str, Dataset]


def sentences(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(1, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small SentencePiece model, as T5 directories have one."""
    folder = tmp_path_factory.mktemp("spiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(500)), model_writer=model, vocab_size=80, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def t5(spiece: Path) -> T5Tokenizer:
    return T5Tokenizer.from_pretrained(spiece)


@pytest.fixture(scope="module")
def byt5() -> ByT5Tokenizer:
    return ByT5Tokenizer()


@pytest.fixture(scope="module")
def slow(spiece: Path) -> BertGenerationTokenizer:
    """A tokenizer that calls SentencePiece itself; T5 had such a one before transformers 5."""
    return BertGenerationTokenizer(str(spiece / "spiece.model"))


@pytest.fixture(params=["t5", "slow", "byt5"])
def tokenizer(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


@pytest.fixture
def lengths_N() -> np.ndarray:
    return np.random.default_rng(1).integers(2, 60, size=1003).astype(np.int32)


def corpus(texts: list[str], fingerprint: str = "one") -> ACorpus:
    return ACorpus("a/corpus", fingerprint, {"train": Dataset.from_dict({"text": texts})})


# Tokens


def test_the_end_comes_once_and_last(tokenizer) -> None:
    texts = ["the value", "", "the </s> of <pad> a", "</s>", "the list </s>"]
    rows = from_texts(texts, tokenizer, max_tokens=40)
    for index in range(len(texts)):
        ids = rows[index]
        assert ids.dtype == np.int64
        assert ids[-1] == tokenizer.eos_token_id
        assert (ids == tokenizer.eos_token_id).sum() == 1
        assert tokenizer.pad_token_id not in ids
        assert len(ids) == rows.lengths_N[index]
        assert rows.text(index) == texts[index]
    assert rows.words_N.tolist() == [3, 1, 6, 2, 4]
    assert not rows.truncated_N.any()
    assert tokenizer.decode(rows[0][:-1]) == "the value"


def test_a_cut_sentence_counts_the_words_it_keeps_whole(tokenizer) -> None:
    text = "the value of the list"
    whole = from_texts([text], tokenizer, max_tokens=100)
    assert whole.words_N.tolist() == [6]
    for max_tokens in range(2, int(whole.lengths_N[0]) + 2):
        rows = from_texts([text], tokenizer, max_tokens)
        assert rows.lengths_N[0] == min(max_tokens, whole.lengths_N[0])
        assert rows.truncated_N[0] == (max_tokens < whole.lengths_N[0])
        assert rows[0][-1] == tokenizer.eos_token_id
        kept = tokenizer.decode(rows[0][:-1])
        assert text.startswith(kept)
        through_a_word = text[len(kept) :][:1].strip() != "" and kept != "" and not kept.endswith(" ")
        ends = max_tokens >= whole.lengths_N[0]
        assert rows.words_N[0] == len(kept.split()) - through_a_word + ends
        assert rows.target(0).tolist() == whole[0][: rows.lengths_N[0] - (not ends)].tolist()
        assert rows.target_lengths_N[0] == rows.target_tokens == len(rows.target(0)) == rows.lengths_N[0] - (not ends)


def test_a_word_cut_within_a_character_is_not_kept(byt5: ByT5Tokenizer) -> None:
    # e with acute accent is two bytes: with 5 tokens the cut falls between them.
    rows = from_texts(["abc é"], byt5, max_tokens=6)
    assert rows.truncated_N.tolist() == [True]
    assert rows.words_N.tolist() == [1]


def test_a_text_that_came_here_incomplete_has_no_end(t5: T5Tokenizer) -> None:
    texts = ["the value", "the value", "", "the value of the list"]
    rows = from_texts(texts, t5, 6, complete=[True, False, False, True])
    assert rows.truncated_N.tolist() == [False, True, False, len(t5(texts[3])["input_ids"]) > 6]
    assert rows.words_N.tolist()[:3] == [3, 2, 1]
    assert [*rows.target(1), t5.eos_token_id] == rows.target(0).tolist()
    assert rows.fingerprint != from_texts(texts, t5, 6).fingerprint == from_texts(texts, t5, 6, [True] * 4).fingerprint


def test_unknown_subwords_are_counted_among_the_kept(t5: T5Tokenizer, byt5: ByT5Tokenizer) -> None:
    text = "☃ the ☃ value ☃"
    assert from_texts([text], t5, 100).unknown_N.tolist() == [3]
    assert from_texts([text], t5, 4).unknown_N.tolist() == [1]
    assert from_texts([text], byt5, 100).unknown_N.tolist() == [0]


def test_fast_ids_are_those_of_sentencepiece(spiece: Path, t5: T5Tokenizer) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    texts = sentences(50, seed=3)
    rows = from_texts(texts, t5, 1000)
    for index, text in enumerate(texts):
        assert rows[index].tolist() == [*model.encode(text), model.eos_id()]


def test_the_cache_equals_tokenising_in_memory(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_room, "ROWS_AT_ONCE", 32)  # several chunks, the last one not full
    texts = sentences(100)
    cached = tokenise(corpus(texts), "train", tokenizer, 16, tmp_path)
    direct = from_texts(texts, tokenizer, 16)
    assert len(cached) == 100
    assert cached.truncated_N.any()
    assert cached.target_tokens == cached.target_lengths_N.sum() == cached.lengths_N.sum() - cached.truncated_N.sum()
    assert cached.cut(np.array([99, 31, 32, 0])).tolist() == direct.truncated_N[[99, 31, 32, 0]].tolist()
    for field in ("lengths_N", "words_N", "unknown_N", "truncated_N"):
        assert np.array_equal(getattr(cached, field), getattr(direct, field)), field
    assert all(np.array_equal(cached[i], direct[i]) for i in range(100))
    some = np.array([99, 0, 31, 32, 33])
    assert np.array_equal(cached.flat(some), np.concatenate([direct[i] for i in some]))
    assert cached.text(57) == texts[57]
    with pytest.raises(IndexError):
        cached[100]


@pytest.mark.parametrize("count", [1, 40, 64, 100, 200])
def test_the_first_sentences(tmp_path: Path, byt5: ByT5Tokenizer, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_room, "ROWS_AT_ONCE", 32)
    texts = sentences(100)
    rows = tokenise(corpus(texts), "train", byt5, 16, tmp_path)
    first = rows.first(count)
    assert len(first) == len(first.words_N) == min(count, 100)
    assert all(np.array_equal(first[i], rows[i]) for i in range(len(first)))
    assert (first.fingerprint == rows.fingerprint) == (count >= 100)
    with pytest.raises(IndexError):
        first[len(first)]


def test_the_cache_is_hit(tmp_path: Path, t5: T5Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = sentences(50)
    once = tokenise(corpus(texts), "train", t5, 16, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    assert len(files) == 1  # no temporary file is left

    def never(*arguments: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens_room, "_write", never)
    again = tokenise(corpus(texts), "train", t5, 16, tmp_path)
    assert again.fingerprint == once.fingerprint
    assert np.array_equal(again[7], once[7])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()} == files
    # A tokenizer that was used with truncation and padding is still the same tokenizer.
    t5(["the", "the value"], truncation=True, max_length=3, padding=True)
    tokenise(corpus(texts), "train", t5, 16, tmp_path)


def test_the_cache_is_missed_by_what_changes_the_ids(
    tmp_path: Path, t5: T5Tokenizer, byt5: ByT5Tokenizer, spiece: Path
) -> None:
    texts = sentences(50)
    marks = {
        tokenise(corpus(texts), "train", t5, 16, tmp_path).fingerprint,
        tokenise(corpus(texts), "train", t5, 17, tmp_path).fingerprint,
        tokenise(corpus(texts), "train", byt5, 16, tmp_path).fingerprint,
        tokenise(corpus(texts, "another"), "train", t5, 16, tmp_path).fingerprint,
        tokenise(corpus(texts[:-1]), "train", t5, 16, tmp_path).fingerprint,
    }
    assert len(marks) == len(list((tmp_path / "tokens").iterdir())) == 5
    other = T5Tokenizer.from_pretrained(spiece)
    other.add_tokens(["returns"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(t5)


def test_an_export_of_a_tokenizer_hits_its_cache(tmp_path: Path, t5: T5Tokenizer) -> None:
    t5.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(T5Tokenizer.from_pretrained(tmp_path)) == tokenizer_fingerprint(t5)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 500])
def test_a_broken_cache_file_is_written_anew(tmp_path: Path, byt5: ByT5Tokenizer, damage) -> None:
    texts = sentences(50)
    whole = tokenise(corpus(texts), "train", byt5, 16, tmp_path)
    once = [whole[i].tolist() for i in range(50)]
    del whole
    (path,) = (tmp_path / "tokens").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again = tokenise(corpus(texts), "train", byt5, 16, tmp_path)
    assert [again[i].tolist() for i in range(50)] == once


def test_an_interrupted_run_leaves_no_cache_file(
    tmp_path: Path, byt5: ByT5Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_room, "ROWS_AT_ONCE", 10)
    rows, calls = tokens_room._rows, []

    def breaks(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return rows(*arguments)

    monkeypatch.setattr(tokens_room, "_rows", breaks)
    with pytest.raises(KeyboardInterrupt):
        tokenise(corpus(sentences(100)), "train", byt5, 16, tmp_path)
    assert not list((tmp_path / "tokens").glob("*.arrow"))


def test_ids_are_read_from_the_file_not_copied(tmp_path: Path, byt5: ByT5Tokenizer) -> None:
    rows = tokenise(corpus(sentences(50)), "train", byt5, 16, tmp_path)
    view = rows._view(0, 3)
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_what_cannot_be_tokenised(tmp_path: Path, byt5: ByT5Tokenizer) -> None:
    with pytest.raises(DataError, match=r"a/corpus has no split `valid`; it has train"):
        tokenise(corpus(["a"]), "valid", byt5, 16, tmp_path)
    endless = ByT5Tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sentence token"):
        from_texts(["a"], endless, 16)


def test_no_sentences_at_all(tmp_path: Path, t5: T5Tokenizer) -> None:
    assert len(tokenise(corpus([]), "train", t5, 16, tmp_path)) == 0
    assert len(from_texts([], t5, 16)) == 0


# The order of sentences


def test_an_epoch_has_each_sentence_at_most_once(lengths_N: np.ndarray) -> None:
    batches_SG = epoch_batches(lengths_N, 64, 4, 0, 0, 0)
    assert batches_SG.shape == (1003 // 64, 64)
    assert batches_SG.dtype == np.int64
    assert len(np.unique(batches_SG)) == batches_SG.size
    assert batches_SG.min() >= 0
    assert batches_SG.max() < 1003


def test_the_order_is_a_function_of_seed_phase_and_epoch(lengths_N: np.ndarray) -> None:
    def order(*key: int) -> bytes:
        return epoch_batches(lengths_N, 64, 4, *key).tobytes()

    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1)]
    np.random.seed(5)  # the global generators must not matter
    torch.manual_seed(5)
    assert [order(*key) for key in keys] == [order(*key) for key in keys]
    assert len({order(*key) for key in keys}) == len(keys)


def test_other_sentences_are_dropped_each_epoch(lengths_N: np.ndarray) -> None:
    seen = [set(epoch_batches(lengths_N, 64, 4, 0, 0, epoch).ravel().tolist()) for epoch in range(2)]
    assert seen[0] != seen[1]
    # Not the longest ones: buckets are made after the cut.
    dropped = np.array(sorted(set(range(1003)) - seen[0]))
    assert lengths_N[dropped].mean() < np.percentile(lengths_N, 80)


def padding(batches_SG: np.ndarray, lengths_N: np.ndarray) -> float:
    lengths_SG = lengths_N[batches_SG]
    return 1 - lengths_SG.sum() / (lengths_SG.max(axis=1).sum() * batches_SG.shape[1])


def test_buckets_save_padding_and_batches_come_in_mixed_order(lengths_N: np.ndarray) -> None:
    none, few, many = (padding(epoch_batches(lengths_N, 32, size, 0, 0, 0), lengths_N) for size in (1, 4, 32))
    assert many < few < none
    assert many < 0.1 < 0.3 < none
    means_S = lengths_N[epoch_batches(lengths_N, 32, 32, 0, 0, 0)].mean(axis=1)
    assert 0.2 < (np.diff(means_S) > 0).mean() < 0.8


def by_length(index: np.ndarray, lengths_N: np.ndarray, sign: int) -> list[int]:
    """Sorted by Python, whose sort keeps the order of equal lengths on each machine; numpy's default does not."""
    return sorted(index.tolist(), key=lambda sentence: sign * int(lengths_N[sentence]))


def test_an_epoch_is_a_permutation_sorted_within_its_chunks(lengths_N: np.ndarray) -> None:
    """Many sentences have the same length. An order of them that depends on the machine is another training run."""
    order = stream(3, "order", 1, 2).permutation(1003)[:960]
    chunks = [order[start : start + 4 * 64] for start in range(0, 960, 4 * 64)]
    expected = np.concatenate([by_length(chunk, lengths_N, 1) for chunk in chunks]).reshape(15, 64)
    found = epoch_batches(lengths_N, 64, 4, 3, 1, 2)
    assert sorted(found.tolist()) == sorted(expected.tolist())
    assert found.tolist() != expected.tolist()


def test_steps_of_an_epoch() -> None:
    assert steps_per_epoch(128, 64) == 2
    assert steps_per_epoch(127, 64) == 1
    with pytest.raises(DataError, match=r"batch\.global is 64 but the training split has only 63 sentences"):
        steps_per_epoch(63, 64)


# What a batch holds


@pytest.fixture(scope="module")
def rows(byt5: ByT5Tokenizer):
    return from_texts([*sentences(200), "", "a"], byt5, 64)


def test_a_batch_without_noise(rows) -> None:
    index_B = np.array([200, *np.flatnonzero((rows.lengths_N > 9) & (rows.lengths_N < 64))[:2]])
    batch = collate(rows, index_B, pad_id=0, latent_dim=5, seed=0, keys=(0,))
    longest = int(rows.lengths_N[index_B].max())
    assert batch.input_ids_BT.shape == batch.labels_BT.shape == batch.attention_mask_BT.shape == (3, longest)
    for row, index in enumerate(index_B):
        length = len(rows[index])
        assert (
            batch.input_ids_BT[row, :length].tolist() == batch.labels_BT[row, :length].tolist() == rows[index].tolist()
        )
        assert (batch.input_ids_BT[row, length:] == 0).all()
        assert (batch.labels_BT[row, length:] == -100).all()
        assert batch.attention_mask_BT[row].tolist() == [1] * length + [0] * (longest - length)
    assert batch.eps_BL.dtype == batch.weight_B.dtype == torch.float32
    assert batch.weight_B.tolist() == [1, 1, 1]
    assert batch.tokens == (batch.labels_BT != -100).sum()
    assert set(batch.arguments()) == {"input_ids_BT", "attention_mask_BT", "labels_BT", "eps_BL"}
    model_inputs = (batch.input_ids_BT, batch.attention_mask_BT, batch.labels_BT)
    assert {ids_BT.dtype for ids_BT in model_inputs} == {torch.int64}
    moved = batch.to("meta")
    assert moved.labels_BT.device.type == "meta"
    assert moved.tokens == batch.tokens


@pytest.mark.parametrize("denoise", [0.0, 0.4])
def test_a_cut_sentence_is_read_to_an_end_and_not_taught_one(rows, byt5: ByT5Tokenizer, denoise: float) -> None:
    """By the tokenizer itself: which texts are too long, and which tokens of them are left."""
    ids = [byt5(rows.text(index))["input_ids"] for index in range(len(rows))]
    cut, fits = ([index for index in range(len(ids)) if (len(ids[index]) > 64) == long] for long in (True, False))
    for chosen in (cut[:3], [cut[0], *fits[:2]], fits[:3]):
        batch = collate(rows, np.array(chosen), pad_id=0, latent_dim=1, seed=0, keys=(0,), denoise=denoise)
        targets = [ids[index][:63] if index in cut else ids[index] for index in chosen]
        kept = [labels_T[labels_T != -100].tolist() for labels_T in batch.labels_BT]
        assert kept == targets
        assert batch.labels_BT.shape == (3, max(map(len, targets)))  # 63 if all are cut
        assert batch.tokens == sum(map(len, targets))
        for row in range(3):
            read = batch.input_ids_BT[row][batch.attention_mask_BT[row].bool()].tolist()
            assert read[-1] == byt5.eos_token_id
            assert denoise or read[:-1] == [token for token in targets[row] if token != byt5.eos_token_id]
    weights = np.array([1, 0, 0], np.float32)
    assert collate(rows, np.array(cut[:3]), pad_id=0, latent_dim=1, seed=0, keys=(), weight_B=weights).tokens == 63


def test_eps_belongs_to_the_sentence(rows) -> None:
    def eps(index: list[int], seed: int = 0, keys: tuple[int, ...] = (1, 2), **more) -> list[bytes]:
        batch = collate(rows, np.array(index), pad_id=0, latent_dim=32, seed=seed, keys=keys, **more)
        return [row.numpy().tobytes() for row in batch.eps_BL]

    four = eps([5, 6, 7, 8])
    assert len(set(four)) == 4
    assert eps([8, 5]) == [four[3], four[0]]
    assert eps([6], denoise=0.9) == [four[1]]
    assert eps([6], keys=(np.int64(1), np.int64(2))) == [four[1]]
    others = [eps([6], seed=1), eps([6], keys=(1, 3)), eps([6], keys=(2, 1)), eps([6], keys=(1,)), eps([6], eval=True)]
    assert len({four[1], *(other[0] for other in others)}) == 6


def test_eps_is_standard_normal_and_uncorrelated(rows) -> None:
    draws = [collate(rows, np.arange(200), pad_id=0, latent_dim=32, seed=0, keys=(0, e)).eps_BL for e in range(10)]
    eps_NL = torch.cat(draws).double()
    assert abs(eps_NL.mean()) < 5 / math.sqrt(eps_NL.numel())
    assert abs(eps_NL.var() - 1) < 5 * math.sqrt(2 / eps_NL.numel())
    assert abs(eps_NL.pow(4).mean() - 3) < 0.3
    bound = 5 / math.sqrt(199 * 32 * 10)
    neighbours = torch.stack([(draw[1:].double() * draw[:-1].double()).mean() for draw in draws]).mean()
    assert abs(neighbours) < bound
    assert abs((draws[0].double() * draws[1].double()).mean()) < 5 / math.sqrt(200 * 32)


def test_eps_has_its_own_length(rows) -> None:
    def eps_BL(latent_dim: int, **more) -> torch.Tensor:
        return collate(rows, np.array([4, 9]), pad_id=0, latent_dim=latent_dim, seed=0, keys=(0,), **more).eps_BL

    assert eps_BL(7).shape == (2, 7)
    assert eps_BL(0).shape == (2, 0)
    # Each sentence's stream starts anew: its first numbers do not depend on what the one before it used.
    assert torch.equal(eps_BL(7)[:, :5], eps_BL(5))
    assert (eps_BL(7, sample=False) == 0).all()


@pytest.mark.parametrize("denoise", [0.15, 0.4])
def test_each_token_is_deleted_with_the_stated_probability(rows, denoise: float) -> None:
    index_B = np.arange(200)[rows.lengths_N[:200] > 20]
    kept = total = 0
    for epoch in range(10):
        batch = collate(rows, index_B, pad_id=0, latent_dim=1, seed=0, keys=(0, epoch), denoise=denoise)
        kept += int(batch.attention_mask_BT.sum()) - len(index_B)
        total += int(rows.lengths_N[index_B].sum()) - len(index_B)
    deviation = math.sqrt(denoise * (1 - denoise) / total)
    assert abs(1 - kept / total - denoise) < 5 * deviation


def test_deletion_keeps_order_end_and_mask(rows) -> None:
    index_B = np.arange(202)
    batch = collate(rows, index_B, pad_id=0, latent_dim=1, seed=3, keys=(0,), denoise=0.4)
    for row, index in enumerate(index_B):
        length = int(batch.attention_mask_BT[row].sum())
        assert batch.attention_mask_BT[row].tolist() == [1] * length + [0] * (batch.input_ids_BT.shape[1] - length)
        kept = batch.input_ids_BT[row, :length].tolist()
        assert kept[-1] == 1
        assert (batch.input_ids_BT[row, length:] == 0).all()
        remaining = iter(rows[index].tolist())
        assert all(token in remaining for token in kept)  # a subsequence
        assert batch.labels_BT[row][batch.labels_BT[row] != -100].tolist() == rows.target(int(index)).tolist()


def test_one_token_stays_and_it_is_any(byt5: ByT5Tokenizer) -> None:
    short = from_texts(["abcd"] * 400 + [""], byt5, 64)
    batch = collate(short, np.arange(401), pad_id=0, latent_dim=1, seed=0, keys=(0,), denoise=0.999)
    assert (batch.attention_mask_BT[:400].sum(dim=1) >= 2).all()
    assert batch.input_ids_BT[400].tolist() == [1] + [0] * (batch.input_ids_BT.shape[1] - 1)
    counts = torch.bincount(batch.input_ids_BT[:400, 0])
    assert (counts[short[0][:-1]] > 60).all()  # 100 each, give or take 5 deviations


def test_deletion_belongs_to_the_sentence_and_to_training(rows) -> None:
    def ids(index: list[int], keys: tuple[int, ...] = (0, 0), **more) -> list[list[int]]:
        batch = collate(rows, np.array(index), pad_id=0, latent_dim=3, seed=0, keys=keys, denoise=0.4, **more)
        return [
            row[mask.bool()].tolist() for row, mask in zip(batch.input_ids_BT, batch.attention_mask_BT, strict=True)
        ]

    assert ids([5, 6, 7]) == [*ids([5]), *ids([6]), *ids([7])]
    assert ids([5], keys=(0, 1)) != ids([5])
    assert ids([5], eval=True) == [rows[5].tolist()]
    # The same positions may not go in each sentence of like length.
    same = [index for index in range(200) if rows.lengths_N[index] == 64][:2]
    assert ids(same)[0] != ids(same)[1]


def test_world_and_cut_change_nothing_that_is_drawn(rows) -> None:
    index_G = epoch_batches(rows.lengths_N, 48, 4, 0, 1, 2)[0]

    def drawn(world: int, limits: Limits) -> dict[int, tuple[list[int], bytes]]:
        found = {}
        for rank in range(world):
            for index_B, _ in share(index_G, rows.lengths_N, rank, world, limits):
                batch = collate(rows, index_B, pad_id=0, latent_dim=8, seed=0, keys=(1, 2), denoise=0.15)
                for row, index in enumerate(batch.index_B.tolist()):
                    ids = batch.input_ids_BT[row][batch.attention_mask_BT[row].bool()].tolist()
                    found[index] = (ids, batch.eps_BL[row].numpy().tobytes())
        return found

    reference = drawn(1, Limits())
    assert len(reference) == 48
    for world, limits in [(1, Limits(4)), (2, Limits(7)), (3, Limits(16)), (5, Limits(3)), (2, Limits(None, 150))]:
        assert drawn(world, limits) == reference


def test_fillers_count_no_tokens(rows) -> None:
    batch = collate(
        rows,
        np.array([3, 4]),
        pad_id=0,
        latent_dim=1,
        seed=0,
        keys=(),
        eval=True,
        weight_B=np.array([1, 0], np.float32),
    )
    assert batch.weight_B.tolist() == [1, 0]
    narrow = np.array([3, 4], np.int32)
    other = collate(rows, narrow, pad_id=0, latent_dim=1, seed=0, keys=(), weight_B=np.ones(2))  # type: ignore[arg-type]
    assert (other.index_B.dtype, other.weight_B.dtype) == (torch.int64, torch.float32)
    assert batch.tokens == rows.target_lengths_N[3]
    nothing = collate(rows, np.array([], np.int64), pad_id=0, latent_dim=1, seed=0, keys=())
    assert nothing.labels_BT.shape == nothing.input_ids_BT.shape == (0, 0)


def test_the_numbers_drawn_stay_what_they_are(byt5: ByT5Tokenizer) -> None:
    """A run resumed on another machine or version goes on with the same draws."""
    three = from_texts(["abcdefgh"] * 3, byt5, 10)
    batch = collate(three, np.array([2]), pad_id=0, latent_dim=3, seed=0, keys=(0, 1), denoise=0.5)
    expected_BL = torch.tensor([[1.6015534, 1.6802435, -0.1302885]])
    torch.testing.assert_close(batch.eps_BL, expected_BL, rtol=1e-5, atol=1e-6)
    assert batch.input_ids_BT.tolist() == [[100, 102, 105, 106, 1]]
    evaluated = collate(three, np.array([2]), pad_id=0, latent_dim=3, seed=0, keys=(0, 1), eval=True)
    torch.testing.assert_close(evaluated.eps_BL, torch.tensor([[-1.4746, -1.3001, -0.5966]]), rtol=1e-3, atol=1e-3)
    assert epoch_batches(np.arange(8), 4, 1, 0, 0, 0).tolist() == [[1, 2, 3, 4], [0, 5, 6, 7]]


def test_collating_takes_about_a_millisecond(rows) -> None:
    def duration_s() -> float:
        start = time.process_time()
        collate(rows, np.arange(64), pad_id=0, latent_dim=32, seed=0, keys=(0, 0), denoise=0.15)
        return time.process_time() - start

    assert min(duration_s() for _ in range(20)) < 0.005
