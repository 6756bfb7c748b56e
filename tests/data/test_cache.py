"""The keys of the cache: they follow the code and the files, and cost no more reading than needed."""

import os
import time

import pytest
import torch

from vae_ds.config import DataConfig
from vae_ds.data import cache, corpora
from vae_ds.data.cache import code_digest, digest, noted_hash
from vae_ds.data.corpora import delimited, docstrings, wordnet

CODE = '''"""What it does."""

LIMIT = 3
"""A limit."""


class Thing:
    """A thing."""

    def act(self):
        """Acts."""
        # Without a reason.
        return "value"
'''


def test_code_is_hashed_without_docstrings(tmp_path):
    path = tmp_path / "module.py"

    def of(code: str) -> str:
        path.write_text(code, encoding="utf-8")
        return code_digest([path])

    first = of(CODE)
    for old in ("What it does.", "A limit.", "A thing.", "Acts.", "# Without a reason."):
        assert old in CODE
        assert of(CODE.replace(old, "# Other words.")) == first
    assert of(CODE.replace('    """A thing."""\n', "")) == first
    assert of(CODE.replace('"value"', '"other"')) != first
    assert of(CODE.replace("3", "4")) != first


@pytest.mark.parametrize("module", [docstrings, wordnet])
def test_corpora_made_by_code_use_this_hash(module, monkeypatch, tmp_path):
    """A change of the code makes another corpus, a change of a docstring does not."""
    hashed = []

    def spy(paths):
        hashed.extend(map(str, paths))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "code_digest", spy)
    monkeypatch.setattr(wordnet, "find", lambda _: {})
    with pytest.raises(KeyboardInterrupt):
        module.load(DataConfig(cache_dir=str(tmp_path)))
    assert module.__file__ in hashed
    assert any(path.endswith("splits.py") for path in hashed)


def test_a_large_file_is_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_NOTED_BYTES", 4)
    read = []
    whole = cache.hash_file
    monkeypatch.setattr(cache, "hash_file", lambda path: (read.append(path), whole(path))[1])
    path, notes = tmp_path / "file", tmp_path / "notes"

    def changed(content: bytes, age_s: float) -> str:
        path.write_bytes(content)
        os.utime(path, (time.time() - age_s,) * 2)
        read.clear()
        return noted_hash(path, notes)

    monkeypatch.setattr(cache, "_SETTLED_S", -1.0)
    first = changed(b"one is here", 100)
    assert noted_hash(path, notes) == first == whole(path)
    assert len(read) == 1
    assert changed(b"two is here", 100) != first  # of the same size and age
    assert len(read) == 1
    monkeypatch.setattr(cache, "_SETTLED_S", 60.0)
    changed(b"six is here", 100)  # a moment ago: it may change again within the resolution of its times
    noted_hash(path, notes)
    assert len(read) == 2
    small = tmp_path / "small"
    small.write_bytes(b"abc")
    assert noted_hash(small, notes) == noted_hash(small, notes) == whole(small)


def test_a_text_is_parsed_once_for_check_and_load(tmp_path, monkeypatch):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(f"The {split} split.\n")
    data = DataConfig(corpus="text", path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    parsed = []
    parse = delimited.parse
    monkeypatch.setattr(
        delimited, "parse", lambda *more, **named: (parsed.append(more[1].name), parse(*more, **named))[1]
    )
    # A training in the same process leaves its group behind.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "1")
    corpora.check(data)
    assert len(parsed) == 3
    assert not (tmp_path / "cache").exists()  # only rank 0 writes
    monkeypatch.setenv("RANK", "0")
    for act in (corpora.check, corpora.load, corpora.check):
        act(data)
    monkeypatch.setenv("RANK", "1")
    corpora.check(data)
    corpora.load(data)
    assert len(parsed) == 6


def test_digests_tell_lists_apart():
    lists = [["ab", "c"], ["a", "bc"], ["abc"], ["", "abc"], ["0.84"]]
    assert len({digest(parts) for parts in lists}) == len(lists)
