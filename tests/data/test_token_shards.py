"""Token ids by shard: what is interrupted goes on, memory stays flat, and what is cut is said."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from support import tiny
from vae_ds.config import DataConfig
from vae_ds.data import corpora, tokens
from vae_ds.errors import DataError
from vae_ds.model import bases

pytestmark = pytest.mark.timeout(240)

# Tokenises 1,000 sentences in shards of 200, and is killed by its own hand in the third.
KILLED = """
import os, signal, sys
from vae_ds.config import DataConfig
from vae_ds.data import corpora, tokens
from vae_ds.model import bases
tokens.SHARD_ROWS, tokens.ROWS_AT_ONCE = 200, 50
rows, calls = tokens._rows, []
def dies(*arguments):
    calls.append(1)
    if len(calls) == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows(*arguments)
tokens._rows = dies
corpus = corpora.load(DataConfig(corpus="text", path=sys.argv[1], cache_dir=sys.argv[2]))
tokens.tokenise(corpus, "train", bases.load_tokenizer(sys.argv[3]), 16, sys.argv[2])
"""
# Tokenises every sentence of a large file, and tells its own memory (not what it maps of files) in MiB: at first, when
# a small split is done and all that is loaded once is loaded, and at most.
MEASURED = """
import json, re, sys
from pathlib import Path
from vae_ds.config import DataConfig
from vae_ds.data import corpora, epoch_batches, tokens
from vae_ds.model import bases
tokens.SHARD_ROWS, tokens.ROWS_AT_ONCE = 20_000, 1_000
found = []
def measure():
    found.append(int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
rows = tokens._rows
def measured(*arguments):
    made = rows(*arguments)
    measure()
    return made
tokens._rows = measured
tokenizer = bases.load_tokenizer(sys.argv[3])
corpus = corpora.load(DataConfig(corpus="text", path=sys.argv[1], cache_dir=sys.argv[2]))
tokens.tokenise(corpus, "valid", tokenizer, 16, sys.argv[2])
measure()
first = found[-1]
made = tokens.tokenise(corpus, "train", tokenizer, 16, sys.argv[2])
measure()
print(json.dumps({"sentences": len(made), "first": first, "most": max(found), "last": found[-1]}))
"""


def _run(code: str, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=100, env=environment
    )


def _corpus(folder: Path, cache: Path) -> corpora.Corpus:
    return corpora.load(DataConfig(corpus="text", path=str(folder), cache_dir=str(cache)))


def test_a_killed_tokenisation_goes_on_after_its_last_whole_shard(tmp_path, monkeypatch):
    cache, base = tmp_path / "cache", tiny.base()
    lines = [f"{sentence} {n}" for n, sentence in enumerate(tiny.ENGLISH * 3)][:1000]
    folder = tiny.write_splits(tmp_path / "text", lines, lines[:5], lines[:5])
    killed = _run(KILLED, folder, cache, base)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = {path: path.stat().st_mtime_ns for path in (cache / "tokens").glob("[!.]*.arrow")}
    assert sorted(path.name[-20:] for path in whole) == ["00000-of-00005.arrow", "00001-of-00005.arrow"]
    assert len(list((cache / "tokens").glob(".*"))) == 1  # what the killed process had begun

    monkeypatch.setattr(tokens, "SHARD_ROWS", 200)
    monkeypatch.setattr(tokens, "ROWS_AT_ONCE", 50)
    rows, seen = tokens._rows, []
    monkeypatch.setattr(tokens, "_rows", lambda texts, *more: (seen.extend(texts), rows(texts, *more))[1])
    tokenizer = bases.load_tokenizer(base)
    made = tokens.tokenise(_corpus(folder, cache), "train", tokenizer, 16, cache)
    assert seen == lines[400:]
    files = sorted((cache / "tokens").iterdir())
    assert len(files) == 5
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    direct = tokens.from_texts(lines, tokenizer, 16)
    everything = np.arange(1000)
    assert np.array_equal(made.flat(everything), direct.flat(everything))
    assert np.array_equal(made.lengths_N, direct.lengths_N)
    assert np.array_equal(made.truncated_N, direct.truncated_N)
    assert made.first(450).lengths_N.tolist() == direct.lengths_N[:450].tolist()

    del made
    files[3].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-40])
    seen.clear()
    again = tokens.tokenise(_corpus(folder, cache), "train", tokenizer, 16, cache)
    assert seen == lines[200:400] + lines[600:800]  # the two that are lost, and no other
    assert np.array_equal(again.flat(everything), direct.flat(everything))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Held as Python objects, the rows of this split take 12 MiB, which this test would see."""
    short = [f"the old farmer {n}" for n in range(40_000)]
    folder = tiny.write_splits(tmp_path / "text", short, short[:2000], short[:5])
    done = _run(MEASURED, folder, tmp_path / "cache", tiny.base())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sentences"] == 40_000
    mib_of_lengths = 2 * 4 * 40_000 / 2**20  # twice while they are put together
    assert found["most"] - found["first"] < mib_of_lengths + 8, found


def test_what_is_cut_is_said(tmp_path, caplog):
    corpus = corpora.Corpus("three", "mark", {"train": Dataset.from_dict({"text": ["a", "a " * 50, "b"]})})
    tokenizer = bases.load_tokenizer(tiny.base())
    for _ in range(2):  # written, then from the cache
        caplog.clear()
        tokens.tokenise(corpus, "train", tokenizer, 16, tmp_path)
        assert "three, train: 1 of 3 sentences (33.33 %) are longer than data.max_tokens 16 and were cut" in caplog.text
    caplog.clear()
    tokens.tokenise(corpus, "train", tokenizer, 200, tmp_path)
    assert "were cut" not in caplog.text


def test_many_unknown_subwords_are_a_warning(tmp_path, caplog):
    tokenizer = bases.load_tokenizer(tiny.base())
    texts = {"train": ["a", "b"], "valid": ["a", "\u4e00\u4e01 \u4e02"], "test": [*(["a"] * 500), "\u4e00"]}
    splits = {split: Dataset.from_dict({"text": rows}) for split, rows in texts.items()}
    corpus = corpora.Corpus("chinese", "mark", splits)
    for split in splits:
        found = tokens.tokenise(corpus, split, tokenizer, 16, tmp_path)
        assert found.unknown == found.unknown_N.sum()
        assert found.truncated == found.truncated_N.sum()
        assert (found.unknown > 0) == (split != "train")
    (line,) = [record.getMessage() for record in caplog.records if "unknown" in record.getMessage()]
    direct = tokens.from_texts(texts["valid"], tokenizer, 16)
    unknown, subwords = int(direct.unknown_N.sum()), int(direct.lengths_N.sum())
    share = f"{100 * unknown / subwords:.1f} % of the subwords ({unknown} of {subwords}) are unknown to the tokenizer"
    assert line.startswith(f"chinese, valid: {share}")
    assert "choose a model.base whose tokenizer covers this text, such as google/mt5-small or google/byt5-small" in line


def test_a_cache_that_cannot_be_written_is_a_data_error(tmp_path):
    (tmp_path / "file").write_text("")
    corpus = corpora.Corpus("one", "mark", {"train": Dataset.from_dict({"text": ["a"]})})
    with pytest.raises(DataError, match=r"cannot write the cache \(Not a directory\); set data\.cache_dir"):
        tokens.tokenise(corpus, "train", bases.load_tokenizer(tiny.base()), 16, tmp_path / "file")
