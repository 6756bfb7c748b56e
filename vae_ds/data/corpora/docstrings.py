"""The `docstrings` corpus: English sentences from the documentation of installed Python packages, offline.

Files are parsed with `ast`; nothing is imported or run. Sentences come from docstrings, other multi-line strings and
README texts. Paragraphs are for language-model pretraining and also come from comments (also in C++ headers) and
messages. The split of a sentence depends only on its near-duplicate key. No sentence of valid or test is in a
paragraph, whatever packages are installed.
"""

import ast
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from datasets import Dataset, load_from_disk

from vae_ds.config import SPLITS, DataConfig
from vae_ds.data.cache import cache_dir, cache_error, code_digest, digest
from vae_ds.data.corpora import english, prose, sources, splits
from vae_ds.data.corpora.corpus import Corpus, limited, quiet_datasets
from vae_ds.data.corpora.splits import near_key, split_of_key
from vae_ds.data.progress import progress, waiting
from vae_ds.errors import DataError

_KNOWN_PACKAGES, _KNOWN_SENTENCES = 2, 4  # a word counts as English if at least so many packages and sentences use it
_EXTRACTION = (__file__, *(module.__file__ for module in (english, prose, sources, splits)))
_COMMENT = re.compile(r"^[ \t]*(?:#:?|//+!?|\*)[ \t](.*)$")
_MESSAGE_WORDS = 6

File = tuple[str, Path]
"""A package and one of its files."""

Keyed = tuple[str, str]
"""A pair of a near-duplicate key and its sentence."""

Extract = tuple[str, list[list[Keyed]]]
"""The result for one file: its package and the selected sentences of each paragraph."""


def load(data: DataConfig) -> Corpus:
    """Load the sentences by split, sorted by a hash of each sentence, so that the first N are a random sample.

    The first call extracts the text into the cache and shows its progress. This takes a minute or two. Later calls map
    the cached files. Raises DataError if the cache cannot be written.
    """
    folder = prepared(data, "sentences", _sentences_of, _sentences)
    meta = json.loads((folder / "meta.json").read_text())
    rows = {split: limited(open_rows(folder / split), data.limit) for split in SPLITS}
    return Corpus("docstrings", digest([meta["fingerprint"], str(data.limit)]), rows)


def check(data: DataConfig) -> None:
    """Check that the cache is writable. Raises DataError."""
    root = cache_dir(data.cache_dir) / "docstrings"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cache_error(root, error) from None


def open_rows(folder: Path) -> Dataset:
    """The rows of one part of a prepared folder, memory-mapped. Raises DataError if the cache is broken."""
    try:
        with quiet_datasets():
            rows = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: the cached corpus is broken ({error}); delete {folder.parent}") from None
    assert isinstance(rows, Dataset)
    return rows


def prepared(
    data: DataConfig,
    kind: str,
    extract: Callable[[File], Extract],
    assemble: Callable[[list[Extract]], dict[str, list[str]]],
    code: Sequence[str] = (),
) -> Path:
    """The cache folder of `kind` for the installed packages, extracted if it does not exist.

    Args:
        extract: what one file gives. Runs in worker processes, so it must be a function of a module.
        assemble: the rows of each part of the folder, from what all files gave.
        code: source files beside those of this package on which the result depends.

    Raises DataError if the cache cannot be written.
    """
    root = cache_dir(data.cache_dir) / "docstrings"
    # The code is part of the key, so that a change of the extraction makes a new corpus without a version number.
    # Docstrings are not: a change of words must not change the key.
    installed = (f"{name}=={version}" for name, version in sorted(sources.versions().items()))
    folder = root / f"{kind}-{digest([*installed, code_digest((*_EXTRACTION, *code))])}"
    if (folder / "meta.json").is_file():
        return folder
    check(data)
    with waiting("Listing the files of the installed packages"):
        jobs = [(source.name, path) for source in sources.installed_sources() for path in source.files]
    extracts = list(_progress(kind, extract, jobs))
    with waiting(f"Selecting {kind} of docstrings"):
        texts = assemble(extracts)
    temporary = root / f".partial-{uuid4().hex}"
    try:
        with quiet_datasets():
            for name, rows in texts.items():
                Dataset.from_dict({"text": rows}).save_to_disk(str(temporary / name))
        meta = {"fingerprint": digest(line for name, rows in texts.items() for line in [name, *rows])}
        (temporary / "meta.json").write_text(json.dumps(meta))
        # Another process may have been faster; its files have the same content.
        with suppress(OSError):
            temporary.rename(folder)
    except OSError as error:
        raise cache_error(root, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _progress(kind: str, extract: Callable[[File], Extract], jobs: list[File]) -> Iterator[Extract]:
    """Extract from all files in parallel, in order, and show the progress."""
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    task = f"Extracting {kind} from docstrings"
    if workers == 1 or multiprocessing.current_process().daemon:
        yield from progress(map(extract, jobs), task, len(jobs), "files")
        return
    # Forked workers run pure Python code only. Unlike spawned workers, they need no guard in the user's main module.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # The pool ends its workers with SIGTERM. They must not inherit a handler that only records the signal.
        pool = multiprocessing.get_context(method).Pool(workers, signal.signal, (signal.SIGTERM, signal.SIG_DFL))
    with pool:
        yield from progress(pool.imap(extract, jobs, chunksize=16), task, len(jobs), "files")


def _sentences_of(job: File) -> Extract:
    package, path = job
    blocks: list[list[Keyed]] = []
    if path.suffix not in sources.HEADERS:
        texts = (text for is_documentation, text in texts_of(path) if is_documentation)
        plain = (filter(prose.is_plain, prose.sentences(block)) for text in texts for block in prose.paragraphs(text))
        blocks = [[(near_key(sentence), sentence) for sentence in found] for found in plain]
    return package, [block for block in blocks if block]


def texts_of(path: Path) -> Iterator[tuple[bool, str]]:
    """The texts of a file, each with a flag: True for docstrings and long strings, False for comments and messages."""
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if path.suffix in sources.HEADERS:
        yield from ((False, comment) for comment in _comments(content))
        return
    if path.suffix not in {".py", ".pyi"}:
        yield True, content
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return
    pieces: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            pieces.update(id(part) for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            text = node.value.strip()
            docstring = "\n" in text or text.endswith(".")
            if docstring or len(text.split()) >= _MESSAGE_WORDS:
                yield docstring, node.value
    for comment in _comments(content):
        yield False, comment


def _comments(content: str) -> Iterator[str]:
    held: list[str] = []
    for line in [*content.splitlines(), ""]:
        comment = _COMMENT.match(line)
        if comment:
            held.append(comment[1])
        elif held:
            yield "\n".join(held)
            held = []


def _sentences(extracts: list[Extract]) -> dict[str, list[str]]:
    """Unique sentences of known words by split. The first of several near-duplicates is kept."""
    first: dict[str, str] = {}
    packages: dict[str, set[str]] = defaultdict(set)
    for package, blocks in extracts:
        for key, sentence in (pair for block in blocks for pair in block):
            first.setdefault(key, sentence)
            for word in prose.vocabulary(sentence):
                packages[word].add(package)
    uses: dict[str, int] = defaultdict(int)
    for sentence in first.values():
        for word in prose.vocabulary(sentence):
            uses[word] += 1
    known = {word for word, by in packages.items() if len(by) >= _KNOWN_PACKAGES and uses[word] >= _KNOWN_SENTENCES}
    kept: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for key, sentence in first.items():
        if prose.vocabulary(sentence) <= known:
            kept[split_of_key(key)].append((rank(key), sentence))
    return {split: [sentence for _, sentence in sorted(rows)] for split, rows in kept.items()}


def rank(key: str) -> str:
    """Sort key for a shuffle that does not depend on the other rows. Salted, since the split is a hash of the key."""
    return hashlib.blake2b(b"order " + key.encode("utf-8", "replace"), digest_size=8).hexdigest()
