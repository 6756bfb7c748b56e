"""A report of runs: tables as the paper's with its printed rows corrected, and figures. Markdown, CSV, PNG and SVG.

The same input gives the same bytes of Markdown and CSV: no date, no path of this machine beyond the given ones.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vae_ds import figures, runs
from vae_ds.errors import ConfigError
from vae_ds.figures import Curve, Point
from vae_ds.paper import PrintedRow, printed_rows
from vae_ds.records import replace_file
from vae_ds.runs import Run

PAPER = "paper"
PAPER_FIGURES = {1: "Figure 2", 2: "Figure 3"}
TITLES = {"yahoo": "Yahoo", "ptb": "PTB", "yelp": "Yelp", "snli": "SNLI"}
# CSV column of a table in the paper's layout: its head in Markdown.
COLUMNS = {
    "run": "run",
    "model": "model",
    "ppl_subword": "PPL a subword ↓",
    "ppl": "PPL a word ↓",
    "kl": "KL",
    "paper_nelbo": "rec - KL",
    "rec": "rec",
    "nelbo": "-ELBO = rec + KL ↓",
    "mi": "MI ↑",
    "au": "AU ↑",
    "tokens_per_sentence": "tokens a sentence",
    "note": "note",
}
# In no table of metrics: paths, long lists, and what has a column of its own.
NO_METRICS = {"model", "split", "seed", "kl_per_dim", "verdict", "verdict_reason"}
METRICS_A_TABLE = 12

WHY_NO_TARGETS = """\
The rows marked `paper` are what the paper prints, and no targets. What it prints as -ELBO is rec - KL, not rec + KL:
the rows of a data set share one test split, and (rec + KL) / ln PPL gives them one number of tokens a sentence only
if rec is the printed number plus the KL. So a higher KL looked like a better bound. With the sign put right (`rec`,
`-ELBO = rec + KL` and `tokens a sentence` are computed here from the printed numbers) the 6-layer rows of a data set
have nearly the same rec, whatever their KL: the KL was paid, and the decoder did not use the code. The MI was computed
in batches of 256 and cannot pass ln 256 = 5.55. Rows that the paper quotes from elsewhere stand as printed, in their
sources' units, and nothing is computed from them.

For runs, `rec - KL` is there only to be set beside the print. The paper's PPL is a subword's, without the
end-of-sentence in the count of tokens; a run's counts it, and `PPL a word` is the one that `vae-ds evaluate` calls
`ppl`."""

WHAT_CURVES_SAY = """\
A line's label has the settings that differ; runs that are the same up to here are one line. MI cannot pass ln of the
number of sentences validated."""

WHAT_THE_PLANE_SAYS = """\
The KL is the rate, the nats per sentence that the code may carry; rec is the distortion, what is left to say. On a
falling line their sum, the bound on the negative log-likelihood, is the same. A collapsed run stands at the left edge;
a run that pays KL for nothing moves right and not down. Below the yardstick's line, the bound is better than the exact
likelihood of a plain language model."""

WHAT_THE_FRONT_SAYS = """\
A run on the front has no other that is as good in one and better in the other. The ceiling of MI is ln of the number
of sentences: no estimate can pass it. A language model has no MI, so its perplexity is a line."""

Cell = str | int | float | None
Row = dict[str, Cell]


@dataclass
class _Report:
    """What is written so far: the folder, and the parts of report.md."""

    folder: Path
    split: str
    parts: list[str] = field(default_factory=list)

    def say(self, *parts: str) -> None:
        self.parts += parts

    def section(self, title: str, text: str) -> None:
        """A heading with what is said under it, once."""
        if f"## {title}" not in self.parts:
            self.say(f"## {title}", text)

    def table(self, name: str, head: Mapping[str, str], rows: Sequence[Row]) -> None:
        """A table in Markdown, without the columns that are empty, and all of it as NAME.csv."""
        self.csv(name, list(head), rows)
        used = {key: title for key, title in head.items() if any(row.get(key) is not None for row in rows)}
        self.say(_markdown(used, rows), f"[{name}.csv]({name}.csv)")

    def csv(self, name: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self.folder / f"{name}.csv", text.getvalue().encode())

    def figure(self, name: str, title: str) -> None:
        self.say(f"[![{title}]({name}.png)]({name}.svg)")


def write(paths: Sequence[str | Path], folder: Path, split: str = "test") -> Path:
    """Write the report of these runs, and of all in directories of runs, into `folder`; returns its report.md.

    A run that was not evaluated on `split` is listed as such. Files of an earlier report are replaced.
    Raises CheckpointError and ConfigError as `read_runs` does, ConfigError if `folder` cannot be one.
    """
    every = runs.read_runs(paths, split)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be the report's directory ({error.strerror}); name another") from None
    report = _Report(folder, split)
    groups = runs.by_data(every)
    _overview(report, every)
    _paper_tables(report, every)
    _phases(report, every)
    for name, members in groups.items():
        _plane(report, name, members, alone=len(groups) == 1)
    for name, members in groups.items():
        _front(report, name, members, alone=len(groups) == 1)
    replace_file(folder / "report.md", ("\n\n".join(report.parts) + "\n").encode())
    return folder / "report.md"


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none has an x as high and a y as low, and one of them better."""

    def beats(one: Point, other: Point) -> bool:
        return one.x >= other.x and one.y <= other.y and (one.x, one.y) != (other.x, other.y)

    return [point for point in points if not any(beats(other, point) for other in points)]


def _overview(report: _Report, every: Sequence[Run]) -> None:
    evaluated = [run for run in every if run.metrics is not None]
    report.say(f"# Report of {_number(len(every), 'run')}")
    report.say(f"{len(evaluated)} of {len(every)} were evaluated on the {report.split} split. Nats are per sentence.")
    missing = [
        f"- {_escape(run.name)}: {run.state}; `vae-ds evaluate {run.path} --split {report.split}` evaluates it"
        for run in every
        if run.metrics is None
    ]
    if missing:
        report.say("Not evaluated, and so without numbers below:", "\n".join(missing))
    report.say("## All runs")
    keys = runs.differing([run.settings for run in every])
    setting_heads = {f"set:{key}": f"`{runs.short(key, keys)}`" for key in keys}
    metrics = [k for k in dict.fromkeys(k for run in every for k in run.metrics or ()) if k not in NO_METRICS]
    rows = [_run_row(run, keys, metrics) for run in every]
    first = {"run": "run", "state": "state", "verdict": "verdict"}
    report.csv("runs", [*first, "verdict_reason", *setting_heads, *metrics], rows)
    report.say("[runs.csv](runs.csv) has all of this section in one table.")
    report.say(_markdown(first | setting_heads, rows))
    used = [key for key in metrics if any(row.get(key) is not None for row in rows)]
    for start in range(0, len(used), METRICS_A_TABLE):
        report.say(_markdown({key: key for key in ("run", *used[start : start + METRICS_A_TABLE])}, rows))
    reasons = [
        f"- {_escape(run.name)}: {_escape(str(run.metric('verdict_reason')))}"
        for run in evaluated
        if run.metric("verdict_reason") is not None
    ]
    if reasons:
        report.say("Why a verdict is what it is:", "\n".join(reasons))


def _run_row(run: Run, keys: Sequence[str], metrics: Sequence[str]) -> Row:
    row: Row = {"run": run.name, "state": run.state if run.metrics is not None else f"{run.state}, not evaluated"}
    row |= {key: run.metric(key) for key in ("verdict", "verdict_reason", *metrics)}
    return row | {f"set:{key}": runs.shown(run.settings[key]) for key in keys if key in run.settings}


def _paper_tables(report: _Report, every: Sequence[Run]) -> None:
    report.say("## The paper's tables", WHY_NO_TARGETS)
    printed = printed_rows()
    for number, corpus in dict.fromkeys((row.table, row.corpus) for row in printed):
        report.say(f"### Table {number}: {TITLES[corpus]}")
        own = [_own_row(run) for run in every if run.config.data.corpus == corpus]
        theirs = [_printed_row(row) for row in printed if row.table == number]
        report.table(f"table-{number}-{corpus}", COLUMNS, [*theirs, *own])
        if not own:
            report.say("None of the runs is on this data set.")
    others = [run for run in every if run.config.data.corpus not in TITLES]
    for corpus in dict.fromkeys(run.config.data.corpus for run in others):
        report.say(f"### In the same layout: `{corpus}`")
        report.table(f"table-{corpus}", COLUMNS, [_own_row(r) for r in others if r.config.data.corpus == corpus])


def _printed_row(row: PrintedRow) -> Row:
    note = "; ".join(filter(None, ("quoted baseline" if row.quoted else "", row.note)))
    return {
        "run": PAPER,
        "model": row.model,
        "ppl_subword": row.ppl,
        "kl": row.kl,
        "paper_nelbo": row.nelbo_printed,
        "rec": row.rec,
        "nelbo": row.nelbo,
        "mi": row.mi,
        "au": row.au,
        "tokens_per_sentence": row.tokens,
        "note": note or None,
    }


def _own_row(run: Run) -> Row:
    tokens, sentences = run.metric("tokens"), run.metric("sentences")
    own = {key: run.metric(key) for key in ("ppl_subword", "ppl", "kl", "paper_nelbo", "rec", "nelbo", "mi", "au")}
    return {
        "run": run.name,
        "model": _described(run),
        **own,
        "tokens_per_sentence": tokens / sentences if tokens and sentences else None,
        "note": f"not evaluated ({run.state})" if run.metrics is None else run.metric("verdict"),
    }


def _described(run: Run) -> str:
    """A run in the words of the paper's rows; of denoising and threshold, the last phase's."""
    model, last = run.config.model, run.config.phases[-1]
    if run.is_yardstick:
        return "plain language model"
    parts = [f"{model.pooling.capitalize()} pool"]
    parts += [f"Denoise {last.denoise:g}"] if last.denoise else []
    parts += [f"KLT {last.free_bits.nats:g} ({last.free_bits.mode})"] if last.free_bits.nats else []
    parts += [f"injection {model.injection}"] if model.injection != "cross_attention" else []
    return " + ".join(parts)


def _phases(report: _Report, every: Sequence[Run]) -> None:
    """A figure for each phase that has validations, of the runs that have a latent code."""
    latent = [run for run in every if not run.is_yardstick]
    found = {run.name: runs.validations(run) for run in latent}
    for number in sorted({number for of_run in found.values() for number in of_run}):
        members = [run for run in latent if number in found[run.name]]
        name, title = f"phase-{number}", f"Phase {number}: MI, active units and KL of the validations"
        remark = f", the counterpart of the paper's {PAPER_FIGURES[number]}" if number in PAPER_FIGURES else ""
        report.say(f"## Along phase {number}", f"The validations during training{remark}. {WHAT_CURVES_SAY}")
        figures.phase(report.folder, name, title, _curves(members, found, number))
        report.figure(name, title)
    without = [run.name for run in latent if not found[run.name]]
    if without:
        report.say(f"Without a validation, and so in no figure of a phase: {_listed(without)}.")


def _curves(
    members: Sequence[Run], found: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]], number: int
) -> list[Curve]:
    """One curve a run, labelled by what differs up to this phase; runs that are the same up to here are drawn once."""
    settings = [runs.up_to_phase(run, number) for run in members]
    keys = runs.differing(settings)
    by_label: dict[str, list[Curve]] = {}
    for run, own in zip(members, settings, strict=True):
        rows = tuple({key: row.get(key) for key in ("step", *figures.PANELS)} for row in found[run.name][number])
        label = runs.label(own, keys) or run.name if keys or len(members) == 1 else "all runs"
        same = by_label.setdefault(label, [])
        if all(curve.rows != rows for curve in same):
            same.append(Curve(f"{label}, {run.name}" if same else label, rows))
    return [curve for curves in by_label.values() for curve in curves]


def _plane(report: _Report, data: str, members: Sequence[Run], alone: bool) -> None:
    latent, yardsticks = _halves(members)
    drawn = [run for run in latent if _is_number(run.metric("kl")) and _is_number(run.metric("rec"))]
    if not drawn:
        return
    name, title = _named("rate-distortion", "Rate and distortion", data, alone)
    labels = runs.labels(latent)
    entropy, cut = _entropy_nats(members[0]), any(run.metric("truncated") for run in members)
    figures.plane(
        report.folder,
        name,
        title,
        [Point(labels[run.name], run.metric("kl"), run.metric("rec")) for run in drawn],
        {label: run.metric("rec") for label, run in _yardstick_labels(yardsticks) if _is_number(run.metric("rec"))},
        None if cut else entropy,
    )
    report.section("Rate and distortion", WHAT_THE_PLANE_SAYS)
    if entropy is not None:
        left_out = "is not drawn, since sentences were cut at `data.max_tokens`" if cut else "is drawn"
        report.say(f"The entropy of a sentence of the source, {entropy:.2f} nats, {left_out}.")
    report.figure(name, title)
    _tell_left_out(report, latent, drawn)


def _front(report: _Report, data: str, members: Sequence[Run], alone: bool) -> None:
    latent, yardsticks = _halves(members)
    key = _perplexity([*latent, *yardsticks])
    drawn = [run for run in latent if _is_number(run.metric(key)) and _is_number(run.metric("mi"))]
    if not drawn:
        return
    name, title = _named("perplexity-information", "Perplexity and information", data, alone)
    labels = runs.labels(latent)
    points = [Point(labels[run.name], run.metric("mi"), run.metric(key)) for run in drawn]
    best = pareto_front(points)
    kind = "importance-weighted" if key == "iw_ppl" else "from the -ELBO"
    ceilings = [run.metric("mi_ceiling") for run in drawn if _is_number(run.metric("mi_ceiling"))]
    figures.front(
        report.folder,
        name,
        title,
        f"{key}: perplexity a word, {kind}",
        points,
        best,
        max(ceilings, default=None),
        {label: run.metric(key) for label, run in _yardstick_labels(yardsticks) if _is_number(run.metric(key))},
    )
    on_front = [run.name for run, point in zip(drawn, points, strict=True) if point in best]
    report.section("Perplexity and information", WHAT_THE_FRONT_SAYS)
    report.figure(name, title)
    report.say(f"On the front, by `{key}` and `mi`: {_listed(on_front)}.")
    _tell_left_out(report, latent, drawn)


def _halves(members: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs with a latent code, evaluated or not, and the yardsticks that were evaluated."""
    latent = [run for run in members if not run.is_yardstick]
    return latent, [run for run in members if run.is_yardstick and run.metrics is not None]


def _yardstick_labels(yardsticks: Sequence[Run]) -> list[tuple[str, Run]]:
    alone = len(yardsticks) == 1
    return [("language model" if alone else f"language model {run.name}", run) for run in yardsticks]


def _perplexity(members: Sequence[Run]) -> str:
    """`iw_ppl` if every evaluated run has it, on as many sentences; else `ppl`: the two are never mixed."""
    evaluated = [run for run in members if run.metrics is not None]
    sizes = {run.metric("iw_sentences") for run in evaluated}
    whole = all(_is_number(run.metric("iw_ppl")) for run in evaluated)
    return "iw_ppl" if whole and len(sizes) == 1 else "ppl"


def _entropy_nats(run: Run) -> float | None:
    """The entropy of a sentence of the source, where that is known: of the grammar."""
    if _is_number(run.metric("entropy_nats")):
        return float(run.metric("entropy_nats"))
    if run.config.data.corpus != "grammar":
        return None
    from vae_ds.corpora import grammar

    return grammar.entropy_nats()


def _tell_left_out(report: _Report, latent: Sequence[Run], drawn: Sequence[Run]) -> None:
    left = [run.name for run in latent if run not in drawn]
    if left:
        report.say(f"Not drawn, for want of a finite number: {_listed(left)}.")


def _named(name: str, title: str, data: str, alone: bool) -> tuple[str, str]:
    """A figure's file name and title; they have the data's name where there are several data sets."""
    if alone:
        return name, title
    return f"{name}-{re.sub(r'[^A-Za-z0-9]+', '-', data).strip('-')}", f"{title}: {data}"


def _markdown(head: Mapping[str, str], rows: Iterable[Row]) -> str:
    lines = [list(head.values()), ["---"] * len(head)]
    lines += [[_escape(_shown(row.get(key))) for key in head] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if 0.1 <= abs(value) < 1e6 else f"{value:.2g}"
    return "" if value is None else str(value)


def _escape(text: str) -> str:
    return re.sub(r"([|*_<>\[\]`\\])", r"\\\1", text.replace("\n", " "))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(_escape(name) for name in names)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
