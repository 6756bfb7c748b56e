"""The report's figures: curves along a phase, the rate-distortion plane, perplexity against mutual information.

Colours are from Okabe and Ito's palette, which the colour-blind can tell apart; a marker and a dash of its own tell a
run in grey, too. Each figure is written as PNG and as SVG, whose text stays text. Nothing here needs a display.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ds.runtime import records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008 without yellow, which is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
GREY = "#767676"
PANELS = {"mi": "MI (nats)", "au": "active units", "kl": "KL (nats)"}
LEGEND_CHARACTERS = 14  # of small print, an inch
MARKS = 10  # at most, on a curve
DPI = 100
PALETTE = 96  # colours kept in a PNG: no eye sees the loss, and the file is a third

STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "text.parse_math": False,  # a name may have a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "vae_ds",  # else the names inside an SVG are drawn anew each time
}


@dataclass(frozen=True)
class Curve:
    """A run along a phase: rows with `step`, applied steps since the phase began, and any of PANELS."""

    label: str
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Point:
    """A run in a plane, in the units of its axes; those of a `group` look alike and have one entry in the legend."""

    label: str
    x: float
    y: float
    group: str | None = None


def phase(folder: Path, name: str, title: str, curves: Sequence[Curve]) -> None:
    """Write NAME.png and NAME.svg: MI, active units and KL along a phase, one line a run."""
    with _figure(7.4, 2.6, [curve.label for curve in curves]) as figure:
        panels = figure.subplots(1, len(PANELS))
        for axes, (key, label) in zip(panels, PANELS.items(), strict=True):
            axes.set(title=label, xlabel="applied steps in the phase")
            for number, curve in enumerate(curves):
                rows = [row for row in curve.rows if row.get(key) is not None]
                xs, ys = [row["step"] for row in rows], [row[key] for row in rows]
                every = -(-len(xs) // MARKS) or 1
                axes.plot(xs, ys, label=curve.label, markevery=every, clip_on=False, zorder=3, **_style(number))
            axes.set_ylim(bottom=0)
        figure.suptitle(title, fontsize=9)
        _legend(figure, panels[0])
        _save(figure, folder, name)


def plane(
    folder: Path,
    name: str,
    title: str,
    runs: Sequence[Point],
    yardsticks: Mapping[str, float],
    entropy_nats: float | None = None,
) -> None:
    """Write the rate-distortion plane: a point's x is its KL, its y its rec, both in nats per sentence.

    On a falling line -ELBO is the same. `yardsticks`: the NLL of a plain language model by its label; below its line a
    run's bound is the better one. `entropy_nats`: of the source, where it is known; on average no model is below it.
    """
    marks = [(f"{label}: {nll:.1f} nats", nll, "--") for label, nll in yardsticks.items()]
    if entropy_nats is not None:
        marks.append((f"H(x) of the source: {entropy_nats:.1f} nats", entropy_nats, "-"))
    with _figure(5.6, 4.2, [*_entries(runs), *(label for label, *_ in marks)]) as figure:
        axes = figure.subplots()
        axes.set(title=title, xlabel="rate: KL (nats per sentence)", ylabel="distortion: rec (nats per sentence)")
        axes.grid(False)
        _scatter(axes, runs)
        for number, (label, nll, dash) in enumerate(marks):
            axes.plot([0], [nll], marker=(3 + number, 0, 0), color="black", linestyle="none", clip_on=False, zorder=3)
            axes.axline((0, nll), slope=-1, color="black", linewidth=1, linestyle=dash, label=label)
        axes.margins(0.1)
        axes.set_xlim(left=0)
        _equal_sums(axes)
        _legend(figure, axes)
        _save(figure, folder, name)


def front(
    folder: Path,
    name: str,
    title: str,
    ylabel: str,
    runs: Sequence[Point],
    best: Sequence[Point],
    ceiling_nats: float | None,
    yardsticks: Mapping[str, float],
) -> None:
    """Write perplexity (y, lower is better) against mutual information (x, higher is better), one point a run.

    `best`: the points of the Pareto front from the lowest MI on, numbered where points are in groups. `ceiling_nats`:
    what MI cannot pass. `yardsticks`: perplexities of plain language models, which have no MI, by label.
    """
    lines = [f"{label}: {ppl:.1f}" for label, ppl in yardsticks.items()]
    with _figure(5.6, 3.8, [*_entries(runs), *lines, "Pareto front", "ceiling of MI"]) as figure:
        axes = figure.subplots()
        axes.set(title=title, xlabel="MI (nats)", ylabel=ylabel)
        heights = [*(point.y for point in runs), *yardsticks.values()]
        if max(heights) > 10 * min(heights):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        _scatter(axes, runs)
        axes.plot(
            [point.x for point in best], [point.y for point in best],
            color=GREY, linewidth=1, drawstyle="steps-pre", label="Pareto front",
        )  # fmt: skip
        for number, point in enumerate(best if any(point.group for point in runs) else (), 1):
            axes.annotate(f"{number}", (point.x, point.y), (4, -3), textcoords="offset points", fontsize=7, va="top")
        if ceiling_nats is not None:
            axes.axvline(ceiling_nats, color="black", linewidth=1, linestyle=":", label=f"ceiling: {ceiling_nats:.2f}")
        for label, ppl in zip(lines, yardsticks.values(), strict=True):
            axes.axhline(ppl, color="black", linewidth=1, linestyle="--", label=label)
        axes.margins(0.1)
        axes.set_xlim(left=0)
        _legend(figure, axes)
        _save(figure, folder, name)


def _style(number: int) -> dict[str, str]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def _scatter(axes: Axes, points: Sequence[Point]) -> None:
    for number, (label, members) in enumerate(_entries(points).items()):
        xs, ys = [point.x for point in members], [point.y for point in members]
        style = _style(number) | {"linestyle": "none"}
        axes.plot(xs, ys, label=label, clip_on=False, zorder=4, **style)  # type: ignore[arg-type]


def _entries(points: Sequence[Point]) -> dict[str, list[Point]]:
    """What the legend names, with its points."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.label if point.group is None else point.group, []).append(point)
    return found


def _equal_sums(axes: Axes) -> None:
    """Faint lines on which x + y is the same, each with its sum; the limits of the axes stay."""
    from matplotlib.ticker import MaxNLocator

    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(left, right), ylim=(bottom, top))
    for level in MaxNLocator(8).tick_values(left + bottom, right + top):
        if not left + bottom < level < right + top:
            continue
        axes.axline((left, level - left), slope=-1, color=GREY, linewidth=0.5, linestyle=":", zorder=1)
        x = max(left + 0.015 * (right - left), level - top + 0.04 * (top - bottom))
        axes.text(
            x, level - x, f"-ELBO {level:g}", color=GREY, fontsize=6, rotation=-45, transform_rotates_text=True,
            rotation_mode="anchor", va="bottom", clip_on=True,
        )  # fmt: skip


@contextmanager
def _figure(width: float, height: float, labels: Sequence[str]) -> Iterator[Figure]:
    """A figure in inches, made higher by what its legend needs."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(labels) // _columns(width, labels))
    # A user's own matplotlibrc must not decide what a report looks like.
    style: Any = {**matplotlib.rcParamsDefault, **STYLE}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height + 0.16 * lines), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def _columns(width: float, labels: Sequence[str]) -> int:
    """Columns of the legend of a figure so many inches wide; a line's sample takes six characters."""
    widest = max(len(label) for label in labels) + 6
    return max(1, min(len(labels), int(LEGEND_CHARACTERS * width) // widest))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = _columns(figure.get_figwidth(), labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3)


def _save(figure: Figure, folder: Path, name: str) -> None:
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    small = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(PALETTE).save(small, format="png", optimize=True)
    records.replace_file(folder / f"{name}.png", small.getvalue())
    vectors = io.BytesIO()
    figure.savefig(vectors, format="svg", metadata={"Date": None})
    records.replace_file(folder / f"{name}.svg", vectors.getvalue())
