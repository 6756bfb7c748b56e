"""Tables of the metrics (docs/metrics.md) of one or several runs, read from their `eval-<split>.json`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vae_ds.errors import CheckpointError

if TYPE_CHECKING:
    from rich.table import Table

# The main metrics, in the order of all tables.
COLUMNS = ("rec", "kl", "nelbo", "iw_nll", "ppl", "iw_ppl", "mi", "au", "z_gain", "lm_gain")
WITH_YARDSTICK = "lm_gain"  # a column only if any run has it
TEXT_COLUMNS = ("bleu", "self_bleu", "distinct_1", "distinct_2", "forward_ppl", "reverse_ppl")
WIDTH = 120
UNITS_SHOWN = 96
NOTED_UNKNOWN = 0.01  # share of the tokens
UNITS = "rec, kl, nelbo, iw_nll, mi, z_gain and lm_gain are in nats per sentence; ppl and iw_ppl are per word"


def read_evaluations(run_dirs: Sequence[str | Path], split: str = "test") -> dict[str, dict[str, Any]]:
    """The metrics of each run by the name of its folder, or by its path if two folders have the same name.

    Raises CheckpointError with the file's name if a run was not evaluated on `split`, or if its file is broken.
    """
    paths = [Path(run_dir) for run_dir in run_dirs]
    return {label: _read(path, split) for label, path in zip(labels_of(paths), paths, strict=True)}


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A label for each run: the name of its folder, or its path if two folders have the same name."""
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def metrics_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table with one row per run. `evaluations` has the metrics by label; a missing metric is shown as `-`.

    `mi` is shown with its ceiling, `au` with the number of units. `lm_gain` has a column only if any run has it.
    """
    shows_gain = any(metrics.get(WITH_YARDSTICK) is not None for metrics in evaluations.values())
    return _table(evaluations, [column for column in COLUMNS if shows_gain or column != WITH_YARDSTICK])


def text_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """A table of the metrics of generated text, with one row per run. None if no run has any."""
    columns = [name for name in TEXT_COLUMNS if any(metrics.get(name) is not None for metrics in evaluations.values())]
    return _table(evaluations, columns) if columns else None


def _table(evaluations: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("run", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for label, metrics in evaluations.items():
        table.add_row(escape(label), *(cell(metrics, column) for column in columns))
    return table


def footnotes(evaluations: Mapping[str, Mapping[str, Any]], split: str) -> list[str]:
    """Lines below the table: the units, the numbers of sentences that the metrics are means of, and the verdicts."""
    sizes = {label: f"{_count(metrics, 'sentences')} {split} sentences" for label, metrics in evaluations.items()}
    subsets = {label: _subset(metrics) for label, metrics in evaluations.items() if metrics.get("iw_nll") is not None}
    verdicts = [
        f"{label}: {metrics['verdict']}: {metrics.get('verdict_reason')}"
        for label, metrics in evaluations.items()
        if metrics.get("verdict") is not None
    ]
    return [UNITS, *_shared(sizes), *_shared(subsets), *verdicts, *unknown_tokens(evaluations)]


def unknown_tokens(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each run whose share of unknown tokens is at least NOTED_UNKNOWN."""
    return [
        f"{label}: {share:.1%} of the tokens are unknown to the tokenizer (unk); the model cannot write them"
        for label, metrics in evaluations.items()
        if (share := metrics.get("unk")) is not None and share >= NOTED_UNKNOWN
    ]


def text_footnotes(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines below the table of text metrics: the numbers of reconstructions and of samples."""
    pairs = {
        label: _reconstructions(metrics) for label, metrics in evaluations.items() if metrics.get("bleu_sentences")
    }
    drawn = {label: _drawn(metrics) for label, metrics in evaluations.items() if metrics.get("samples")}
    return [*_shared(pairs), *_shared(drawn)]


def kl_of_units(metrics: Mapping[str, Any]) -> list[str]:
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

    Raises CheckpointError as `read_evaluations` does.
    """
    from rich.console import Console

    evaluations = read_evaluations(run_dirs, split)
    console = Console(file=file)

    def show(table: Table, notes: Sequence[str]) -> None:
        # Rich cuts numbers to fit a narrow terminal or the 80 columns of a pipe. A long line keeps them.
        needed = console.measure(table, options=console.options.update(width=10_000)).maximum
        console.width = max(console.width, needed)
        console.print(table)
        for note in notes:
            console.print(f" {note}", markup=False, highlight=False, soft_wrap=True)

    show(metrics_table(evaluations), footnotes(evaluations, split))
    texts = text_table(evaluations)
    if texts is not None:
        show(texts, text_footnotes(evaluations))
    for label, metrics in evaluations.items() if units else ():
        lines = kl_of_units(metrics)
        for line in (f"{label}: {lines[0]}", *lines[1:]) if lines else ():
            console.print(f" {line}", markup=False, highlight=False, soft_wrap=True)


def _read(run_dir: Path, split: str) -> dict[str, Any]:
    path = run_dir / f"eval-{split}.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not run_dir.exists():
            raise CheckpointError(f"{run_dir}: no such directory") from None
        raise CheckpointError(
            f"{path}: no such file; write it with `vae-ds evaluate {run_dir} --split {split}`"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not an evaluation: {error}") from None
    if not isinstance(metrics, dict):
        raise CheckpointError(f"{path}: not an evaluation: a {type(metrics).__name__}, not an object of metrics")
    return metrics


def cell(metrics: Mapping[str, Any], column: str) -> str:
    """A metric as the tables show it: `mi` with its ceiling, `au` with the number of units, `-` for a missing one."""
    value = metrics.get(column)
    if value is None:
        return "-"
    if column == "au":
        units = metrics.get("kl_per_dim")
        return f"{value} / {len(units)}" if units else f"{value}"
    if column == "mi" and metrics.get("mi_ceiling") is not None:
        return f"{value:.2f} / {metrics['mi_ceiling']:.2f}"
    if column.startswith("distinct"):
        return f"{value:.3f}"
    return f"{value:.2f}"


def _shared(notes: Mapping[str, str]) -> list[str]:
    """One line if all runs agree, otherwise one line per run."""
    if len(set(notes.values())) > 1:
        return [f"{label}: {note}" for label, note in notes.items()]
    return list(notes.values())[:1]


def _subset(metrics: Mapping[str, Any]) -> str:
    sentences = f"iw_nll, iw_ppl: {_count(metrics, 'iw_sentences')} sentences"
    if metrics.get("mi") is None and metrics.get("iw_samples") is None:
        return f"{sentences}, exact: a plain language model has no latent to sample"
    return f"{sentences}, {_count(metrics, 'iw_samples')} samples each"


def _reconstructions(metrics: Mapping[str, Any]) -> str:
    return f"bleu: {_count(metrics, 'bleu_sentences')} greedy reconstructions, {metrics.get('bleu_signature')}"


def _drawn(metrics: Mapping[str, Any]) -> str:
    temperature = metrics.get("sample_temperature")
    how = "greedy" if temperature is None else f"at temperature {temperature:g}"
    return f"the others: {_count(metrics, 'samples')} samples of the prior, {how}"


def _count(metrics: Mapping[str, Any], key: str) -> str:
    value = metrics.get(key)
    return "an unknown number of" if value is None else f"{value:,}"
