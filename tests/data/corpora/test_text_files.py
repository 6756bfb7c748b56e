"""Files of text: compressed, parquet, several of a pattern, written on other systems, or no text at all."""

import gzip
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vae_ds.config import DataConfig
from vae_ds.data import corpora
from vae_ds.data.corpora import text, text_files
from vae_ds.errors import DataError

pytestmark = pytest.mark.timeout(240)

SPLITS = ("train", "valid", "test")
CONTENT = {
    ".txt": b"One is here.\nTwo is here.\n",
    ".csv": b"label,text\n1,One is here.\n0,Two is here.\n",
    ".tsv": b"label\ttext\n1\tOne is here.\n0\tTwo is here.\n",
    ".jsonl": b'{"text": "One is here."}\n{"text": "Two is here."}\n',
}
SENTENCES = ["One is here.", "Two is here."]


def _zstd(content: bytes) -> bytes:
    made = pa.BufferOutputStream()
    with pa.CompressedOutputStream(made, "zstd") as file:
        file.write(content)
    return made.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".zst": _zstd}


def _data(folder: Path, **more) -> DataConfig:
    return DataConfig(corpus="text", path=str(folder), cache_dir=str(folder.parent / "cache"), **more)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "text"
    made.mkdir()
    for split in SPLITS:
        (made / f"{split}.txt").write_bytes(CONTENT[".txt"])
    return made


def _message(data: DataConfig) -> str:
    """The message of `check` and of `load`, which is the same line."""
    found = []
    for act in (corpora.check, corpora.load):
        with pytest.raises(DataError) as raised:
            act(data)
        found.append(str(raised.value))
    assert found[0] == found[1]
    assert "\n" not in found[0]
    return found[0]


# --- compressed files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("end", COMPRESS)
def test_compressed_files_are_read_by_their_names(tmp_path, kind, end):
    folder = tmp_path / "text"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}{kind}{end}").write_bytes(COMPRESS[end](CONTENT[kind]))
    corpora.check(_data(folder))
    corpus = corpora.load(_data(folder))
    assert all(rows["text"][:] == SENTENCES for rows in corpus.splits.values())


@pytest.mark.parametrize("end", COMPRESS)
def test_a_file_of_many_parts_is_read_to_its_end(folder, end):
    """`cat a.gz b.gz` and parallel compressors write several members or frames, also inside a line."""
    lines = [f"line {number}" for number in range(50_000)]
    content = "\n".join(lines).encode()
    (folder / "train.txt").unlink()
    parts = [content[:70_001], content[70_001:300_000], content[300_000:]]
    (folder / f"train.txt{end}").write_bytes(b"".join(map(COMPRESS[end], parts)))
    assert corpora.load(_data(folder)).splits["train"]["text"][:] == lines


@pytest.mark.parametrize("end", COMPRESS)
def test_a_broken_compressed_file_is_an_error(folder, end):
    (folder / "train.txt").unlink()
    path = folder / f"train.txt{end}"
    whole = COMPRESS[end](os.urandom(50_000).hex().encode())
    for content in (whole[:-10], b"One is here.\n", whole + b"One is here.\n"):
        path.write_bytes(content)
        message = _message(_data(folder))
        assert f"{path}: cannot be decompressed (" in message
        assert "; the file is incomplete or has another format" in message
    path.write_bytes(COMPRESS[end](b""))
    assert _message(_data(folder)) == f"{path}: empty; write one sentence per line"


def test_the_papers_layout_may_be_compressed(tmp_path):
    folder = tmp_path / "yelp"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.txt.gz").write_bytes(gzip.compress(b"1\tgood food\n"))
    corpus = corpora.load(DataConfig(corpus="yelp", path=str(folder), cache_dir=str(tmp_path / "cache")))
    assert corpus.splits["test"]["text"][:] == ["good food"]


# --- parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_files_are_read(folder):
    (folder / "train.txt").unlink()
    texts = [f"text {number}\nis here" for number in range(25_000)]
    said = pa.array(texts).dictionary_encode()
    pq.write_table(pa.table({"n": range(25_000), "said": said}), folder / "train.parquet", row_group_size=7_000)
    corpus = corpora.load(_data(folder, column="said"))
    assert corpus.splits["train"]["text"][:] == [line.replace("\n", " ") for line in texts]
    assert "no column `text`; found: n, said; set data.column" in _message(_data(folder))
    assert "column `n` holds int64, not text" in _message(_data(folder, column="n"))
    assert "has columns" in _message(_data(folder, column="said", labelled=True))
    (folder / "train.parquet").write_bytes(b"One is here.\n")
    assert "train.parquet: not a parquet file (" in _message(_data(folder))


def test_parquet_that_is_not_utf8_is_named(folder):
    (folder / "train.txt").unlink()
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ab", b"c\xff", b"d"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": broken}), folder / "train.parquet")
    assert "train.parquet:2: not UTF-8 at byte 2 of the text" in _message(_data(folder))


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_a_pattern_selects_its_files_in_order(folder):
    parts = folder / "parts"
    (parts / "deep").mkdir(parents=True)
    (parts / "b.txt").write_text("Three.\n\n")
    (parts / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfOne.\nTwo."))  # no line end: not joined with the next
    (parts / "c.jsonl").write_text('{"text": "Four."}\n')
    (parts / "deep" / "d.txt").write_text("Five.\n")
    data = _data(folder, train=f"{parts}/**/*.*")
    corpora.check(data)
    corpus = corpora.load(data)
    assert corpus.splits["train"]["text"][:] == ["One.", "Two.", "Three.", "Four.", "Five."]
    assert corpus.splits["valid"]["text"][:] == SENTENCES
    assert corpus.facts["blank_lines"]["train"] == 1
    assert len(corpora.load(_data(folder, train=f"{parts}/*.txt*")).splits["train"]) == 3
    # The content of each file and their order are part of the fingerprint.
    (parts / "b.txt").write_text("Changed.\n")
    assert corpora.load(data).fingerprint != corpus.fingerprint
    (parts / "z.txt").write_bytes(b"b\xffd\n")
    assert f"{parts / 'z.txt'}:1: not UTF-8 at byte 2" in _message(data)
    assert _message(_data(folder, train=f"{parts}/*.csv")) == (
        f"{parts}/*.csv: no file matches this pattern; correct data.train"
    )


def test_a_name_with_a_bracket_is_a_name(folder):
    (folder / "part[1].txt").write_text("One.\n")
    assert len(corpora.load(_data(folder, train=str(folder / "part[1].txt"))).splits["train"]) == 1


def test_copies_of_a_corpus_get_its_files(folder):
    assert text.find(_data(folder)) == {split: folder / f"{split}.txt" for split in SPLITS}
    assert text.find(_data(folder, train=f"{folder}/t*.txt")) == {}


# --- files of other systems -------------------------------------------------------------------------------------------


def test_marks_and_line_ends_of_other_systems(folder):
    (folder / "train.txt").write_bytes(b"\xef\xbb\xbfOne is here.\r\nTwo is here.")
    assert corpora.load(_data(folder)).splits["train"]["text"][:] == SENTENCES
    (folder / "train.txt").unlink()
    (folder / "train.csv").write_bytes(b"\xef\xbb\xbftext\r\nOne is here.\r\nTwo is here.")
    assert corpora.load(_data(folder)).splits["train"]["text"][:] == SENTENCES


@pytest.mark.parametrize(
    ("encoding", "mark", "named"),
    [
        ("utf-16-le", b"\xff\xfe", "UTF-16LE"),
        ("utf-16-be", b"\xfe\xff", "UTF-16BE"),
        ("utf-16-le", b"", "UTF-16LE"),
        ("utf-16-be", b"", "UTF-16BE"),
        ("utf-32-le", b"\xff\xfe\0\0", "UTF-32LE"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".txt.gz"])
def test_another_encoding_is_named(folder, encoding, mark, named, suffix):
    (folder / "train.txt").unlink()
    content = mark + "text\nOne is here.\nTwo is here.\n".encode(encoding)
    (folder / f"train{suffix}").write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    message = _message(_data(folder))
    assert f"train{suffix}:1: not UTF-8 at byte 1 of the line; the file looks like {named}" in message
    assert f"`iconv -f {named[:6]} -t UTF-8`" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"One is here.\n", mtime=0), "compressed with gzip; its name must end in .gz"),
        (_zstd(b"One is here.\n"), "compressed with zstd; its name must end in .zst"),
    ],
)
def test_another_format_is_named(folder, content, said):
    (folder / "train.txt").write_bytes(content)
    assert _message(_data(folder)) == f"{folder / 'train.txt'}:1: not UTF-8 text: the file is {said}"


def test_what_is_no_file_is_named(folder):
    (folder / "train.txt").unlink()
    (folder / "train.txt").mkdir()
    assert f"{folder / 'train.txt'}: is a directory, not a file; set data.train" in _message(_data(folder))
    assert f"is a directory; set data.train to a file, or to a pattern such as {folder}/*.txt" in _message(
        _data(folder, train=str(folder))
    )
    assert "/dev/null: is a device; correct data.train" in _message(_data(folder, train="/dev/null"))


@pytest.fixture
def unprivileged():
    """A folder outside the test's own, as a user to whom permissions apply."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o777)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(made)
        finally:
            if root:
                os.seteuid(0)


def test_a_file_without_permission_is_named(unprivileged):
    folder = unprivileged / "text"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.txt").write_bytes(CONTENT[".txt"])
    (folder / "train.txt").chmod(0)
    assert _message(_data(folder)) == f"{folder / 'train.txt'}: cannot be read (Permission denied)"
    (folder / "train.txt").chmod(0o600)
    folder.chmod(0o600)  # the names in it can be listed, the files not opened
    assert _message(_data(folder)).endswith("cannot be read (Permission denied)")
    folder.chmod(0o700)


def test_the_suffix_selects_the_format():
    found = {name: text_files.suffix(Path(name)) for name in ("a.CSV.gz", "a.jsonl", "a.b.txt", "a.gz", "a.parquet")}
    assert list(found.values()) == [".csv", ".jsonl", "", "", ".parquet"]
