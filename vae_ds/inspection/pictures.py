"""Draws maps, grids of texts, gains by position and the KL of the units, as PNG, SVG or PDF.

Shapes: N texts, T positions, S validations, L latent units.
"""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vae_ds.runtime import records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vae_ds.inspection.maps import Grid, Plane
    from vae_ds.inspection.positions import Gains
    from vae_ds.inspection.targets import Values

ENDINGS = (".png", ".svg", ".pdf")
# Okabe and Ito 2008, which colour-blind readers can distinguish; yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX"
GREY = "#c8c8c8"
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # a text may contain a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "vae_ds",  # without it, the identifiers inside an SVG are random
}
MOST_CLASSES = 12
NAME_CHARACTERS = 28
CELL_CHARACTERS = 26
LEAST_SHARE = 0.05  # of the texts, for a position to be drawn


def draw_map(path: Path, plane: Plane, values: Values | None, title: str, corners: Sequence[int] = ()) -> None:
    """Write a point for each text, coloured by its value if it is one of the 12 most frequent, otherwise grey."""
    counts = Counter(value for value in values or () if value is not None)
    named = [value for value, _ in counts.most_common(MOST_CLASSES)]
    with _figure(7.4, 5.6) as figure:
        axes = figure.subplots()
        axes.set(xlabel=plane.axes[0], ylabel=plane.axes[1], title=title)
        column = np.array([None] * len(plane.xy_N2) if values is None else list(values), dtype=object)
        x_N, y_N = plane.xy_N2.T
        size = max(2.0, min(16.0, 16000 / len(plane.xy_N2)))
        rest_N = ~np.isin(column, named) if named else np.ones(len(column), bool)
        plain = GREY if named else COLOURS[0]
        if rest_N.any():
            axes.scatter(x_N[rest_N], y_N[rest_N], s=size, c=plain, linewidths=0, label="others" if named else None)
        for number, value in enumerate(named):
            own_N = column == value
            axes.scatter(
                x_N[own_N], y_N[own_N], s=size, c=COLOURS[number % len(COLOURS)], linewidths=0, alpha=0.75,
                marker=MARKERS[number // len(COLOURS)], label=f"{_short(value)} ({counts[value]:,})",
            )  # fmt: skip
        for letter, row in zip("ABCD", corners, strict=False):
            axes.annotate(letter, plane.xy_N2[row], fontsize=10, fontweight="bold", ha="center", va="center")
        if named:
            legend = figure.legend(loc="outside right upper", markerscale=(36 / size) ** 0.5, fontsize=7.5)
            for handle in filter(None, legend.legend_handles):
                handle.set_alpha(1)
        _save(figure, path)


def draw_grid(path: Path, grid: Grid, title: str) -> None:
    """Write the texts of a grid, each in its cell. The corners are A and B above, C and D below."""
    size = len(grid.texts)
    with _figure(2.2 * size, 0.95 * size + 0.5) as figure:
        axes = figure.subplots()
        axes.set(title=title, xlim=(-0.02, size + 0.02), ylim=(size + 0.02, -0.02), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
        letters = {(0, 0): "A", (0, size - 1): "B", (size - 1, 0): "C", (size - 1, size - 1): "D"}
        for row, texts in enumerate(grid.texts):
            for column, text in enumerate(texts):
                lines = textwrap.wrap(text, CELL_CHARACTERS, max_lines=5, placeholder=" ...")
                head = [letters[row, column]] if (row, column) in letters else []
                axes.text(column + 0.5, row + 0.5, "\n".join([*head, *lines]), ha="center", va="center", fontsize=7.5)
                axes.add_patch(_frame(column, row))
        _save(figure, path)


def draw_positions(path: Path, gains: Gains, title: str) -> None:
    """Write z_gain by position, with standard errors; the end-of-sentence token stands apart on the right."""
    texts = gains.count_T.max(initial=1)
    shown_T = np.flatnonzero(gains.count_T >= max(2, LEAST_SHARE * texts))
    with _figure(7.4, 3.0) as figure:
        axes = figure.subplots()
        axes.bar(shown_T + 1, gains.gain_T[shown_T], yerr=gains.se_T[shown_T], color=COLOURS[0], ecolor=COLOURS[6])
        last = shown_T.max(initial=0) + 1
        ticks = [int(tick) for tick in np.unique(np.linspace(1, last, min(12, last)).round())]
        names = [str(tick) for tick in ticks]
        if gains.ends:
            axes.bar(last + 2, gains.end, yerr=gains.end_se, color=COLOURS[1], ecolor=COLOURS[6])
            ticks, names = [*ticks, last + 2], [*names, "end"]
        axes.axhline(0, color=COLOURS[6], linewidth=0.6)
        axes.set_xticks(ticks, names)
        axes.set(xlabel="position of the token", ylabel="z_gain (nats per token)", title=title)
        _save(figure, path)


def draw_units(path: Path, steps: Sequence[int], kl_SL: np.ndarray, title: str) -> None:
    """Write the KL of each unit at each validation. The units with the largest KL at the end have a colour."""
    order_L = np.argsort(-kl_SL[-1], kind="stable")
    with _figure(7.4, 3.4) as figure:
        axes = figure.subplots()
        for unit in order_L[len(COLOURS) - 1 :]:
            axes.plot(steps, kl_SL[:, unit], color=GREY, linewidth=0.8)
        for colour, unit in zip(COLOURS[:-1], order_L, strict=False):
            axes.plot(steps, kl_SL[:, unit], color=colour, linewidth=1.4, marker="o", markersize=3, label=f"z[{unit}]")
        axes.set(xlabel="step", ylabel="KL of a unit (nats)", title=title)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper")
        _save(figure, path)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of a size in inches, which needs no display and follows no matplotlibrc."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {**matplotlib.rcParamsDefault, **STYLE}
    with matplotlib.rc_context(style):
        drawn = Figure(figsize=(width, height), dpi=120, layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column, row), 1, 1, fill=False, edgecolor=GREY, linewidth=0.6)


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    kind = path.suffix.lower()[1:]
    # A date would make each file of the same picture another one.
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    figure.savefig(content, format=kind, metadata=undated)
    records.replace_file(path, _small(content) if kind == "png" else content.getvalue())


def _small(png: io.BytesIO) -> bytes:
    """The picture with at most 256 colours: the loss is invisible, and the file has a third of the size."""
    from PIL import Image

    few = Image.open(png).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    small = io.BytesIO()
    few.save(small, format="png", optimize=True)
    return small.getvalue()


def _short(value: str) -> str:
    return textwrap.shorten(value, NAME_CHARACTERS, placeholder="...") or value[:NAME_CHARACTERS]
