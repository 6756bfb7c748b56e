"""Convert text into token ids: tokenise a split once into Arrow files, shard by shard, and memory-map them.

An interrupted tokenisation continues after the last complete shard. Memory does not grow with the text, except for the
lengths: 4 bytes per sentence.

Shapes: N sentences of a split, B sentences of a subset, T tokens of one sentence. Lengths are in subword tokens and
include the end-of-sentence token. The ids of each sentence, which the encoder reads, end with exactly one such token.
The target, which the decoder predicts, has it only if the text ends there: the target of a cut sentence is one token
shorter. Otherwise the decoder would learn to end a sentence anywhere.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from vae_ds.data.cache import cache_dir as cache_root
from vae_ds.data.cache import cache_error
from vae_ds.data.fingerprints import json_digest, tokenizer_fingerprint
from vae_ds.data.progress import Progress, is_main
from vae_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_FORMAT = 2  # part of the cache key: increase it when the meaning of a row changes
ROWS_AT_ONCE = 10_000  # rows of a chunk in the cache; 10 million sentences are a thousand chunks
SHARD_ROWS = 200_000  # rows of a file in the cache; an interruption loses at most one file

ROW_FEATURES = Features(
    {"ids": List(Value("int32")), "words": Value("int32"), "unknown": Value("int32"), "truncated": Value("bool")}
)

UNKNOWN_SHARE = 0.01  # a split with this share of unknown subwords gets a warning

log = logging.getLogger(__name__)


class TextCorpus(Protocol):
    """The attributes of a corpus that `tokenise` needs. Each split has a column `text`."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def splits(self) -> Mapping[str, Dataset]: ...


class TokenSet:
    """The token ids of N sentences, memory-mapped if they come from the cache. `tokens[i]` is int64 (T,).

    lengths_N: number of ids that the encoder reads, with the end-of-sentence token.
    """

    def __init__(self, rows: pa.Table, text: Callable[[int], str], fingerprint: Callable[[], str]) -> None:
        """`rows` has the columns of ROW_FEATURES; `text(i)` gives the uncut sentence i."""
        self._chunks = [
            (chunk.offsets.to_numpy(), chunk.values.to_numpy())  # views of Arrow's memory, not copies
            for chunk in rows.column("ids").chunks
        ]
        self._cut = rows.column("truncated").chunks  # bits of the file; `truncated_N` takes a byte per sentence
        self._first_N = np.cumsum([0] + [len(offsets) - 1 for offsets, _ in self._chunks])
        self._rows = rows
        self._text = text
        self._fingerprint = fingerprint
        self.lengths_N = np.concatenate([np.diff(offsets) for offsets, _ in self._chunks] or [np.zeros(0, np.int32)])

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes with the texts, the tokenizer and the maximum length. The vocabulary takes a while."""
        return self._fingerprint()

    @cached_property
    def words_N(self) -> NDArray[np.int32]:
        """Number of complete whitespace words that were kept, plus 1 for the end of a sentence that was not cut."""
        return self._column("words")

    @cached_property
    def unknown_N(self) -> NDArray[np.int32]:
        """Number of unknown subwords among the kept ones."""
        return self._column("unknown")

    @cached_property
    def truncated_N(self) -> NDArray[np.bool_]:
        """Whether the sentence was cut."""
        return self._column("truncated")

    @cached_property
    def target_lengths_N(self) -> NDArray[np.int32]:
        """Number of target tokens: `lengths_N`, less 1 for a cut sentence, which has no end-of-sentence token."""
        return self.lengths_N - self.truncated_N.astype(np.int32)

    @property
    def target_tokens(self) -> int:
        """Number of target tokens of all sentences."""
        return int(self.lengths_N.sum(dtype=np.int64)) - self.truncated

    @property
    def unknown(self) -> int:
        """Number of unknown subwords among the kept ones of all sentences."""
        return int(pc.sum(self._rows.column("unknown")).as_py() or 0)

    @property
    def truncated(self) -> int:
        """Number of sentences that were cut."""
        return int(pc.sum(self._rows.column("truncated")).as_py() or 0)

    def __len__(self) -> int:
        return len(self.lengths_N)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.flat(np.array([index]))

    def target(self, index: int) -> NDArray[np.int64]:
        """The tokens that the decoder predicts: the ids, without the end-of-sentence token of a cut sentence."""
        ids = self[index]
        return ids[:-1] if self.cut(np.array([index]))[0] else ids

    def text(self, index: int) -> str:
        """The uncut text of sentence `index`. Raises IndexError."""
        return self._text(self._checked(index))

    def texts(self, start: int, stop: int) -> list[str]:
        """The uncut texts of the sentences `start` to `stop`, of which those past the end are left out."""
        return [self._text(index) for index in range(start, min(stop, len(self)))]

    def first(self, count: int) -> "TokenSet":
        """The first `count` sentences, or all if there are fewer."""
        if count >= len(self):
            return self
        return TokenSet(self._rows.slice(0, count), self._text, lambda: json_digest(self.fingerprint, count))

    def flat(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """The concatenated ids of sentences: int64 (sum of their lengths,)."""
        views = [self._view(*place) for place in self._places(index_B)]
        return np.concatenate(views).astype(np.int64) if views else np.zeros(0, np.int64)

    def cut(self, index_B: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether sentences were cut: bool (B,). Unlike `truncated_N`, it needs no memory for the whole split."""
        return np.array([self._cut[chunk][row].as_py() for chunk, row in self._places(index_B)], bool)

    def _column(self, name: str) -> Any:
        return self._rows.column(name).to_numpy()

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sentence {index} of {len(self)}")
        return index

    def _places(self, index_B: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """The chunk of each sentence, and its row there. Raises IndexError."""
        if len(index_B):
            self._checked(int(index_B.min()))
            self._checked(int(index_B.max()))
        chunk_B = np.searchsorted(self._first_N, index_B, side="right") - 1
        row_B = index_B - self._first_N[chunk_B]
        return zip(chunk_B.tolist(), row_B.tolist(), strict=True)

    def _view(self, chunk: int, row: int) -> NDArray[np.int32]:
        offsets, values = self._chunks[chunk]
        view: NDArray[np.int32] = values[offsets[row] : offsets[row + 1]]
        return view


def tokenise(
    corpus: TextCorpus, split: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int, cache_dir: Path | str | None
) -> TokenSet:
    """The token ids of a split, from the cache if it has them. Sentences longer than `max_tokens` are cut.

    The file names in the cache contain a hash of the corpus, the split, the tokenizer and `max_tokens`. A file gets its
    name when it is complete, and a later call writes the missing files. The number of cut sentences is logged, and the
    share of unknown subwords if it is large. `cache_dir` None means the default directory.

    Raises DataError if there is no such split or the cache cannot be written, ConfigError if the tokenizer has no
    end-of-sentence token.
    """
    if split not in corpus.splits:
        raise DataError(f"corpus {corpus.name} has no split `{split}`; it has {', '.join(corpus.splits) or 'none'}")
    _require_end(tokenizer)
    texts = corpus.splits[split]
    key = json_digest(CACHE_FORMAT, corpus.fingerprint, split, len(texts), tokenizer_fingerprint(tokenizer), max_tokens)
    if not len(texts):
        return TokenSet(_rows([], tokenizer, max_tokens), str, lambda: key)
    folder = cache_root(None if cache_dir is None else str(cache_dir)) / "tokens"
    shards = _shards(folder, f"{corpus.name.replace('/', '_')}-{split}-{key}", len(texts))
    missing = [shard for shard in shards if not _readable(shard)]
    if missing:
        _write(texts, split, tokenizer, max_tokens, missing)
    rows = pa.concat_tables([_read(shard.path) for shard in shards])
    found = TokenSet(rows, lambda index: str(texts[index]["text"]), lambda: key)
    report_truncation(f"{corpus.name}, {split}", found, max_tokens)
    report_unknown(f"{corpus.name}, {split}", found)
    return found


def from_texts(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    complete: Sequence[bool] | None = None,
) -> TokenSet:
    """The token ids of sentences in memory, made as in `tokenise`. Raises ConfigError like `tokenise`.

    complete: False for a text that was cut before it came here, so that its target has no end-of-sentence token. All of
        its words are counted, since a word that was cut cannot be recognised. A text without tokens counts as complete.
    """
    _require_end(tokenizer)
    kept = list(texts)
    ends = [True] * len(kept) if complete is None else [bool(end) for end in complete]
    parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, max(1, len(kept)), ROWS_AT_ONCE)]
    rows = pa.concat_tables([_rows(kept[part], tokenizer, max_tokens, ends[part]) for part in parts])
    cut = [row for row, end in enumerate(ends) if not end]

    def fingerprint() -> str:
        return json_digest(CACHE_FORMAT, *kept, tokenizer_fingerprint(tokenizer), max_tokens, *([cut] if cut else []))

    return TokenSet(rows, lambda index: kept[index], fingerprint)


def _require_end(tokenizer: "PreTrainedTokenizerBase") -> None:
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{type(tokenizer).__name__} of {tokenizer.name_or_path} has no end-of-sentence token")


@dataclass(frozen=True)
class _Shard:
    """A file of the cache and the range of rows of the split that it holds."""

    path: Path
    first: int
    end: int


def _shards(folder: Path, name: str, rows: int) -> list[_Shard]:
    starts = range(0, rows, SHARD_ROWS)
    paths = (folder / f"{name}-{number:05}-of-{len(starts):05}.arrow" for number in range(len(starts)))
    return [_Shard(path, first, min(first + SHARD_ROWS, rows)) for path, first in zip(paths, starts, strict=True)]


def _write(
    texts: Dataset, split: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int, missing: list[_Shard]
) -> None:
    source = texts.select_columns(["text"]).with_format("arrow")
    wanted = sum(shard.end - shard.first for shard in missing)
    progress = Progress(f"Tokenising {split}", len(texts), initial=len(texts) - wanted)
    folder = missing[0].path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with progress:
            for shard in missing:
                with _partial(shard) as file, pa.ipc.new_stream(file, ROW_FEATURES.arrow_schema) as writer:
                    for first in range(shard.first, shard.end, ROWS_AT_ONCE):
                        part = source[first : min(first + ROWS_AT_ONCE, shard.end)].column("text").to_pylist()
                        writer.write_table(_rows(part, tokenizer, max_tokens))
                        progress.add(len(part))
    except OSError as error:
        raise cache_error(folder, error) from None


@contextmanager
def _partial(shard: _Shard) -> Iterator[BinaryIO]:
    """A temporary file for a shard. It is renamed to the shard when it is complete, and deleted after an error."""
    temporary = shard.path.with_name(f".{shard.path.name}.{uuid4().hex}")
    with temporary.open("wb") as file:
        try:
            yield file
            file.flush()
            _publish(temporary, shard)
        finally:
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, shard: _Shard) -> None:
    try:
        temporary.replace(shard.path)
    except FileNotFoundError:
        # Another process has published the same shard first and deleted this temporary file.
        if not _readable(shard):
            raise
    for left in shard.path.parent.glob(f".{shard.path.name}.*"):
        left.unlink(missing_ok=True)  # temporary file of a killed process


def report_truncation(name: str, tokens: TokenSet, max_tokens: int) -> None:
    """Log a warning on rank 0 if sentences were cut."""
    cut = tokens.truncated
    if is_main() and cut:
        share = 100 * cut / len(tokens)
        message = "%s: %d of %d sentences (%.2f %%) are longer than data.max_tokens %d and were cut"
        log.warning(message, name, cut, len(tokens), share, max_tokens)


def report_unknown(name: str, tokens: TokenSet) -> bool:
    """Log a warning on rank 0 if many subwords are unknown to the tokenizer. Returns whether they are."""
    unknown, subwords = tokens.unknown, tokens.target_tokens
    many = unknown > 0 and unknown >= UNKNOWN_SHARE * subwords
    if many and is_main():
        message = "%s: %.1f %% of the subwords (%d of %d) are unknown to the tokenizer, so the model cannot reproduce"
        message += " them; choose a model.base whose tokenizer covers this text, such as google/mt5-small or"
        message += " google/byt5-small"
        log.warning(message, name, 100 * unknown / subwords, unknown, subwords)
    return many


def _readable(shard: _Shard) -> bool:
    """Whether the file exists and is complete. A full disk or an interrupted copy may leave an incomplete file."""
    try:
        return _read(shard.path).num_rows == shard.end - shard.first
    except (OSError, pa.ArrowInvalid):
        return False


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def _rows(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase", max_tokens: int, complete: Sequence[bool] | None = None
) -> pa.Table:
    """Rows of ROW_FEATURES for texts. The ids of each row end with the only end-of-sentence token of the row.

    `complete` as in `from_texts`.
    """
    found = (
        tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        if texts
        else []
    )
    # Look these up once: each is a search in the tokenizer, too slow to repeat for each sentence.
    end, unknown, pad = tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id
    rows: dict[str, list[Any]] = {name: [] for name in ROW_FEATURES}
    for text, text_ids, is_complete in zip(texts, found, complete or [True] * len(texts), strict=True):
        ids = _without_controls(text_ids, {end, pad}, unknown)
        is_long = len(ids) > max_tokens - 1
        is_cut = is_long or (not is_complete and bool(ids))
        kept = ids[: max_tokens - 1]
        words = _words_kept(ids, kept, tokenizer) if is_long else len(text.split())
        rows["ids"].append([*kept, end])
        rows["words"].append(words if is_cut else words + 1)
        rows["unknown"].append(kept.count(unknown))
        rows["truncated"].append(is_cut)
    return pa.table(rows, schema=ROW_FEATURES.arrow_schema)


def _without_controls(ids: list[int], controls: set[int | None], unknown: int | None) -> list[int]:
    """Replace control ids by the unknown id, or remove them if there is none.

    A text may contain the characters of `</s>` or `<pad>`. Unigram models then return the ids of these control tokens,
    which do not represent text.
    """
    if controls.isdisjoint(ids):
        return ids
    plain = [unknown if token in controls else token for token in ids]
    return [token for token in plain if token is not None]


def _words_kept(ids: list[int], kept: list[int], tokenizer: "PreTrainedTokenizerBase") -> int:
    """Number of complete whitespace words in a cut sentence. The last word counts only if it was not cut."""
    # The next tokens contain the end of a cut word. If the word is longer than that, the count is the same.
    whole, part = (
        str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)).split()
        for some in (ids[: 2 * len(kept) + 8], kept)
    )
    return next((n for n, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(part))
