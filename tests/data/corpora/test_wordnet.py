"""The WordNet corpus: the format is parsed strictly, glosses lose their examples, splits are a function of the text."""

from pathlib import Path

import pytest

from vae_ds.config import DataConfig
from vae_ds.data import corpora
from vae_ds.data.corpora import wordnet
from vae_ds.data.corpora.splits import split_of
from vae_ds.errors import DataError

pytestmark = pytest.mark.timeout(240)

SPLITS = ("train", "valid", "test")
LICENCE = "  1 Words of a licence.  \n  2 More of them.  \n"
# Glosses of our own in the format of the four files; each line is written after its byte offset.
LINES = {
    "noun": [
        "03 n 02 thing 0 any_thing 1 002 @ {0} n 0000 ~i {0} n 0102 | something  that is there; \"a thing\"  ",
        *(f"06 n 01 noun_{name} a 000 | the kind of thing that has the number {name}  " for name in "abcdefghij"),
    ],
    "verb": ["29 v 01 run 2 001 $ {0} v 0000 02 + 02 00 + 08 01 | move fast; hurry; \"run home\"; \"they ran\"  "],
    "adj": [
        "00 s 01 able(p) 0 001 & {0} a 0000 | (of people) able to do it: \"able hands\"  ",
        "00 a 01 same 0 000 | something that is there  ",
    ],
    "adv": ["02 r 10 " + "so 0 " * 16 + "000 | in this way  "],
}  # fmt: skip


def _write(folder: Path, lines: dict[str, list[str]]) -> Path:
    folder.mkdir(exist_ok=True)
    for kind, rows in lines.items():
        content = LICENCE
        first = f"{len(LICENCE):08}"
        for row in rows:
            content += f"{len(content.encode()):08} {row.format(first)}\n"
        (folder / f"data.{kind}").write_text(content, encoding="utf-8")
    return folder


def _data(folder: Path, **more) -> DataConfig:
    return DataConfig(corpus="wordnet", path=str(folder), cache_dir=str(folder.parent / "cache"), **more)


def _everything(corpus: corpora.Corpus) -> list[str]:
    return sorted(text for rows in corpus.splits.values() for text in rows["text"][:])


def test_definitions_become_a_corpus(tmp_path):
    data = _data(_write(tmp_path / "wn", LINES))
    corpora.check(data)
    for _ in range(2):  # read, then from the cache
        corpus = corpora.load(data)
        numbered = [f"the kind of thing that has the number {name}" for name in "abcdefghij"]
        assert _everything(corpus) == sorted(
            ["something that is there", "move fast; hurry", "(of people) able to do it", "in this way", *numbered]
        )
        assert all(split_of(text) == split for split in SPLITS for text in corpus.splits[split]["text"][:])
        assert corpus.facts == {"synsets": 15, "sentences": {split: len(corpus.splits[split]) for split in SPLITS}}
    longer = corpora.load(_data(tmp_path / "wn", examples=True))
    assert set(_everything(longer)) - set(_everything(corpus)) == {"a thing", "run home", "they ran", "able hands"}
    cut = corpora.load(_data(tmp_path / "wn", limit=2))
    assert cut.splits["train"]["text"][:] == corpus.splits["train"]["text"][:2]
    more = {**LINES, "adv": ["02 r 01 thus 0 000 | in that way  "]}
    changed = corpora.load(_data(_write(tmp_path / "wn", more)))
    assert "in that way" in _everything(changed)
    assert len({one.fingerprint for one in (corpus, longer, cut, changed)}) == 4


@pytest.mark.parametrize(
    ("gloss", "definition", "examples"),
    [
        ('draw  air into; "I can breathe"; "she breathes" ', "draw air into", ["I can breathe", "she breathes"]),
        ('go under, "The raft sank"', "go under", ["The raft sank"]),
        ('beyond some bounds:"the outside world"', "beyond some bounds", ["the outside world"]),
        ('not to be changed; e.g. "frozen prices"', "not to be changed", ["frozen prices"]),
        ('(of persons) "he was hard to please"', "(of persons)", ["he was hard to please"]),
        ('it (in the phrase "make strides"); "big strides"', 'it (in the phrase "make strides")', ["big strides"]),
        ("one thing; another thing;", "one thing; another thing", []),
        ('as the poet has it; "so it was"- A. Poet; "and is"', "as the poet has it", ["so it was", "and is"]),
    ],
)  # fmt: skip
def test_a_gloss_is_a_definition_and_examples(gloss, definition, examples):
    assert wordnet.parts(gloss) == (definition, examples)


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("noun", "03 n 01 thing 0 000  no bar", "no ` | ` before a gloss"),
        ("noun", "3 n 01 thing 0 000 | a thing", "lex_filenum is '3'"),
        ("noun", "03 v 01 thing 0 000 | a thing", "ss_type is not one of n"),
        ("noun", "03 n 1 thing 0 000 | a thing", "w_cnt is '1'"),
        ("noun", "03 n 02 thing 0 000 | a thing", "lex_id is ''"),
        ("noun", "03 n 01 thing g 000 | a thing", "lex_id is 'g'"),
        ("noun", "03 n 01 thing 0 00x | a thing", "p_cnt is '00x'"),
        ("noun", "03 n 01 thing 0 001 ? {0} n 0000 | a thing", "pointer_symbol is '\\?'"),
        ("noun", "03 n 01 thing 0 001 @ 12 n 0000 | a thing", "synset_offset of a pointer is '12'"),
        ("noun", "03 n 01 thing 0 001 @ {0} x 0000 | a thing", "pos of a pointer"),
        ("noun", "03 n 01 thing 0 001 @ {0} n 00 | a thing", "source/target is '00'"),
        ("noun", "03 n 01 thing 0 000 @ | a thing", "found '@' where the gloss should begin"),
        ("noun", "03 n 01 thing 0 000 | ", "an empty gloss"),
        ("verb", "29 v 01 run 0 000 | move", "f_cnt is ''"),
        ("verb", "29 v 01 run 0 000 01 - 02 00 | move", r"a frame without \+"),
        ("verb", "29 v 01 run 0 000 01 + 02 | move", "w_num is ''"),
    ],
)
def test_a_bad_line_is_named(tmp_path, kind, line, message):
    folder = _write(tmp_path / "wn", {**LINES, kind: [LINES[kind][0], line]})
    with pytest.raises(DataError, match=rf"data\.{kind}:4: not WordNet's format: {message}") as raised:
        corpora.load(_data(folder))
    assert "\n" not in str(raised.value)


def test_offsets_and_encoding_are_checked(tmp_path):
    folder = _write(tmp_path / "wn", LINES)
    file = folder / "data.noun"
    file.write_bytes(file.read_bytes().replace(b"number c", b"number three"))
    with pytest.raises(DataError, match=r"data\.noun:7: .*synset_offset is \d+, but the line begins at byte \d+"):
        corpora.load(_data(folder))
    _write(folder, LINES)
    file.write_bytes(file.read_bytes().replace(b"number c", b"number \xff"))
    with pytest.raises(DataError, match=r"data\.noun:6: not WordNet's format: .*utf-8"):
        corpora.load(_data(folder))


def test_missing_files_name_the_package(tmp_path):
    folder = _write(tmp_path / "wn", LINES)
    (folder / "data.adv").unlink()
    for act in (corpora.check, corpora.load):
        with pytest.raises(
            DataError, match=r"no data\.adv of WordNet there; install the package wordnet-base .* set data\.path"
        ):
            act(_data(folder))  # fmt: skip
    with pytest.raises(DataError, match=r"nowhere: no data\.noun, data\.verb, data\.adj, data\.adv"):
        corpora.check(_data(tmp_path / "nowhere"))


@pytest.mark.skipif(not (Path(wordnet.PLACE) / "data.noun").is_file(), reason="wordnet-base is not installed")
def test_the_real_wordnet_is_read_to_its_last_synset():
    glosses = [gloss for kind, path in wordnet.find(DataConfig()).items() for gloss in wordnet.read_glosses(path, kind)]
    assert len(glosses) == 117_659
    split = [wordnet.parts(gloss) for gloss in glosses]
    assert all(definition for definition, _ in split)
    # A few glosses have a word in quotation marks, or a mark that was never closed.
    assert sum('"' in definition for definition, _ in split) < 20
    assert sum(len(examples) for _, examples in split) > 45_000
