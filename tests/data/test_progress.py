"""Long tasks show their progress: lines on a plain standard error, nothing for short tasks and other ranks."""

import gzip
import itertools
import re
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from support import tiny
from vae_ds.config import DataConfig
from vae_ds.data import corpora, progress, tokens
from vae_ds.data.cache import hash_file
from vae_ds.data.corpora import docstrings, sources, wordnet
from vae_ds.model import bases

pytestmark = pytest.mark.timeout(240)


class Clock:
    """A clock that moves by one second each time it is read."""

    def __init__(self) -> None:
        seconds = itertools.count()
        self.monotonic = lambda: float(next(seconds))


@pytest.fixture
def slow(monkeypatch):
    """Everything takes seconds."""
    monkeypatch.setattr(progress, "time", Clock())


def _lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.usefixtures("slow")
def test_lines_come_now_and_then(capsys):
    assert list(progress.progress(range(40), "Counting", 40, "numbers")) == list(range(40))
    lines = _lines(capsys)
    assert lines[0].startswith("Counting: 3 of 40 numbers (8 %), ")
    assert 2 <= len(lines) <= 4
    with progress.Progress("Reading x", 4_000_000, "B") as shown:
        for _ in range(4):
            shown.add(1_000_000)
    assert _lines(capsys)[0].startswith("Reading x: 3 of 4 MB (75 %), ")
    with progress.Progress("Reading y", unit="lines") as shown:
        for done in range(5):
            shown.reach(done * 1000)
    assert _lines(capsys)[0].startswith("Reading y: 2,000 lines, ")


def test_short_tasks_show_nothing(capsys):
    list(progress.progress(range(1000), "Counting", 1000))
    with progress.waiting("Waiting"):
        pass
    assert _lines(capsys) == []


@pytest.mark.usefixtures("slow")
def test_other_ranks_show_nothing(capsys, monkeypatch):
    # A training in the same process leaves its group behind.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "1")
    list(progress.progress(range(40), "Counting", 40))
    assert _lines(capsys) == []


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    list(progress.progress(range(40), "Counting", 40, "numbers"))
    assert capsys.readouterr().err == ""  # a short task
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    list(progress.progress(range(40), "Counting", 40, "numbers"))
    shown = capsys.readouterr().err
    assert re.search(r"Counting: +0%\|.* 0/40 ", shown)
    assert "\n" not in shown


def test_what_cannot_be_counted_shows_its_time(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_S", 0.01)
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    with progress.waiting("Waiting"):
        time.sleep(0.2)
    assert _lines(capsys)[0].startswith("Waiting: 0 s")


@pytest.mark.usefixtures("slow")
def test_the_long_tasks_of_this_package_do_it(tmp_path, capsys, monkeypatch):
    """Each task, with the words that its first line begins with."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [f"Line {number} is here.\n" for number in range(200_000)]
    (folder / "train.txt").write_text("".join(lines))
    (folder / "valid.txt.gz").write_bytes(gzip.compress("".join(lines).encode()))
    pq.write_table(pa.table({"text": lines}), folder / "test.parquet")
    corpora.load(DataConfig(corpus="text", path=str(folder), cache_dir=str(tmp_path / "cache")))
    shown = capsys.readouterr().err
    for name in ("train.txt", "valid.txt.gz", "test.parquet"):
        assert f"Reading {name}: " in shown

    hash_file(_large(tmp_path / "large"))
    assert "Hashing large: " in capsys.readouterr().err

    split = {"valid": 5, "test": 5}
    data = DataConfig(corpus="text", train=str(folder / "train.txt"), split=split, cache_dir=str(tmp_path / "cache"))
    corpora.load(data)
    assert "Drawing valid and test from " in capsys.readouterr().err

    corpora.load(DataConfig(corpus="grammar", sentences={"train": 100}, cache_dir=str(tmp_path / "cache")))
    assert "Drawing train from the grammar: " in capsys.readouterr().err

    monkeypatch.setattr(tokens, "ROWS_AT_ONCE", 10)
    corpus = corpora.Corpus("some", "mark", {"train": Dataset.from_dict({"text": lines[:100]})})
    tokens.tokenise(corpus, "train", bases.load_tokenizer(tiny.base()), 16, tmp_path / "cache")
    assert "Tokenising train: 30 of 100 sentences" in capsys.readouterr().err

    monkeypatch.setattr(sources, "installed_sources", lambda: [sources._distribution("click")])
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    docstrings.prepared(data, "sentences", docstrings._sentences_of, docstrings._sentences)
    assert "Extracting sentences from docstrings: " in capsys.readouterr().err

    monkeypatch.setattr(wordnet, "read_glosses", lambda *_: [f"a thing {number}" for number in range(50)])
    wordnet._prepare({"noun": tmp_path}, False, tmp_path / "wordnet")
    assert "Reading WordNet: " in capsys.readouterr().err


def _large(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(1 << 26)
    return path
