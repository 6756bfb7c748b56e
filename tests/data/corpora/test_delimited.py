"""Text in CSV, TSV and JSON lines, and the named layouts: sentences come out as they went in, bad lines are named."""

import csv
import json
from pathlib import Path

import datasets
import pytest

from vae_ds import config
from vae_ds.config import DataConfig, RunConfig
from vae_ds.data import corpora
from vae_ds.data.corpora import delimited as tables
from vae_ds.data.corpora import layouts
from vae_ds.data.corpora.findings import Findings
from vae_ds.errors import DataError

pytestmark = pytest.mark.timeout(240)

SPLITS = ("train", "valid", "test")
ROWS = [
    ("1", "One is here."),
    ("0", 'Two, with a comma, says "yes".'),
    ("1", "Three is h\u00e9re."),
    ("2", "Four goes over\ntwo lines."),
]
SENTENCES = ["One is here.", 'Two, with a comma, says "yes".', "Three is h\u00e9re.", "Four goes over two lines."]


def _write(path: Path, rows=ROWS, end: str = "\r\n") -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator=end).writerows([("label", "sentence"), *rows])
    elif path.suffix == ".tsv":
        lines = ["label\tsentence", *(f"{label}\t{' '.join(text.split())}" for label, text in rows)]
        path.write_bytes(end.join([*lines, ""]).encode())
    else:
        lines = [json.dumps({"label": int(label), "sentence": text}) for label, text in rows]
        path.write_bytes(end.join([*lines, ""]).encode())
    return path


def _data(folder: Path, **more) -> DataConfig:
    return DataConfig(corpus="text", path=str(folder), cache_dir=str(folder.parent / "cache"), **more)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_column_is_the_text(tmp_path, suffix, end):
    for split in SPLITS:
        _write(tmp_path / "text" / f"{split}{suffix}", end=end)
    data = _data(tmp_path / "text", column="sentence")
    corpora.check(data)
    for _ in range(2):  # read, then from the cache
        corpus = corpora.load(data)
        assert all(rows["text"][:] == SENTENCES for rows in corpus.splits.values())
    assert corpora.load(data.model_copy(update={"limit": 2})).splits["train"]["text"][:] == SENTENCES[:2]
    if suffix == ".jsonl":
        return  # there a label may be a number, which is no text
    labels = corpora.load(data.model_copy(update={"column": "label"}))
    assert labels.splits["train"]["text"][:] == ["1", "0", "1", "2"]
    assert labels.fingerprint != corpus.fingerprint


def test_formats_can_be_mixed_and_the_meant_one_named(tmp_path):
    folder = tmp_path / "text"
    _write(folder / "train.csv")
    _write(folder / "dev.jsonl")
    (folder / "test.txt").write_text("Six is here.\n", encoding="utf-8")
    corpus = corpora.load(_data(folder, column="sentence"))
    assert {split: len(rows) for split, rows in corpus.splits.items()} == {"train": 4, "valid": 4, "test": 1}
    (folder / "train.txt").write_text("Five is here.\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.txt and train\.csv; set data\.train to one of them"):
        corpora.check(_data(folder, column="sentence"))
    chosen = corpora.load(_data(folder, column="sentence", train=str(folder / "train.txt")))
    assert chosen.splits["train"]["text"][:] == ["Five is here."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", b"", r"train\.csv: empty; write one sentence per row"),
        ("train.csv", b"label,sentence\n", r"train\.csv: empty"),
        ("train.csv", b"a,b\n1,2\n", r"train\.csv:1: no column `sentence`; found: a, b; set data\.column"),
        ("train.csv", b"sentence,sentence\n1,2\n", r"train\.csv:1: two columns `sentence`"),
        ("train.csv", b'l,sentence\n1,"a\nb"\n1,x,y\n', r"train\.csv:4: 3 fields, but the first line names 2 columns"),
        ("train.csv", b"l,sentence\n1,x\n1\n", r"train\.csv:3: 1 fields"),
        ("train.csv", b'l,sentence\n1,"x"y\n', r"train\.csv:2: not CSV in the row that begins here: .*expected"),
        ("train.csv", b'l,sentence\n1,x\n1,"never\nclosed\n\n', r"train\.csv:3: not CSV in the row that begins here"),
        ("train.csv", b'l,sentence\n1,"' + b"word\n" * 300_000, r"train\.csv:2: not CSV .* field larger"),
        ("train.csv", b"l,sentence\n1,x\n1,\xff\n", r"train\.csv:3: not UTF-8 at byte 3 of the line"),
        ("train.tsv", b"l\tsentence\n1\tx\n1\tx\ty\n", r"train\.tsv:3: 3 fields, but the first line names 2"),
        ("train.jsonl", b'{"sentence": "x"}\n{"sentence": \n', r"train\.jsonl:2: not JSON: "),
        ("train.jsonl", b'{"sentence": "x"}\n["y"]\n', r"train\.jsonl:2: list, not an object"),
        ("train.jsonl", b'{"text": "x", "n": 1}\n', r"train\.jsonl:1: no column `sentence`; found: text, n"),
        ("train.jsonl", b'{"sentence": 7}\n', r"train\.jsonl:1: `sentence` holds int, not text"),
        ("train.jsonl", b'{"sentence": "\\ud800"}\n', r"train\.jsonl:1: `sentence` holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, content, message):
    folder = tmp_path / "text"
    for split in ("valid", "test"):
        _write(folder / f"{split}.csv")
    (folder / name).write_bytes(content)
    for act in (corpora.check, corpora.load):
        with pytest.raises(DataError, match=message) as raised:
            act(_data(folder, column="sentence"))
        assert "\n" not in str(raised.value)
    assert csv.field_size_limit() == 131_072
    assert not list((tmp_path / "cache").rglob(".partial-*"))


def test_labels_of_tables_are_columns(tmp_path):
    for split in SPLITS:
        _write(tmp_path / "text" / f"{split}.csv")
    with pytest.raises(DataError, match=r"train\.csv: has columns.*set data\.labelled to false"):
        corpora.check(_data(tmp_path / "text", column="sentence", labelled=True))


def test_a_quotation_mark_of_tsv_is_a_character(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('sentence\tlabel\n"Yes, he said.\t1\nNo" "no.\t0\n', encoding="utf-8")
    found = tables.read(path, DataConfig(column="sentence"), Findings())
    assert [text for text, _ in found] == ['"Yes, he said.', 'No" "no.']


# --- named layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_optimus_directories_load(tmp_path, name):
    """As a shipped recipe asks for them, labels and all."""
    labelled = name in ("yahoo", "yelp")
    folder = tmp_path / name
    folder.mkdir()
    for number, split in enumerate(SPLITS):
        lines = [f"sentence {n} of {split} , it says\t." for n in range(3 - number)]
        text = "".join(f"{n}\t{line}\n" if labelled else f"{line}\n" for n, line in enumerate(lines))
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    recipe = config.load(RunConfig, name, [f"data.path={folder}", f"data.cache_dir={tmp_path / 'cache'}"])
    assert recipe.data.corpus == name
    corpora.check(recipe.data)
    corpus = corpora.load(recipe.data)
    assert corpus.name == name
    assert {split: len(rows) for split, rows in corpus.splits.items()} == {"train": 3, "valid": 2, "test": 1}
    assert corpus.splits["train"]["text"][0] == "sentence 0 of train , it says\t."
    (folder / "valid.txt").unlink()
    with pytest.raises(DataError, match=r"no valid\.txt or dev\.txt"):
        corpora.check(recipe.data)
    if labelled:
        (folder / "valid.txt").write_text("no label here\n")
        with pytest.raises(DataError, match=r"valid\.txt:1: no tab"):
            corpora.check(recipe.data)


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_copies_of_the_hubs_data_sets_load(tmp_path, name, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    layout = layouts.LAYOUTS[name]
    folder = tmp_path / "copy"
    folder.mkdir()
    rows = 10_020 if layout.splits == layouts._TWO else 20
    for split in ("train", "test") if layout.splits == layouts._TWO else ("train", "validation", "test"):
        texts = [f"Sentence {n} of {split}." for n in range(rows)]
        table = datasets.Dataset.from_dict({layout.column: texts, "label": [0] * rows})
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    data = DataConfig(corpus=name, path=str(folder), cache_dir=str(tmp_path / "cache"))
    corpora.check(data)
    corpus = corpora.load(data)
    assert corpus.name == name
    assert len(corpus.splits["train"]) == 20
    assert corpus.splits["train"]["text"][:2] == ["Sentence 0 of train.", "Sentence 1 of train."]
    assert corpus.splits["test"]["text"][0] == "Sentence 0 of test."
    first = "Sentence 20 of train." if rows > 20 else "Sentence 0 of validation."
    assert corpus.splits["valid"]["text"][0] == first


def test_without_a_directory_the_hub_is_asked(tmp_path):
    for name, layout in layouts.LAYOUTS.items():
        asked = layouts.settings(DataConfig(corpus=name, subset="other", column="other"))
        assert (asked.corpus, asked.path, asked.column, asked.subset) == ("dataset", layout.hub, layout.column, None)
        assert asked.revision == layout.revision
        with pytest.raises(
            DataError, match=rf"no such directory; .* layout of Optimus for {name}, or a copy .*{layout.hub}"
        ):
            corpora.check(DataConfig(corpus=name, path=str(tmp_path / "nowhere")))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: is a file; data\.path is a directory"):
        corpora.check(DataConfig(corpus="ptb", path=str(tmp_path / "file")))
