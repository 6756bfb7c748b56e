"""The `wordnet` corpus: the definitions of WordNet's 117,659 synsets, read from its database files, offline.

The files have the wndb format: data.noun, data.verb, data.adj and data.adv. A gloss is a definition, optionally
followed by examples in quotation marks. The definition is a sentence; with `data.examples`, so is each example. Exact
duplicates are removed. The split is a hash of the near-duplicate key, so near-duplicates are in the same split.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from vae_ds.config import SPLITS, DataConfig
from vae_ds.data.cache import cache_dir, code_digest, digest, hash_file, read_rows, write_rows, write_text
from vae_ds.data.corpora import splits
from vae_ds.data.corpora.corpus import Corpus, limited
from vae_ds.data.corpora.text_files import kind_of
from vae_ds.data.progress import Progress
from vae_ds.errors import DataError

PLACE = "/usr/share/wordnet"  # the directory of the Debian and Ubuntu package wordnet-base
TYPES = {"noun": "n", "verb": "v", "adj": "as", "adv": "r"}  # the synset types that each file may contain
# Examples follow a semicolon, a colon, a comma or nothing; a quoted word inside a definition follows a word.
_EXAMPLES = re.compile(r'(?:[;:,]\s*|\)\s+|^)(?:e\.\s?g\.,?\s*)?"')
_QUOTED = re.compile(r'"([^"]+)"')
_POINTER = re.compile(r"[!@~#%=+;\-<*>^$&\\/]|@i|~i|[#%][msp]|[;\-][cru]")
_NUMBERS = {width: re.compile(rf"[0-9]{{{width}}}") for width in (2, 3, 8)}
_HEX = {width: re.compile(rf"[0-9a-f]{{{width}}}") for width in (1, 2, 4)}


def load(data: DataConfig) -> Corpus:
    """Load the sentences by split, sorted by a hash of each sentence, so that the first N are a random sample.

    Facts: the number of `synsets`, and the number of `sentences` of each split without duplicates. Raises DataError if
    a file is missing or, with file and line, if a line does not follow the format.
    """
    files = find(data)
    # The code is part of the key, so that a change of the extraction makes a new corpus without a version number.
    key = digest(
        [code_digest([__file__, splits.__file__]), str(data.examples), *(hash_file(path) for path in files.values())]
    )
    folder = cache_dir(data.cache_dir) / "wordnet" / key
    if not all((folder / name).is_file() for name in ("facts.json", *(f"{split}.arrow" for split in SPLITS))):
        _prepare(files, data.examples, folder)
    rows = {split: limited(read_rows(folder / f"{split}.arrow"), data.limit) for split in SPLITS}
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    # A hash of the sentences, not the key: a change of the code that keeps the sentences keeps the corpus.
    fingerprint = digest([facts.pop("fingerprint"), str(data.limit)])
    return Corpus("wordnet", fingerprint, rows, facts)


def check(data: DataConfig) -> None:
    """Check that the files exist. Raises DataError."""
    find(data)


def find(data: DataConfig) -> dict[str, Path]:
    """Find the database files by part of speech. Raises DataError, which says how to install them."""
    folder = Path(data.path or PLACE).expanduser()
    files = {kind: folder / f"data.{kind}" for kind in TYPES}
    missing = [path.name for path in files.values() if kind_of(path) != "file"]
    if missing:
        raise DataError(
            f"{folder}: no {', '.join(missing)} of WordNet there; install the package wordnet-base"
            " (apt-get install wordnet-base), or set data.path to the directory of these files"
        )
    return files


def read_glosses(path: Path, kind: str) -> Iterator[str]:
    """The gloss of each synset of a file, in file order. Raises DataError with file and line."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                # The file begins with the licence, whose lines are indented by two spaces.
                if not line.startswith(b"  "):
                    try:
                        yield _gloss(line.decode("utf-8"), offset, kind)
                    except ValueError as error:
                        raise DataError(f"{path}:{number}: not WordNet's format: {error}") from None
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def parts(gloss: str) -> tuple[str, list[str]]:
    """The definition of a gloss and its examples. Whitespace is normalised, and separators are removed."""
    gloss = " ".join(gloss.split())
    cut = _EXAMPLES.search(gloss)
    if cut is None:
        return gloss.strip(" ;:,"), []
    bracket = gloss[cut.start()] == ")"
    definition = gloss[: cut.start() + bracket]
    quoted = _QUOTED.findall(gloss[cut.start() + bracket :])
    return definition.strip(" ;:,"), [example.strip(" ;,") for example in quoted if example.strip(" ;,")]


def _gloss(line: str, offset: int, kind: str) -> str:
    """Check every field of a line and return its gloss. Raises ValueError."""
    head, bar, gloss = line.partition(" | ")
    if not bar:
        raise ValueError("no ` | ` before a gloss")
    fields = iter(head.split(" "))
    found = _number(fields, 8, "synset_offset")
    if found != offset:
        raise ValueError(f"synset_offset is {found}, but the line begins at byte {offset}")
    _number(fields, 2, "lex_filenum")
    if next(fields, "") not in set(TYPES[kind]):
        raise ValueError(f"ss_type is not one of {', '.join(TYPES[kind])}")
    for _ in range(int(_matching(fields, _HEX[2], "w_cnt"), 16)):
        if not next(fields, ""):
            raise ValueError("a word is missing")
        _matching(fields, _HEX[1], "lex_id")
    for _ in range(_number(fields, 3, "p_cnt")):
        _matching(fields, _POINTER, "pointer_symbol")
        _number(fields, 8, "synset_offset of a pointer")
        if next(fields, "") not in set("nvasr"):
            raise ValueError("pos of a pointer is not one of n, v, a, s, r")
        _matching(fields, _HEX[4], "source/target")
    if kind == "verb":
        for _ in range(_number(fields, 2, "f_cnt")):
            if next(fields, "") != "+":
                raise ValueError("a frame without +")
            _number(fields, 2, "f_num")
            _matching(fields, _HEX[2], "w_num")
    rest = next(fields, None)
    if rest is not None:
        raise ValueError(f"found {rest!r} where the gloss should begin")
    if not gloss.strip():
        raise ValueError("an empty gloss")
    return gloss


def _number(fields: Iterator[str], digits: int, name: str) -> int:
    return int(_matching(fields, _NUMBERS[digits], name))


def _matching(fields: Iterator[str], pattern: re.Pattern[str], name: str) -> str:
    text = next(fields, "")
    if not pattern.fullmatch(text):
        raise ValueError(f"{name} is {text!r}")
    return text


def _prepare(files: dict[str, Path], examples: bool, folder: Path) -> None:
    synsets = 0
    unique: dict[str, None] = {}
    with Progress("Reading WordNet", unit="synsets") as progress:
        for kind, path in files.items():
            for gloss in read_glosses(path, kind):
                synsets += 1
                progress.add()
                definition, quoted = parts(gloss)
                for text in [definition, *quoted] if examples else [definition]:
                    if text:
                        unique.setdefault(text)
    chosen: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    with Progress("Splitting WordNet", len(unique)) as progress:
        for text in unique:
            # Salted, to be independent of the split, which is a hash of the near-duplicate key.
            chosen[splits.split_of(text)].append((digest(["order", text]), text))
            progress.add()
    texts = {split: [text for _, text in sorted(rows)] for split, rows in chosen.items()}
    for split, sentences in texts.items():
        write_rows(folder / f"{split}.arrow", ((text,) for text in sentences))
    facts = {
        "synsets": synsets,
        "sentences": {split: len(sentences) for split, sentences in texts.items()},
        "fingerprint": digest(part for split, sentences in texts.items() for part in [split, *sentences]),
    }
    # Write this file last: it marks the other files as complete.
    write_text(folder / "facts.json", json.dumps(facts))
