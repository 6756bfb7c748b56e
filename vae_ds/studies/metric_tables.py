"""Tables of the metrics (docs/metrics.md) of one or several runs, read from their `eval-<split>.json`."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vae_ds.runtime import evaluations
from vae_ds.studies import differences
from vae_ds.studies.differences import Difference

if TYPE_CHECKING:
    from rich.table import Table

Metrics = Mapping[str, Any]

# The main metrics, in the order of all tables. `columns` chooses among them.
COLUMNS = (
    *("rec", "kl", "nelbo", "iw_nll", "above_yardstick", "ppl", "iw_ppl"),
    *("mi_train", "mi", "au", "z_gain", "lm_gain"),
)
WITH_YARDSTICK = ("above_yardstick", "lm_gain")  # columns only if any run has them
TEXT_COLUMNS = (
    *("bleu", "self_bleu", "distinct_1", "distinct_2"),
    *("forward_ppl", "forward_ppl_train", "reverse_ppl", "mauve", "mauve_train"),
)
ERROR = "_se"  # the end of the key of a standard error
WIDTH = 120
UNITS_SHOWN = 96
NOTED_UNKNOWN = 0.01  # share of the tokens
PER_WORD = ("ppl", "iw_ppl")
MARK_MEANS = (
    f"{differences.MARK}: more than {differences.ERRORS:g} standard errors over the sentences. Of models that are equal"
    " on average, 1 difference in 20 has this mark. The error does not cover other seeds"
)


def read_evaluations(run_dirs: Sequence[str | Path], split: str = "test") -> dict[str, dict[str, Any]]:
    """The metrics of each run by the name of its folder, or by its path if two folders have the same name.

    Several runs must be evaluated on the same data. Raises CheckpointError with the file's name if a run was not
    evaluated on `split`, if its file is broken, or if one of several does not name its data; DataError, which says
    what differs, if their data differ.
    """
    paths = by_label(run_dirs)
    found = {label: evaluations.read(path, split) for label, path in paths.items()}
    if len(found) > 1:
        named = {label: evaluations.fingerprint_of(path, split, found[label]) for label, path in paths.items()}
        (first, data), *others = named.items()
        for label, other in others:
            evaluations.require_same_data(other, data, label, first)
    return found


def with_differences(run_dirs: Sequence[str | Path], split: str = "test") -> dict[str, dict[str, Any]]:
    """What `read_evaluations` returns, and for each run but the first its `differences` to the first, ready for JSON.

    Raises CheckpointError and DataError as `read_evaluations` does, and CheckpointError if the values of the sentences
    of a run are missing or broken.
    """
    found = read_evaluations(run_dirs, split)
    first, *_ = found
    for label, of_run in differences.to_first(by_label(run_dirs), split).items():
        terms = {
            name: {"mean": one.mean, f"mean{ERROR}": one.se, "sentences": one.count} for name, one in of_run.items()
        }
        found[label]["differences"] = {"to": first, **terms}
    return found


def by_label(run_dirs: Sequence[str | Path]) -> dict[str, Path]:
    """The paths of runs by the labels that all tables give them."""
    paths = [Path(run_dir) for run_dir in run_dirs]
    return dict(zip(labels_of(paths), paths, strict=True))


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A label for each run: the name of its folder, or its path if two folders have the same name."""
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def columns(every: Sequence[Metrics]) -> list[str]:
    """The columns of a table of these runs: of the estimates of the mutual information, one."""
    has = {name for name in COLUMNS if any(metrics.get(name) is not None for metrics in every)}
    left_out = {"mi" if "mi_train" in has else "mi_train", *(set(WITH_YARDSTICK) - has)}
    return [name for name in COLUMNS if name not in left_out]


@dataclass(frozen=True)
class Grid:
    """The cells of a table: one row per run, one column per metric. `corner` is the head of the labels."""

    corner: str
    names: Sequence[str]
    rows: Mapping[str, Sequence[str]]

    def table(self) -> Table:
        """The table with a row per run."""
        return _table([self.corner, *self.names], [[label, *cells] for label, cells in self.rows.items()])

    def upright(self) -> Table:
        """The table with a row per metric, which is narrow for a few runs."""
        columns_ = list(zip(*self.rows.values(), strict=True))
        rows = [[name, *cells] for name, cells in zip(self.names, columns_, strict=True)]
        return _table([self.corner, *self.rows], rows)


def metrics_grid(every: Mapping[str, Metrics]) -> Grid:
    """The main metrics of runs by label. A missing metric is shown as `-`.

    Each mean has its standard error, `mi` its limit, `au` the number of units.
    """
    return _grid(every, columns(list(every.values())))


def text_grid(every: Mapping[str, Metrics]) -> Grid | None:
    """The metrics of generated text. None if no run has any."""
    used = [name for name in TEXT_COLUMNS if any(metrics.get(name) is not None for metrics in every.values())]
    return _grid(every, used) if used else None


def differences_grid(first: str, every: Mapping[str, Mapping[str, Difference]]) -> Grid:
    """The differences of each run to the first one."""
    rows = {label: [str(of_run.get(name, "-")) for name in differences.LIKELIHOODS] for label, of_run in every.items()}
    return Grid(f"minus {first}", differences.LIKELIHOODS, rows)


def _grid(every: Mapping[str, Metrics], names: Sequence[str]) -> Grid:
    rows = {label: [cell(metrics, name) for name in names] for label, metrics in every.items()}
    return Grid("run", names, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for number, title in enumerate(head):
        table.add_column(escape(title), justify="right" if number else "left", no_wrap=True)
    for label, *cells in rows:
        table.add_row(escape(label), *cells)
    return table


def unit_note(names: Sequence[str]) -> str:
    """The units of the columns of a table."""
    nats = [name for name in names if name != "au" and name not in PER_WORD]
    return f"{', '.join(nats[:-1])} and {nats[-1]} are in nats per sentence; {' and '.join(PER_WORD)} are per word"


def footnotes(every: Mapping[str, Metrics], split: str) -> list[str]:
    """Lines below the table: units, numbers of sentences, mutual information, verdicts and costs."""
    sizes = {label: _count(metrics, "sentences", f"{split} sentence") for label, metrics in every.items()}
    subsets = {label: _subset(metrics) for label, metrics in every.items() if metrics.get("iw_nll") is not None}
    names = columns(list(every.values()))
    has_errors = any(metrics.get(f"{name}{ERROR}") is not None for metrics in every.values() for name in names)
    notes = [unit_note(names)]
    notes += ["± is the standard error over the sentences"] if has_errors else []
    notes += [*_shared(sizes), *_shared(subsets)]
    for label, metrics in every.items():
        notes += [f"{label}: {line}" for line in statements(metrics)]
    return [*notes, *unknown_tokens(every)]


def statements(metrics: Metrics) -> list[str]:
    """What the metrics of one run say about its code: the mutual information, the verdict, the cost."""
    found = [information(metrics)]
    if metrics.get("sentences") == 1:
        others = "" if metrics.get("kl") is None else ", z_gain and a verdict"
        found.append(f"1 sentence is too few for standard errors{others}; evaluate at least 2")
    if metrics.get("verdict") is not None:
        found.append(f"{metrics['verdict']}: {metrics.get('verdict_reason')}")
    if metrics.get("cost") is not None:
        found.append(f"cost: {metrics['cost']}")
    return [line for line in found if line]


def information(metrics: Metrics) -> str | None:
    """The mutual information of sentence and code as an interval in nats; None without a latent code.

    `kl` bounds it from above, and with a learned prior the lower of `kl` and `kl_normal`. `mi_train` and `mi` estimate
    it from below. An estimate cannot exceed the logarithm of the number of its sentences, which says nothing about the
    code.
    """
    if metrics.get("kl") is None:
        return None
    lowest = min((key for key in ("kl", "kl_normal") if metrics.get(key) is not None), key=lambda key: metrics[key])
    above = f"{cell(metrics, lowest)} nats ({lowest})"
    words = f"mutual information at most {above}"
    if metrics.get("mi_train") is not None:
        count = metrics["mi_train_sentences"]
        estimate = f"mi_train: {_counted(count, 'training sentence')}, at most {math.log(count + 1):.2f}"
        words = f"mutual information between {cell(metrics, 'mi_train')} ({estimate}) and {above}"
    if metrics.get("mi") is None:
        return words
    limit = "" if metrics.get("mi_ceiling") is None else f", at most {metrics['mi_ceiling']:.2f}"
    return f"{words}; within the split {_value(metrics, 'mi')} (mi: {_count(metrics, 'sentences')}{limit})"


def unknown_tokens(every: Mapping[str, Metrics]) -> list[str]:
    """A line for each run whose share of unknown tokens is at least NOTED_UNKNOWN."""
    return [
        f"{label}: {share:.1%} of the tokens are unknown to the tokenizer (unk); the model cannot write them"
        for label, metrics in every.items()
        if (share := metrics.get("unk")) is not None and share >= NOTED_UNKNOWN
    ]


def text_footnotes(every: Mapping[str, Metrics]) -> list[str]:
    """Lines below the table of text metrics: the numbers of reconstructions and of samples."""
    pairs = {label: _reconstructions(metrics) for label, metrics in every.items() if metrics.get("bleu_sentences")}
    drawn = {label: _drawn(metrics) for label, metrics in every.items() if metrics.get("samples")}
    alike = {label: _likeness(metrics) for label, metrics in every.items() if metrics.get("mauve") is not None}
    return [*_shared(pairs), *_shared(drawn), *_shared(alike)]


def difference_footnotes(first: str, every: Mapping[str, Mapping[str, Difference]]) -> list[str]:
    """Lines below the table of differences: what they are, their numbers of sentences, and the mark."""
    notes = [f"each run minus {first} on the same sentences, in nats per sentence"]
    counts = {}
    for label, of_run in every.items():
        by_count = itertools.groupby(of_run.items(), lambda item: item[1].count)
        groups = [(count, ", ".join(name for name, _ in items)) for count, items in by_count]
        counts[label] = "; ".join(f"{names}: {_counted(count)}" for count, names in groups)
    return [*notes, *_shared(counts), MARK_MEANS]


def kl_of_units(metrics: Metrics) -> list[str]:
    """Lines with the mean KL of each latent unit in nats as `unit:KL`, largest first. Empty without latent units."""
    units = sorted(enumerate(metrics.get("kl_per_dim") or ()), key=lambda unit: -unit[1])
    if not units:
        return []
    shown = [f"{unit}:{kl:.2f}" for unit, kl in units[:UNITS_SHOWN]]
    if rest := units[UNITS_SHOWN:]:
        shown.append(f"and {len(rest)} more, the last {rest[-1][0]}:{rest[-1][1]:.2g}")
    return ["KL of each unit, the largest first:", *textwrap.wrap("  ".join(shown), WIDTH - 4, initial_indent="  ",
            subsequent_indent="  ")]  # fmt: skip


def print_metrics(
    run_dirs: Sequence[str | Path], split: str = "test", file: TextIO | None = None, units: bool = False
) -> None:
    """Print the tables of these runs to `file`, by default to standard output. `units` adds the KL of each latent unit.

    Of several runs, a further table has the differences to the first. Raises UserError as `with_differences` does.
    """
    from rich.console import Console

    every = read_evaluations(run_dirs, split)
    to_first = differences.to_first(by_label(run_dirs), split)
    console = Console(file=file)
    terminal_width = console.width

    def width_of(table: Table) -> int:
        return console.measure(table, options=console.options.update(width=10_000)).maximum

    def show(grid: Grid, notes: Sequence[str]) -> None:
        table = grid.table()
        # A terminal that is too narrow for a row per run may be wide enough for a row per metric.
        if console.is_terminal and width_of(table) > terminal_width >= width_of(grid.upright()):
            table = grid.upright()
        # Rich cuts numbers to fit a narrow terminal or the 80 columns of a pipe. A long line keeps them.
        console.width = max(terminal_width, width_of(table))
        console.print(table)
        for note in notes:
            console.print(f" {note}", markup=False, highlight=False, soft_wrap=True)

    show(metrics_grid(every), footnotes(every, split))
    if to_first:
        first = next(iter(every))
        show(differences_grid(first, to_first), difference_footnotes(first, to_first))
    texts = text_grid(every)
    if texts is not None:
        show(texts, text_footnotes(every))
    for label, metrics in every.items() if units else ():
        lines = kl_of_units(metrics)
        for line in (f"{label}: {lines[0]}", *lines[1:]) if lines else ():
            console.print(f" {line}", markup=False, highlight=False, soft_wrap=True)


def cell(metrics: Metrics, column: str) -> str:
    """A metric as the tables show it: `mi` with its limit, `au` with the number of units, `-` for a missing one."""
    if metrics.get(column) is None:
        return "-"
    if column == "au":
        per_unit = metrics.get("kl_per_dim")
        return f"{metrics['au']} / {len(per_unit)}" if per_unit else f"{metrics['au']}"
    if column == "mi" and metrics.get("mi_ceiling") is not None:
        return f"{_value(metrics, 'mi')} / {metrics['mi_ceiling']:.2f}"
    if column.startswith(("distinct", "mauve")):
        return f"{metrics[column]:.3f}"
    return _value(metrics, column)


def _value(metrics: Metrics, column: str) -> str:
    return evaluations.with_error(metrics[column], metrics.get(f"{column}{ERROR}"))


def _shared(notes: Mapping[str, str]) -> list[str]:
    """One line if all runs agree, otherwise one line per run."""
    if len(set(notes.values())) > 1:
        return [f"{label}: {note}" for label, note in notes.items()]
    return list(notes.values())[:1]


def _subset(metrics: Metrics) -> str:
    sentences = f"iw_nll, iw_ppl: {_count(metrics, 'iw_sentences')}"
    if metrics.get("mi") is None and metrics.get("iw_samples") is None:
        return f"{sentences}, exact: a plain language model has no latent to sample"
    return f"{sentences}, {_count(metrics, 'iw_samples', 'sample')} each"


def _reconstructions(metrics: Metrics) -> str:
    return f"bleu: {_count(metrics, 'bleu_sentences', 'greedy reconstruction')}, {metrics.get('bleu_signature')}"


def _drawn(metrics: Metrics) -> str:
    temperature = metrics.get("sample_temperature")
    how = "greedy" if temperature is None else f"at temperature {temperature:g}"
    return f"the others: {_count(metrics, 'samples', 'sample')} of the prior, {how}"


def _likeness(metrics: Metrics) -> str:
    texts, spread = _count(metrics, "mauve_texts", "text"), metrics["mauve_sd"]
    return f"mauve: {texts} of each kind, features of {metrics['mauve_features']}, ± {spread:.3f} over clusterings"


def _count(metrics: Metrics, key: str, noun: str = "sentence") -> str:
    value = metrics.get(key)
    return f"an unknown number of {noun}s" if value is None else _counted(value, noun)


def _counted(count: int, noun: str = "sentence") -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
