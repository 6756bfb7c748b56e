"""Labels stay beside their sentences, from every format, through blank lines and drawn splits, and move no text."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from vae_ds.config import SPLITS, DataConfig
from vae_ds.data import corpora
from vae_ds.data.corpora import holdout
from vae_ds.errors import DataError

ROWS = [("good", "One is here."), ("bad", "Two is here."), (None, "Three is here."), ("good", "Four is here.")]


def _write(path: Path) -> Path:
    """The rows, with a row without text in the middle."""
    rows = [*ROWS[:2], ("bad", None), *ROWS[2:]]
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"mood": label, "text": text}) + "\n" for label, text in rows))
    elif path.suffix == ".parquet":
        labels, texts = zip(*rows, strict=True)
        pq.write_table(pa.table({"mood": labels, "text": texts}), path)
    else:
        comma = "," if path.suffix == ".csv" else "\t"
        head = [] if path.suffix == ".txt" else [f"mood{comma}text"]
        lines = [*head, *(f"{label or ''}{comma}{text or ''}" for label, text in rows)]
        path.write_text("\n".join([*lines, ""]))
    return path


def _data(folder: Path, suffix: str, **more) -> DataConfig:
    named = {"labelled": True} if suffix == ".txt" else {"label_column": "mood"}
    return DataConfig(corpus="text", path=str(folder), cache_dir=str(folder.parent / "cache"), **(named | more))


def _pairs(rows: datasets.Dataset) -> list[tuple[str | None, str]]:
    return list(zip(corpora.labels_of(rows), rows["text"][:], strict=True))


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_label_stays_with_its_sentence(tmp_path: Path, suffix: str) -> None:
    for split in SPLITS:
        _write(tmp_path / "text" / f"{split}{suffix}")
    if suffix != ".txt":  # a cache without labels is no cache with them
        plain = corpora.load(_data(tmp_path / "text", suffix, label_column=None))
        assert plain.splits["train"].column_names == ["text"]
    for _ in range(2):  # read, then from the cache
        corpus = corpora.load(_data(tmp_path / "text", suffix))
        assert [_pairs(rows) for rows in corpus.splits.values()] == [ROWS] * 3
    if suffix != ".txt":  # the tokens of the cache stay valid
        assert corpus.fingerprint == plain.fingerprint
    file = tmp_path / "text" / f"train{suffix}"
    found = corpora.read_file(file, "text", None if suffix == ".txt" else "mood", suffix == ".txt")
    assert [(label, text) for text, label in found] == ROWS


def test_drawn_splits_keep_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdout, "_ROWS_AT_ONCE", 7)
    (tmp_path / "all.csv").write_text("n,text\n" + "".join(f"{row % 3},This is row {row}.\n" for row in range(60)))
    data = DataConfig(
        corpus="text",
        path=str(tmp_path / "all.csv"),
        split={"valid": 9, "test": 11},
        label_column="n",
        cache_dir=str(tmp_path / "cache"),
    )
    found = [pair for rows in corpora.load(data).splits.values() for pair in _pairs(rows)]
    assert len(found) == 60
    assert all(int(text.split()[-1][:-1]) % 3 == int(label) for label, text in found)
    plain = corpora.load(data.model_copy(update={"label_column": None}))
    assert plain.splits["test"]["text"][:] == corpora.load(data).splits["test"]["text"][:]


def test_names_of_a_data_set_are_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    kind = datasets.Features({"label": datasets.Value("string"), "mood": datasets.ClassLabel(names=["bad", "good"])})
    rows = {"label": [text for _, text in ROWS], "mood": [1, 0, -1, 1]}  # the text is in a column `label`
    table = datasets.Dataset.from_dict(rows, features=kind)
    datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), table)).save_to_disk(str(tmp_path / "saved"))
    data = DataConfig(corpus="dataset", path=str(tmp_path / "saved"), column="label", label_column="mood")
    corpora.check(data)
    corpus = corpora.load(data)
    assert _pairs(corpus.splits["valid"]) == ROWS
    plain = corpora.load(data.model_copy(update={"label_column": None}))
    assert (plain.fingerprint, plain.splits["train"].column_names) == (corpus.fingerprint, ["text"])
    wrong = data.model_copy(update={"label_column": "stars"})
    for act in (corpora.check, corpora.load):
        with pytest.raises(DataError, match=r"no column `stars` in train; found: .*; set data\.label_column$"):
            act(wrong)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.txt", b"One.\n", r"train\.txt: has no columns; remove data\.label_column, or set data\.labelled"),
        ("train.csv", b"text\nOne.\n", r"train\.csv:1: no column `mood`; found: text; set data\.label_column"),
        ("train.jsonl", b'{"text": "a"}\n', r"train\.jsonl:1: no column `mood`; found: text; set data\.label_column"),
        ("train.jsonl", b'{"text": "a", "mood": [1]}\n', r"jsonl:1: `mood` holds list, not a label"),
    ],
)
def test_a_wrong_label_column_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(corpora.read_file(tmp_path / name, "text", "mood", False))
    with pytest.raises(ValidationError, match="corpus `grammar` has no label column"):
        DataConfig(corpus="grammar", label_column="mood")
