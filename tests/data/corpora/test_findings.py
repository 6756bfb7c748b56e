"""Lines without text and bad lines: skipped and counted, or named in one message."""

import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vae_ds.config import DataConfig
from vae_ds.data import corpora
from vae_ds.data.corpora import delimited
from vae_ds.errors import DataError

pytestmark = pytest.mark.timeout(240)


def _folder(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir()
    for split in ("train.txt", "valid.txt", "test.txt"):
        (folder / split).write_text("0\tFine.\n", encoding="utf-8")
    (folder / "train.txt").unlink()
    (folder / name).write_bytes(content)
    return folder


def _data(folder: Path, **more) -> DataConfig:
    return DataConfig(corpus="text", path=str(folder), cache_dir=str(folder.parent / "cache"), **more)


BLANK = [
    ("train.txt", b"\none\n \n\ntwo\n\n", {}, [1, 3, 4, 6], "a line without text; remove it"),
    ("train.txt", b"\r\none\r\ntwo", {}, [1], "a line without text; remove it"),
    ("train.txt", b"0\tone\n1\t \n\n1\ttwo\n", {"labelled": True}, [2, 3], "no text after the label and the tab"),
    ("train.csv", b"\nl,text\n1,one\n\n1, \n1,two\n", {}, [1, 4, 5], "a line without text; remove it"),
    ("train.csv", b"l,text\n1,one\n1, \n\n1,two\n", {}, [3, 4], "no text in `text`; remove the row"),
    ("train.tsv", b"l\ttext\n\n1\tone\n1\t \n1\ttwo\n", {}, [2, 4], "a line without text; remove it"),
    (
        "train.jsonl",
        b'{"text": "one"}\n{"text": ""}\n\n{"text": null}\n{"text": "two"}\n',
        {},
        [2, 3, 4],
        "no text in `text`; remove the row",
    ),
]


@pytest.mark.parametrize(("name", "content", "more", "numbers", "reason"), BLANK)
def test_blank_lines_are_skipped_and_counted(tmp_path, caplog, name, content, more, numbers, reason):
    data = _data(_folder(tmp_path / "text", name, content), **more)
    corpora.check(data)
    assert not caplog.records
    for _ in range(2):  # read, then from the cache
        caplog.clear()
        corpus = corpora.load(data)
        assert corpus.splits["train"]["text"][:] == ["one", "two"]
        assert corpus.facts == {"blank_lines": {"train": len(numbers), "valid": 0, "test": 0}}
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert f"{name}: lines without text: {len(numbers)} skipped (the first is line {numbers[0]})" in caplog.text


@pytest.mark.parametrize(("name", "content", "more", "numbers", "reason"), BLANK)
@pytest.mark.parametrize("cached", [False, True])
def test_blank_lines_can_be_errors(tmp_path, name, content, more, numbers, reason, cached):
    folder = _folder(tmp_path / "text", name, content)
    strict = _data(folder, blank_lines="error", **more)
    if cached:  # with `skip`: the cache must not hide the blank lines
        corpora.load(_data(folder, **more))
        reason = "a line without text"
    listed = f"; {len(numbers)} bad lines in all: {', '.join(map(str, numbers))}" if len(numbers) > 1 else ""
    for act in (corpora.check, corpora.load):
        with pytest.raises(DataError) as raised:
            act(strict)
        message = str(raised.value)
        assert re.search(rf"{name}:{numbers[0]}: {reason}.* set data\.blank_lines to skip{re.escape(listed)}$", message)
        assert "\n" not in message


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_all_bad_lines_are_named_in_one_message(tmp_path, suffix):
    good, bad = {
        ".txt": (b"fine\n", b"b\xffd\n"),
        ".csv": (b"1,fine\n", b"1,fine,more\n"),
        ".jsonl": (b'{"text": "fine"}\n', b'{"said": "fine"}\n'),
    }[suffix]
    head = b"n,text\n" if suffix == ".csv" else good
    content = head + b"".join(bad + good for _ in range(12))
    data = _data(_folder(tmp_path / "text", f"train{suffix}", content))
    listed = "; 12 bad lines in all: 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, ..."
    for act in (corpora.check, corpora.load):
        with pytest.raises(DataError, match=rf"train{suffix}:2: (not UTF-8 at byte 2|3 fields|no column).*") as raised:
            act(data)
        assert str(raised.value).endswith(listed)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_line_with_two_errors_counts_once(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "\xff\n')
    with pytest.raises(DataError, match=r"train\.jsonl:1: not UTF-8 at byte 11 of the line; convert the file$"):
        list(delimited.read(path, DataConfig(), delimited.Findings()))


def test_rows_of_parquet_without_text(tmp_path):
    folder = _folder(tmp_path / "text", "train.txt", b"x\n")
    (folder / "train.txt").unlink()
    pq.write_table(pa.table({"text": ["one", None, " ", "two"]}), folder / "train.parquet")
    corpus = corpora.load(_data(folder))
    assert corpus.splits["train"]["text"][:] == ["one", "two"]
    assert corpus.facts["blank_lines"]["train"] == 2
    with pytest.raises(DataError, match=r"train\.parquet:2: .*2 bad lines in all: 2, 3$"):
        corpora.load(_data(folder, blank_lines="error"))


def test_rows_of_a_data_set_without_text(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        texts = ["one", None, "two", *([""] * 12)] if split == "train" else ["one"]
        pq.write_table(pa.table({"text": texts}), tmp_path / "data" / f"{split}.parquet")
    data = DataConfig(corpus="dataset", path=str(tmp_path / "data"), blank_lines="error")
    with pytest.raises(DataError, match=r"13 of 15 rows of train have no text: 2, 4, 5, .*, 12, \.\.\.; set data\.bla"):
        corpora.load(data)
