"""Corpora: the splits hold, the prose filter keeps prose, each bad input gives one line that says where and what."""

import json
import socket
import time
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from vae_ds.config import DataConfig
from vae_ds.data import corpora
from vae_ds.data.corpora import dataset, docstrings, prose, sources
from vae_ds.data.corpora.splits import near_key, split_of
from vae_ds.errors import DataError, UserError
from vae_ds.model import bases
from vae_ds.pretraining import paragraphs

pytestmark = pytest.mark.timeout(240)

SPLITS = ("train", "valid", "test")


# --- splits ---------------------------------------------------------------------------------------------------------


def test_near_duplicates_share_a_split():
    same = [
        "Return the 3 values, in order.",
        "return the 12 values in order!",
        'Returns the "3"  value in   order.',
        "Return a 7 value in order",
    ]
    assert len({near_key(text) for text in same}) == 1
    assert len({split_of(text) for text in same}) == 1
    assert near_key("Return the class.") != near_key("Return the clas.")
    assert near_key("Return the first.") != near_key("Return the second.")


def test_splits_are_about_90_5_5_and_never_move():
    drawn = [split_of(f"sentence {word}") for word in map(chr, range(0x4E00, 0x4E00 + 10_000))]
    assert drawn.count("valid") == pytest.approx(500, abs=90)
    assert drawn.count("test") == pytest.approx(500, abs=90)
    # Written down: models were trained on these splits.
    words = ["apple", "pear", "plum", "fig", "kiwi", "lime", "nut", "oak", "elm", "ash"]
    assert {word: split_of(f"The {word} is red.") for word in words} == dict.fromkeys(words, "train") | {"lime": "test"}


# --- prose ----------------------------------------------------------------------------------------------------------

DOCSTRING = """Compute the sum of all values.

    This sentence goes over
    two lines. It uses ``None``, *every* value and :class:`dict` objects. See :func:`os.path.join` for more.

    Some heading
    ------------

    >>> sum([1, 2])
    This is the output of a doctest.

    The following is code::

        This looks like a sentence but is code.

    .. code-block:: python

        This is code as well.

    .. note::
        A note is read as prose.

    Args:
        values (`list` of `int`, *optional*):
            The values are added one by one.
        start: The sum is zero at the start.

    Parameters
    ----------
    axis : int
        The axis is counted from zero.

    :param other: The other value is ignored.
    :return: It returns the sum of the values.

    - The first bullet is a sentence.
    - The second bullet is one too.

    | a | table |
    """


def test_paragraphs_of_a_docstring_are_its_prose():
    found = [sentence for paragraph in prose.paragraphs(DOCSTRING) for sentence in prose.sentences(paragraph)]
    plain = [sentence for sentence in found if prose.is_plain(sentence)]
    assert plain == [
        "Compute the sum of all values.",
        "This sentence goes over two lines.",
        "It uses None, every value and dict objects.",
        "A note is read as prose.",
        "The values are added one by one.",
        "The sum is zero at the start.",
        "The axis is counted from zero.",
        "The other value is ignored.",
        "It returns the sum of the values.",
        "The first bullet is a sentence.",
        "The second bullet is one too.",
    ]
    assert not any("code" in sentence and "looks" in sentence for sentence in found)
    assert not any("doctest" in sentence or "heading" in sentence or "table" in sentence for sentence in found)


@pytest.mark.parametrize(
    "sentence",
    [
        "Return the mean of the values.",
        "The server, i.e. the process that listens, is stopped.",
        'If the name is "all", then each of the files is read.',
        "It's about 3 times faster than the version that is written in Python.",
        "Does the file exist on this machine?",
    ],
)
def test_plain_sentences_stay(sentence):
    assert prose.sentences(f"{sentence} Another one follows it.") == [sentence, "Another one follows it."]
    assert prose.is_plain(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "Return it.",  # too short
        " ".join(["The value is returned and"] * 7) + " so on.",  # too long
        "return the mean of the values.",  # no capital
        "Return the mean of the values",  # no end
        "Return the mean_of_values of the list.",  # an identifier
        "The DataFrame is returned to the caller.",  # CamelCase
        "Use the f(x) form of the function.",  # code
        "See https://example.org for the details.",  # a link
        "Set x to the value of y.",  # variables
        "The size of the output image.",  # a fragment: no verb
        "List of the names that are read.",
        "If the file does not exist.",
        "Whether the values are sorted.",
        "The value (in bytes is returned here.",  # brackets
        "Licensed under the Apache License by the authors.",
        "The value is stored. another sentence follows.",
        "Die Werte werden zur\u00fcckgegeben und dann gespeichert.",
        "The algorithm that is described in \x01[ref].",
    ],
)
def test_what_is_no_plain_sentence_goes(sentence):
    assert not prose.is_plain(sentence)


def test_comments_and_messages_are_no_documentation(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""The module does one thing well."""\n\n\n'
        "# This comment is long enough\n# to be a sentence of its own.\n"
        'def f(x):\n    """Return the value of it all."""\n'
        '    raise ValueError(f"The value {x} is not what the caller wanted.")\n'
    )
    texts = list(docstrings.texts_of(file))
    assert (True, "The module does one thing well.") in texts
    assert (True, "Return the value of it all.") in texts
    assert (False, "This comment is long enough\nto be a sentence of its own.") in texts
    assert not any("wanted" in text for _, text in texts)
    for broken in ("def f(:\n", "\x00", "x = '\udcff'"):
        file.write_bytes(broken.encode("utf-8", "surrogateescape"))
        assert list(docstrings.texts_of(file)) == []


# --- docstrings -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The corpus of a few real installed packages: the whole takes minutes."""
    chosen = ("click", "jinja2", "networkx", "rich")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "installed_sources", lambda: [sources._distribution(name) for name in chosen])
        data = DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache")))
        begun = time.monotonic()
        first = corpora.load(data)
        extraction_s = time.monotonic() - begun
        blocks = paragraphs.paragraphs(data)["text"][:]
        patch.setattr(docstrings, "_progress", lambda *_: pytest.fail("the cache was not used"))
        begun = time.monotonic()
        second = corpora.load(data)
        assert time.monotonic() - begun < extraction_s / 2
        assert paragraphs.paragraphs(data)["text"][:] == blocks
        yield data, first, second, blocks


def test_docstrings_are_split_and_cached(small):
    _, first, second, _ = small
    assert first.fingerprint == second.fingerprint
    sizes = {split: len(first.splits[split]) for split in SPLITS}
    assert sizes["train"] > 600
    assert sizes["valid"] > 20
    assert sizes["test"] > 20
    keys = set()
    for split in SPLITS:
        sentences = first.splits[split]["text"][:]
        assert sentences == second.splits[split]["text"][:]
        assert all(prose.is_plain(sentence) for sentence in sentences)
        assert {split_of(sentence) for sentence in sentences} == {split}
        keys |= {near_key(sentence) for sentence in sentences}
    assert len(keys) == sum(sizes.values())


def test_no_paragraph_holds_a_sentence_of_valid_or_test(small):
    _, corpus, _, blocks = small
    held_out = {near_key(text) for split in ("valid", "test") for text in corpus.splits[split]["text"][:]}
    trained = {near_key(text) for text in corpus.splits["train"]["text"][:]}
    seen = set()
    for paragraph in blocks:
        assert 3 <= len(paragraph.split()) <= paragraphs.PARAGRAPH_WORDS
        for piece in [*prose.sentences(paragraph), *prose.loose_sentences(paragraph)]:
            seen.add(near_key(piece))
    assert not seen & held_out
    assert len(seen & trained) > 0.5 * len(trained)


def test_limit_takes_the_first_sentences_and_changes_the_fingerprint(small):
    data, first, _, _ = small
    cut = corpora.load(data.model_copy(update={"limit": 7}))
    assert {len(rows) for rows in cut.splits.values()} == {7}
    assert cut.splits["test"]["text"][:] == first.splits["test"]["text"][:7]
    assert cut.fingerprint != first.fingerprint
    assert len(paragraphs.paragraphs(data.model_copy(update={"limit": 5}))) == 5


def test_sources_follow_requirements_without_tests():
    names = sources.distributions()
    assert {"torch", "sympy", "pandas", "markupsafe"} <= set(names)
    assert names == sorted(names)
    assert sources.distributions(("there-is-no-such-package",)) == []
    files = [path.as_posix() for path in sources._distribution("networkx").files]
    assert any(path.endswith("/classes/graph.py") for path in files)
    assert not any("/tests/" in path for path in files)


def test_a_cache_that_cannot_be_made_is_a_data_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the cache .* set data\.cache_dir"):
        corpora.check(DataConfig(cache_dir=str(tmp_path / "file")))


# --- text -----------------------------------------------------------------------------------------------------------


def _write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "text"
    made.mkdir()
    _write(made, "train.txt", "One is here.\nTwo is h\u00e9re.\nThree is here.\n")
    _write(made, "valid.txt", "Four is here.\r\nFive is here.\r\n")
    _write(made, "test.txt", b"\xef\xbb\xbfSix is here.\n\n")
    return made


def _text(folder: Path, **more) -> DataConfig:
    return DataConfig(corpus="text", path=str(folder), cache_dir=str(folder.parent / "cache"), **more)


def test_text_files_become_a_corpus(folder):
    corpora.check(_text(folder))
    for _ in range(2):  # written, then from the cache
        corpus = corpora.load(_text(folder))
        assert corpus.splits["train"]["text"][:] == ["One is here.", "Two is h\u00e9re.", "Three is here."]
        assert corpus.splits["valid"]["text"][:] == ["Four is here.", "Five is here."]
        assert corpus.splits["test"]["text"][:] == ["Six is here."]
    cut = corpora.load(_text(folder, limit=2))
    assert cut.splits["train"]["text"][:] == ["One is here.", "Two is h\u00e9re."]
    _write(folder, "test.txt", "Seven is here.\n")
    changed = corpora.load(_text(folder))
    assert changed.splits["test"]["text"][:] == ["Seven is here."]
    assert len({corpus.fingerprint, cut.fingerprint, changed.fingerprint}) == 3


@pytest.mark.parametrize("name", ["dev.txt", "validation.txt"])
def test_the_validation_file_has_other_names_too(folder, name):
    (folder / "valid.txt").rename(folder / name)
    assert len(corpora.load(_text(folder)).splits["valid"]) == 2


def test_files_can_be_named_one_by_one(folder, tmp_path):
    named = {split: str(folder / f"{split}.txt") for split in SPLITS}
    corpus = corpora.load(DataConfig(corpus="text", cache_dir=str(tmp_path / "c"), **named))
    assert {split: len(rows) for split, rows in corpus.splits.items()} == {"train": 3, "valid": 2, "test": 1}
    with pytest.raises(DataError, match=r"nothing\.txt: no such file; correct data\.valid"):
        corpora.check(DataConfig(corpus="text", **{**named, "valid": str(tmp_path / "nothing.txt")}))


def test_a_label_is_no_text(folder):
    for split in SPLITS:
        _write(folder, f"{split}.txt", "0\tIt was bad.\n1\tIt was good,\tand cheap.\n")
    corpus = corpora.load(_text(folder, labelled=True))
    assert corpus.splits["train"]["text"][:] == ["It was bad.", "It was good,\tand cheap."]
    assert corpora.load(_text(folder)).splits["train"]["text"][0] == "0\tIt was bad."


@pytest.mark.parametrize(
    ("content", "labelled", "message"),
    [
        (b"", False, r"train\.txt: empty"),
        (b"\n \n", False, r"train\.txt: empty"),
        (b"One is here.\nTwo \xff here.\n", False, r"train\.txt:2: not UTF-8 at byte 5"),
        ("Eins ist hier.\n".encode("utf-16"), False, r"train\.txt:1: not UTF-8"),
        (b"\x00", False, r"train\.txt:1: a zero byte at byte 1 of the line"),
        (b"0\tOne is here.\nTwo is here.\n", True, r"train\.txt:2: no tab; .*'Two is here\.'"),
    ],
)
def test_a_bad_line_is_named(folder, content, labelled, message):
    for split in ("valid", "test"):
        _write(folder, f"{split}.txt", "0\tFour is here.\n")
    _write(folder, "train.txt", content)
    for act in (corpora.check, corpora.load):
        with pytest.raises(DataError, match=message) as raised:
            act(_text(folder, labelled=labelled))
        assert "\n" not in str(raised.value)
    assert not list((folder.parent / "cache").rglob(".partial-*"))


def test_missing_files_say_what_to_do(folder):
    (folder / "valid.txt").unlink()
    with pytest.raises(DataError, match=r"no valid\.txt or dev\.txt .* set data\.valid to a file"):
        corpora.check(_text(folder))
    with pytest.raises(DataError, match=r"nowhere: no such directory; data\.path is a directory with train\.txt"):
        corpora.load(_text(folder / "nowhere"))
    with pytest.raises(DataError, match=r"train\.txt: is a file; data\.path is a directory"):
        corpora.load(_text(folder / "train.txt"))


# --- dataset --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


ROWS = {
    "train": ["One is here.", "Two is here.", "Three is here."],
    "validation": ["Four is here."],
    "test": ["Six is here.", "Seven is here."],
}


def _tables(column: str = "text") -> dict[str, datasets.Dataset]:
    return {name: datasets.Dataset.from_dict({column: rows, "id": range(len(rows))}) for name, rows in ROWS.items()}


def _save(folder: Path, layout: str, column: str = "text") -> None:
    folder.mkdir(exist_ok=True)
    if layout == "saved":
        datasets.DatasetDict(_tables(column)).save_to_disk(str(folder))
        return
    for name, table in _tables(column).items():
        if layout == "parquet":
            table.to_parquet(folder / f"{name}.parquet")
        elif layout == "csv":
            table.to_csv(folder / f"{name}.csv", index=False)
        else:
            table.to_json(folder / f"{name}.jsonl")


def _dataset(path: Path | str, **more) -> DataConfig:
    return DataConfig(corpus="dataset", path=str(path), **more)


@pytest.mark.parametrize("layout", ["saved", "parquet", "csv", "jsonl"])
@pytest.mark.usefixtures("no_hub")
def test_local_data_sets_load(tmp_path, layout):
    _save(tmp_path / "data", layout, "sentence")
    data = _dataset(tmp_path / "data", column="sentence")
    corpora.check(data)
    corpus = corpora.load(data)
    assert {split: rows["text"][:] for split, rows in corpus.splits.items()} == {
        "train": ROWS["train"],
        "valid": ROWS["validation"],
        "test": ROWS["test"],
    }
    assert all(rows.column_names == ["text"] for rows in corpus.splits.values())
    cut = corpora.load(_dataset(tmp_path / "data", column="sentence", limit=1))
    assert cut.splits["train"]["text"][:] == ["One is here."]
    assert cut.fingerprint != corpus.fingerprint
    wrong = _dataset(tmp_path / "data", column="text")
    for act in (corpora.check, corpora.load):
        with pytest.raises(DataError, match=r"no column `text` in train; found: sentence, id; set data\.column"):
            act(wrong)


@pytest.mark.parametrize("layout", ["saved", "parquet"])
@pytest.mark.usefixtures("no_hub")
def test_splits_are_mapped_and_missing_ones_named(tmp_path, layout):
    _save(tmp_path / "data", layout)
    corpus = corpora.load(_dataset(tmp_path / "data", splits={"valid": "test", "test": "validation"}))
    assert corpus.splits["valid"]["text"][:] == ROWS["test"]
    assert corpus.splits["train"]["text"][:] == ROWS["train"]
    for act in (corpora.check, corpora.load):
        with pytest.raises(DataError, match=r"no split `dev` for valid; found: train, validation, test"):
            act(_dataset(tmp_path / "data", splits={"valid": "dev"}))


@pytest.mark.usefixtures("no_hub")
def test_a_slice_makes_a_split_that_is_missing(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps({"text": f"Row {n}."}) + "\n" for n in range(10)))
    slices = {"train": "train[:80%]", "valid": "train[80%:90%]", "test": "train[90%:]"}
    data = _dataset(tmp_path / "data", splits=slices)
    corpora.check(data)
    corpus = corpora.load(data)
    assert {split: len(rows) for split, rows in corpus.splits.items()} == {"train": 8, "valid": 1, "test": 1}
    assert corpus.splits["test"]["text"][:] == ["Row 9."]


@pytest.mark.usefixtures("no_hub")
def test_rows_without_text_are_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    for name in ROWS:
        lines = [{"text": "One is here."}, {"text": " "}, {"text": None}, {"text": "Two is here."}]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = corpora.load(_dataset(tmp_path / "data"))
    assert corpus.splits["train"]["text"][:] == ["One is here.", "Two is here."]
    assert "2 of 4 rows of train have no text" in caplog.text


@pytest.mark.usefixtures("no_hub")
def test_what_is_no_data_set_is_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_text("no parquet")
    (tmp_path / "one").mkdir()
    datasets.Dataset.from_dict({"text": ["One is here."]}).save_to_disk(str(tmp_path / "one"))
    (tmp_path / "numbers").mkdir()
    datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": [1]}) for name in ROWS}).save_to_disk(
        str(tmp_path / "numbers")
    )
    expected = {
        "empty": r"empty: no data files; data\.path must be a local directory with parquet",
        "broken": r"broken: ",
        "one": r"one: contains one split only; save a DatasetDict",
        "numbers": r"numbers: column `text` in train holds int64, not text",
        "nowhere": r"nowhere: no such directory",
    }
    for name, message in expected.items():
        with pytest.raises(DataError, match=message) as raised:
            corpora.load(_dataset(tmp_path / name))
        assert "\n" not in str(raised.value)


UNREACHABLE = {
    corpora.check: r"some/data: no such directory.*set data\.path to a local.*HF_HUB_OFFLINE=1",
    corpora.load: r"some/data: no such directory.*set data\.path to a local.*HF_HUB_OFFLINE=1",
    bases.check_base: r"model\.base some/data: no such directory.*hf download some/data",
    bases.load_tokenizer: r"model\.base some/data: its tokenizer cannot be loaded",
}


@pytest.mark.parametrize("act", UNREACHABLE)
@pytest.mark.usefixtures("no_hub")
def test_a_hub_out_of_reach_is_said_at_once(monkeypatch, act, capfd):
    with socket.socket() as taken:  # bound, never listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        for module, name in ((datasets.config, "HF_ENDPOINT"), (constants, "ENDPOINT")):
            monkeypatch.setattr(module, name, f"http://127.0.0.1:{taken.getsockname()[1]}")
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        begun = time.monotonic()
        with pytest.raises(UserError, match=UNREACHABLE[act]):
            act("some/data" if act.__module__ == bases.__name__ else _dataset("some/data"))
        assert time.monotonic() - begun < 8
    assert datasets.config.HF_HUB_OFFLINE is constants.HF_HUB_OFFLINE is False
    assert "Retrying" not in capfd.readouterr().err


def test_the_default_splits_are_those_of_the_settings():
    assert dataset.DEFAULT_NAMES == {"train": "train", "valid": "validation", "test": "test"}
