"""Texts and what is known about them: a label, the factors of the grammar, the length, the first word.

Shapes: N texts.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vae_ds.data import corpora
from vae_ds.distributed import stream
from vae_ds.errors import ConfigError, DataError
from vae_ds.evaluation import finished_run

Values = Sequence[str | None]

LENGTH, FIRST_WORD = "length", "first word"
BINS = 5  # of the length
MOST_CLASSES = 20  # of a target; rarer values become one class
LEAST_MEMBERS = 10  # of a class, so that each of five folds has two
OTHER = "(other)"


@dataclass(frozen=True)
class Labelled:
    """N texts with the values of some targets, None for a text without a value.

    targets: the values by target. `label` is the label of the data.
    factors: the targets that are independent choices of the grammar.
    """

    texts: list[str]
    targets: Mapping[str, Values] = field(default_factory=dict)
    factors: tuple[str, ...] = ()

    @property
    def labels(self) -> Values:
        """The label of each text. Raises DataError if the texts have none."""
        if corpora.LABEL not in self.targets:
            raise DataError("the texts have no labels; name their column, or give lines of label, tab, text")
        return self.targets[corpora.LABEL]


def of_file(
    path: Path, *, column: str = "text", label_column: str | None = None, labelled: bool = False,
    most: int | None = None, seed: int = 0,
) -> Labelled:  # fmt: skip
    """The texts of a file in a format of docs/data.md, or `most` of them, drawn by `seed`. Memory grows with `most`.

    column, label_column, labelled: as in the section `data` of a recipe. Raises DataError for a missing or bad file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found = corpora.read_file(path, column, label_column, labelled)
    kept = list(found) if most is None else _drawn(found, most, seed)
    labels = {corpora.LABEL: [row.label for row in kept]} if labelled or label_column else {}
    return Labelled([row.text for row in kept], labels)


def of_run(run: Path, split: str, most: int | None = None, seed: int = 0) -> Labelled:
    """The sentences of a split of a run, or `most` of them, drawn by `seed`, with their labels and factors.

    Raises ConfigError if `run` is an export, which has no data, DataError if the data are missing.
    """
    config = finished_run.locate(run).config
    if config is None:
        raise ConfigError(f"{run} is an exported model, which has no texts of its own; give a file of texts")
    corpora.check(config.data)
    corpus = corpora.load(config.data)
    if split not in corpus.splits:
        raise DataError(f"the {split} split is read as a stream (data.streaming); choose valid or test")
    rows = corpus.splits[split]
    if most is not None and most < len(rows):
        chosen = stream(seed, "inspected").choice(len(rows), most, replace=False, shuffle=False)
        rows = rows.select(np.sort(chosen))
    factors = tuple(corpora.grammar.factor_entropies()) if config.data.corpus == "grammar" else ()
    names = [name for name in (corpora.LABEL, *factors) if name in rows.column_names]
    return Labelled(list(rows["text"][:]), {name: corpora.labels_of(rows, name) for name in names}, factors)


def with_form(labelled: Labelled) -> Labelled:
    """The same texts, with their length in words (in up to five bins of equal size) and their first word as targets."""
    lengths_N = np.array([len(text.split()) for text in labelled.texts])
    edges = np.unique(np.quantile(lengths_N, np.linspace(0, 1, BINS + 1)[1:-1], method="lower"))
    bins_N = np.searchsorted(edges, lengths_N)
    spans = {number: (lengths_N[bins_N == number].min(), lengths_N[bins_N == number].max()) for number in set(bins_N)}
    length = [f"{low} to {high} words" for low, high in (spans[number] for number in bins_N)]
    first = [text.split()[0] for text in labelled.texts]
    return Labelled(labelled.texts, {**labelled.targets, LENGTH: length, FIRST_WORD: first}, labelled.factors)


def classes(values: Values) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a target that have a class, and their classes: int64 and str.

    The 20 most frequent values with at least 10 texts are classes. All others together are one more, if they are 10.
    """
    counts = Counter(value for value in values if value is not None)
    kept = {value for value, count in counts.most_common(MOST_CLASSES) if count >= LEAST_MEMBERS}
    with_rest = sum(count for value, count in counts.items() if value not in kept) >= LEAST_MEMBERS
    rows = [row for row, value in enumerate(values) if value is not None and (value in kept or with_rest)]
    named = [value if (value := values[row]) in kept else OTHER for row in rows]
    return np.array(rows, np.int64), np.array(named, dtype=str)


def _drawn(rows: Iterable[corpora.Sentence], most: int, seed: int) -> list[corpora.Sentence]:
    """At most `most` of the rows, uniformly, in their order (reservoir sampling, Vitter 1985)."""
    random, kept = stream(seed, "inspected"), []
    for number, row in enumerate(rows):
        if number < most:
            kept.append((number, row))
        elif (place := int(random.integers(number + 1))) < most:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]
