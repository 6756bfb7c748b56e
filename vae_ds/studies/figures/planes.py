"""Figures with one point a run: the rate-distortion plane, and likelihood against information."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vae_ds.studies.figures import label_placement, style
from vae_ds.studies.figures.label_placement import Box, Label, Segment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.4
HEIGHT = 4.4
SPACE = 0.06  # of the data's range, beyond it on each side
# Fewer runs than this have no outliers. A cut must at least halve the axis.
LEAST_RUNS = 4
FENCE = 1.5  # Tukey's: times the range of the middle half of the runs, above it
NOTE_CHARACTERS = 120
HARD_SPACE = "\N{NO-BREAK SPACE}"
LABEL_SIZE = 7
REFERENCE_MARKER = "*"  # larger than the others and in front of them
POINT_PIXELS = 6  # half the side of a point's box
LEADER_PIXELS = 11  # a label further away has a line to its point
ABOVE = "above_yardstick"


@dataclass(frozen=True)
class Point:
    """A run in a plane, in the units of its axes.

    `group`: its entry in the legend, shared by the points that look alike; None for a point without an entry.
    `group_colour`: that of the entry, where the points have shades of it.
    `is_named`: whether its label is written beside it, if there is room; earlier points go first.
    `x_se`, `y_se`: standard errors, drawn as bars; None for none.
    """

    label: str
    x: float
    y: float
    colour: str
    marker: str
    group: str | None = None
    group_colour: str | None = None
    is_named: bool = True
    x_se: float | None = None
    y_se: float | None = None


@dataclass(frozen=True)
class Limit:
    """The highest value that an estimate can have: `nats`, which is ln of `count`, as the legend names it."""

    nats: float
    count: str

    @property
    def label(self) -> str:
        return f"limit of the estimate, ln {self.count}: {self.nats:.2f} nats"


def rate_distortion(
    folder: Path,
    name: str,
    title: str,
    points: Sequence[Point],
    yardsticks: Mapping[str, float],
    entropy_nats: float | None = None,
) -> list[Point]:
    """Write the rate-distortion plane: x is the KL, y the reconstruction loss, both in nats per sentence.

    On a falling line nelbo = x + y is the same. `yardsticks`: the loss of plain language models by label.
    `entropy_nats`: of a sentence of the source, where it is known. Returns the outliers, which are beyond the axes.
    """
    marks = [(f"{label}: {nll:.1f} nats", nll, "--") for label, nll in yardsticks.items()]
    if entropy_nats is not None:
        marks.append((f"entropy of the source: {entropy_nats:.1f} nats", entropy_nats, "-"))
    inside, outliers = _split(points)
    note = _note(outliers, "kl", "rec")
    labels = [*_groups(inside), *(label for label, *_ in marks)]
    with style.figure(WIDTH, _height(labels, note)) as figure:
        axes = figure.subplots()
        _title(figure, axes, title, note)
        axes.set(xlabel="rate: KL (nats per sentence)", ylabel="distortion: rec (nats per sentence)")
        axes.grid(False)
        left = min(point.x for point in inside)
        _set_limits(axes, inside, [(left, nll - left) for _, nll, _ in marks])
        _scatter(axes, inside)
        lines = []
        for label, nll, dash in marks:
            axes.axline((0, nll), slope=-1, color=style.BLACK, linewidth=1, linestyle=dash, label=label)
            lines.append([(0.0, nll), (nll, 0.0)])
        texts = _lines_of_equal_sums(axes)
        _legend(figure, axes)
        _name_points(figure, axes, inside, lines, texts)
        style.save(figure, folder, name)
    return outliers


def perplexity_information(
    folder: Path,
    name: str,
    title: str,
    metrics: tuple[str, str],
    points: Sequence[Point],
    front: Sequence[Point],
    limit: Limit | None,
    yardsticks: Mapping[str, float],
    words_per_sentence: float | None,
) -> list[Point]:
    """Write a likelihood (y, nats per sentence, lower is better) against the mutual information (x).

    `metrics`: the names of x and y; y `above_yardstick` is the difference to the language model. `front`: the points of
    the Pareto front from the lowest x on. `limit`: that of the estimate x. `yardsticks`: y of plain language models,
    which have no x, by label. With `words_per_sentence`, an axis on the right has the perplexity per word, for
    `above_yardstick` relative to that of the language model. Returns the outliers, which are beyond the axes.
    """
    (x_name, y_name), is_relative = metrics, metrics[1] == ABOVE
    inside, outliers = _split(points, x_too=False)
    note = _note(outliers, x_name, y_name)
    marks = [(label if is_relative else f"{label}: {nll:.1f} nats", nll) for label, nll in yardsticks.items()]
    labels = [*_groups(inside), "Pareto front", *([limit.label] if limit else []), *(label for label, _ in marks)]
    with style.figure(WIDTH, _height(labels, note)) as figure:
        axes = figure.subplots()
        _title(figure, axes, title, note)
        what = "iw_nll minus that of the language model" if is_relative else y_name
        axes.set(xlabel=f"{x_name}: mutual information (nats)", ylabel=f"{what} (nats per sentence)")
        right = max(point.x for point in inside)
        # A limit far away would push the points together.
        if limit is not None and limit.nats - right > max(1.0, 0.3 * right):
            limit = None
        low = min(point.y for point in inside)
        further = [*((right, nll) for _, nll in marks), (limit.nats if limit else right, low)]
        if is_relative:
            # The language model's line would coincide with the lower edge.
            further.append((right, -SPACE * max(abs(point.y) for point in inside)))
        _set_limits(axes, inside, further)
        _scatter(axes, inside)
        steps = [(point.x, point.y) for point in front]
        axes.plot(*zip(*steps, strict=True), color=style.GREY, linewidth=1, drawstyle="steps-pre", label="Pareto front")
        corners = [(x, y) for (x, _), (_, y) in itertools.pairwise(steps)]
        lines = [[corner for pair in zip(steps, [*corners, steps[-1]], strict=True) for corner in pair]]
        if limit is not None:
            axes.axvline(limit.nats, color=style.BLACK, linewidth=1, linestyle=":", label=limit.label)
            lines.append([(limit.nats, value) for value in axes.get_ylim()])
        for label, nll in marks:
            axes.axhline(nll, color=style.BLACK, linewidth=1, linestyle="--", label=label)
            lines.append([(value, nll) for value in axes.get_xlim()])
        if words_per_sentence is not None:
            _perplexity_axis(axes, words_per_sentence, is_relative)
        lines += _bars(inside)
        _legend(figure, axes)
        _name_points(figure, axes, inside, lines, [])
        style.save(figure, folder, name)
    return outliers


def highest_shown(values: Sequence[float]) -> float:
    """The highest of `values` that an axis should show; those above are outliers (Tukey's fence).

    It is the maximum, unless the outliers would take more than half of the axis.
    """
    if len(values) < LEAST_RUNS:
        return max(values)
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    highest = max(value for value in values if value <= upper + FENCE * (upper - lower))
    cut_is_worth_it = max(values) - min(values) > 2 * (highest - min(values))
    return highest if cut_is_worth_it else max(values)


def describe(point: Point) -> str:
    """A point in a note, as `name (x, y)`."""
    x, y = (f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" for value in (point.x, point.y))
    return f"{point.label} ({x}, {y})"


def _split(points: Sequence[Point], x_too: bool = True) -> tuple[list[Point], list[Point]]:
    """The points that the axes show, and the outliers in y or, if `x_too`, in x."""
    top = highest_shown([point.y for point in points])
    right = highest_shown([point.x for point in points]) if x_too else math.inf
    outliers = sorted(
        (point for point in points if point.y > top or point.x > right),
        key=lambda point: (point.y, point.x, point.label),
    )
    return [point for point in points if point not in outliers], outliers


def _note(outliers: Sequence[Point], x: str, y: str) -> str:
    """The sentence that names the outliers, in lines; empty without any."""
    if not outliers:
        return ""
    items = [describe(point).replace(" ", HARD_SPACE) for point in outliers]
    text = f"Beyond the axes, with ({x}, {y}): {'; '.join(items)}"
    return textwrap.fill(text, NOTE_CHARACTERS, break_on_hyphens=False).replace(HARD_SPACE, " ")


def _title(figure: Figure, axes: Axes, title: str, note: str) -> None:
    figure.suptitle(title, fontsize=9)
    if note:
        axes.set_title(note, fontsize=LABEL_SIZE, color="#444444", loc="left")


def _height(labels: Sequence[str], note: str) -> float:
    return HEIGHT + style.legend_height(WIDTH, labels) + 0.13 * (note.count("\n") + 1 if note else 0)


def _groups(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each entry of the legend."""
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.group is not None:
            found.setdefault(point.group, []).append(point)
    return found


def _set_limits(axes: Axes, points: Sequence[Point], further: Sequence[tuple[float, float]]) -> None:
    """Limits around the points, their bars and `further` positions, with a margin; not below 0 beside values from 0 on.

    A bar that would take more of the axis than the points is cut.
    """
    for which, places, others in (
        ("x", [(point.x, point.x_se or 0.0) for point in points], [x for x, _ in further]),
        ("y", [(point.y, point.y_se or 0.0) for point in points], [y for _, y in further]),
    ):
        values = [value for value, _ in places] + others
        widest = max(values) - min(values) or math.inf
        values += [value + sign * min(se, widest) for value, se in places for sign in (-1, 1)]
        low, high = min(values), max(values)
        space = SPACE * (high - low or abs(high) or 1.0)
        start = 0.0 if low >= 0 > low - space else low - space
        axes.set(**{f"{which}lim": (start, high + space)})


def _scatter(axes: Axes, points: Sequence[Point]) -> None:
    for point in points:
        if point.x_se is not None or point.y_se is not None:
            axes.errorbar(
                [point.x], [point.y], xerr=point.x_se, yerr=point.y_se, fmt="none", ecolor=point.colour,
                elinewidth=0.8, alpha=0.7, zorder=3.5,
            )  # fmt: skip
        axes.plot(
            [point.x], [point.y], color=point.colour, marker=point.marker, markeredgecolor="white",
            markersize=9 if point.marker == REFERENCE_MARKER else 6, markeredgewidth=0.4, linestyle="none",
            clip_on=False, zorder=4.5 if point.marker == REFERENCE_MARKER else 4,
        )  # fmt: skip
    for group, members in _groups(points).items():
        first = members[0]
        axes.plot([], [], color=first.group_colour or first.colour, marker=first.marker, linestyle="none", label=group)


def _bars(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The bars of standard errors as lines, which labels avoid."""
    across = [[(p.x - p.x_se, p.y), (p.x + p.x_se, p.y)] for p in points if p.x_se]
    return across + [[(p.x, p.y - p.y_se), (p.x, p.y + p.y_se)] for p in points if p.y_se]


def _lines_of_equal_sums(axes: Axes) -> list[Box]:
    """Faint lines on which x + y is the same, each with its sum. Returns where the sums are written, in pixels."""
    from matplotlib.ticker import MaxNLocator

    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    texts = []
    for level in MaxNLocator(8).tick_values(left + bottom, right + top):
        if not left + bottom < level < right + top:
            continue
        axes.axline((left, level - left), slope=-1, color=style.GREY, linewidth=0.5, linestyle=":", zorder=1)
        # Along the upper and the right edge, where the lines begin.
        x = max(left, level - top)
        shift = 0.02 * (right - left)
        if x + 3 * shift < right:
            texts.append(
                axes.text(
                    x + shift, level - x - shift, f"nelbo {level:g}", color=style.GREY, fontsize=6, rotation=-45,
                    transform_rotates_text=True, rotation_mode="anchor", va="bottom", clip_on=True, zorder=1,
                )
            )  # fmt: skip
    axes.set(xlim=(left, right), ylim=(bottom, top))
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    extents = [text.get_window_extent() for text in texts]
    return [Box(extent.x0, extent.y0, extent.x1, extent.y1) for extent in extents]


def _perplexity_axis(axes: Axes, words: float, is_relative: bool) -> None:
    """The perplexity per word on the right: exp(nats per sentence / words per sentence).

    Of a difference in nats, it is the perplexity divided by that of the language model.
    """
    import numpy

    right = axes.secondary_yaxis(
        "right",
        functions=(
            lambda nats: numpy.exp(numpy.minimum(numpy.asarray(nats) / words, 700.0)),
            lambda perplexity: words * numpy.log(numpy.maximum(perplexity, 1e-9)),
        ),
    )
    beside = ", relative to the language model" if is_relative else f" ({words:.2f} words per sentence)"
    right.set_ylabel(f"perplexity per word{beside}")
    right.yaxis.set_major_formatter("{x:g}")
    right.spines["right"].set_visible(True)


def _legend(figure: Figure, axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        style.legend(figure, axes, WIDTH)


def _name_points(
    figure: Figure,
    axes: Axes,
    points: Sequence[Point],
    lines: Sequence[Sequence[tuple[float, float]]],
    taken: Sequence[Box],
) -> None:
    """Write the labels of the named points where there is room. The layout of the figure must not change afterwards."""
    figure.draw_without_rendering()
    pixels = axes.transData.transform
    anchors = [(float(x), float(y)) for x, y in pixels([(point.x, point.y) for point in points])]
    boxes = [Box(x, y, x, y).grown(POINT_PIXELS) for x, y in anchors]
    segments: list[Segment] = []
    for line in lines:
        ends = [(float(x), float(y)) for x, y in pixels(line)]
        segments += [(x, y, end_x, end_y) for (x, y), (end_x, end_y) in itertools.pairwise(ends)]
    named = [(point, anchor) for point, anchor in zip(points, anchors, strict=True) if point.is_named]
    labels = [Label(x, y, *_size(axes, point.label)) for point, (x, y) in named]
    area = axes.get_window_extent()
    bounds = Box(area.x0 + 2, area.y0 + 2, area.x1 - 2, area.y1 - 2)
    placed = label_placement.place(labels, [*boxes, *taken], segments, bounds)
    for (point, (x, y)), label, box in zip(named, labels, placed, strict=True):
        if box is not None:
            _write(axes, point, (x, y), label, box, 72 / figure.dpi)


def _size(axes: Axes, text: str) -> tuple[float, float]:
    """Width and height of a label in pixels."""
    drawn = axes.text(0, 0, text, fontsize=LABEL_SIZE)
    extent = drawn.get_window_extent()
    drawn.remove()
    return float(extent.width), float(extent.height)


def _write(
    axes: Axes, point: Point, anchor: tuple[float, float], label: Label, box: Box, points_per_pixel: float
) -> None:
    (x, y), end = anchor, label_placement.leader(label, box)[2:]
    if math.dist(anchor, end) > LEADER_PIXELS:
        line = axes.annotate(
            "", (point.x, point.y), ((end[0] - x) * points_per_pixel, (end[1] - y) * points_per_pixel),
            textcoords="offset points", zorder=3,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": style.GREY, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        line.set_in_layout(False)
    text = axes.annotate(
        point.label, (point.x, point.y), ((box.left - x) * points_per_pixel, (box.bottom - y) * points_per_pixel),
        textcoords="offset points", fontsize=LABEL_SIZE, va="bottom", ha="left", zorder=5,
    )  # fmt: skip
    text.set_in_layout(False)
