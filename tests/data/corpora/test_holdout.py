"""Valid and test drawn from one file: exact numbers, the same on every machine, no sentence in two splits."""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from vae_ds.config import DataConfig
from vae_ds.data import corpora
from vae_ds.data.corpora import holdout
from vae_ds.errors import DataError

pytestmark = pytest.mark.timeout(240)

LINES = [f"This is sentence {number}." for number in range(500)]
# Written down: models are trained on these splits.
DRAWN = {
    "valid": ["This is sentence 226.", "This is sentence 186."],
    "test": ["This is sentence 62.", "This is sentence 232."],
}


def _file(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _load(folder: Path, split: dict, cache: str = "cache", **more) -> dict[str, list[str]]:
    source = {} if "train" in more else {"path": str(folder / "all.txt")}
    data = DataConfig(corpus="text", split=split, cache_dir=str(folder / cache), **source, **more)
    corpora.check(data)
    return {name: rows["text"][:] for name, rows in corpora.load(data).splits.items()}


def test_each_sentence_is_in_one_split(tmp_path, monkeypatch):
    _file(tmp_path / "all.txt", LINES)
    found = _load(tmp_path, {"valid": 20, "test": 30})
    assert {name: len(rows) for name, rows in found.items()} == {"train": 450, "valid": 20, "test": 30}
    assert sorted(chain(*found.values())) == sorted(LINES)
    assert found["train"] == [line for line in LINES if line in set(found["train"])]  # in file order
    # The first rows of valid are a random sample, not the beginning of the file.
    places = [LINES.index(line) for line in found["valid"]]
    assert places != sorted(places)
    assert max(places) > 250 > min(places)
    assert _load(tmp_path, {"valid": 20, "test": 30}) == found  # from the cache
    monkeypatch.setattr(holdout, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(holdout, "_KEYS_AT_ONCE", 11)
    assert _load(tmp_path, {"valid": 20, "test": 30}, cache="other") == found
    assert _load(tmp_path, {"valid": 20, "test": 30, "seed": 1})["test"] != found["test"]
    assert _load(tmp_path, {"valid": 0.04, "test": 0.06}) == found


def test_the_draw_never_moves(tmp_path):
    _file(tmp_path / "all.txt", LINES)
    found = _load(tmp_path, {"valid": 2, "test": 2})
    assert {name: found[name] for name in ("valid", "test")} == DRAWN


def test_equal_sentences_are_in_one_split(tmp_path):
    pairs = [line for number in range(100) for line in (f"This is pair {number}.", f"this is  PAIR {number}.")]
    common = ["This is common."] * 300
    _file(tmp_path / "all.txt", [*pairs, *common])
    found = _load(tmp_path, {"valid": 20, "test": 20})
    assert {name: len(rows) for name, rows in found.items()} == {"train": 460, "valid": 20, "test": 20}
    sets = [{" ".join(line.lower().split()) for line in rows} for rows in found.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 101
    assert Counter(found["train"])["This is common."] == 300  # too many for valid and test


@pytest.mark.parametrize("seed", range(5))
def test_a_choice_does_not_depend_on_how_much_is_looked_at(seed):
    keys = np.random.default_rng(seed).integers(0, 1 << 64, 300, np.uint64)
    keys[100:200] = keys[:100]
    wanted = {"test": 31, "valid": 17}
    found = holdout.choose(keys, wanted)
    rows = np.argsort(keys, kind="stable")
    places = holdout._fill(keys[rows], wanted)
    assert {part: rows[own].tolist() for part, own in places.items()} == {k: v.tolist() for k, v in found.items()}
    assert {part: len(own) for part, own in found.items()} == wanted


def test_a_file_that_is_too_small_is_an_error(tmp_path):
    _file(tmp_path / "all.txt", LINES[:50])
    with pytest.raises(
        DataError, match=r"all\.txt: 50 sentences are too few .* valid 20 and test 30, and at least one"
    ):
        _load(tmp_path, {"valid": 20, "test": 30})
    with pytest.raises(DataError, match=r"all\.txt: 50 sentences are too few .* valid 2000 and test 2000"):
        _load(tmp_path, {})
    _file(tmp_path / "all.txt", ["One."] * 50)
    with pytest.raises(DataError, match=r"50 sentences are too few .*; equal sentences are not divided"):
        _load(tmp_path, {"valid": 3, "test": 3})
    assert not list((tmp_path / "cache").rglob("train.arrow"))


def test_the_file_may_be_in_a_directory_or_of_a_pattern(tmp_path):
    folder = tmp_path / "text"
    _file(folder / "a.txt", LINES)
    (folder / "README").write_text("Read me.\n")
    data = DataConfig(corpus="text", path=str(folder), split={"valid": 2, "test": 3}, cache_dir=str(tmp_path / "cache"))
    first = corpora.load(data)
    assert {split: len(rows) for split, rows in first.splits.items()} == {"train": 495, "valid": 2, "test": 3}
    pq.write_table(pa.table({"text": LINES[:9]}), folder / "b.parquet")
    with pytest.raises(DataError, match=r"2 text files \(a\.txt, b\.parquet\); data\.split needs one file"):
        corpora.check(data)
    found = _load(tmp_path, {"valid": 5, "test": 5}, train=f"{folder}/*.*")
    assert sorted(chain(*found.values())) == sorted([*LINES, *LINES[:9]])
    (folder / "a.txt").unlink()
    (folder / "b.parquet").unlink()
    with pytest.raises(DataError, match=r"text: 0 text files; data\.split needs one file"):
        corpora.check(data)


def test_the_fingerprint_follows_the_draw(tmp_path):
    _file(tmp_path / "all.txt", ["One.", "", *LINES])
    made = [
        corpora.load(DataConfig(corpus="text", path=str(tmp_path / "all.txt"), cache_dir=str(tmp_path / "c"), **more))
        for more in (
            {"split": {"valid": 3, "test": 3}},
            {"split": {"valid": 3, "test": 3, "seed": 1}},
            {"split": {"valid": 3, "test": 4}},
            {"split": {"valid": 3, "test": 3}, "limit": 2},
        )
    ]
    assert len({corpus.fingerprint for corpus in made}) == 4
    assert [len(rows) for rows in made[-1].splits.values()] == [2, 2, 2]
    assert made[0].facts == {"blank_lines": {"all": 1}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"corpus": "dataset", "path": "x", "split": {}}, "`split` draws from a file of corpus `text`, not `dataset`"),
        ({"corpus": "text", "path": "x", "split": {}, "valid": "y"}, "remove `valid` and `test`, or `split`"),
        ({"corpus": "text", "path": "x", "split": {}, "streaming": True}, "`split` reads the whole file"),
        ({"corpus": "text", "path": "x", "split": {"valid": 1.5}}, "integers, or fractions with a sum below 1"),
        ({"corpus": "text", "path": "x", "split": {"valid": 0.5, "test": 0.5}}, "fractions with a sum below 1"),
        ({"corpus": "text", "train": "x"}, "or `train` and `split`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        DataConfig(**settings)
    DataConfig(corpus="text", train="x", split={})


def test_without_a_split_one_file_is_refused_with_advice(tmp_path):
    path = _file(tmp_path / "all.txt", LINES)
    with pytest.raises(
        DataError, match=r"all\.txt: is a file; data\.path is a directory .* for one file, set data\.spl"
    ):
        corpora.check(DataConfig(corpus="text", path=str(path)))
