"""The look of the figures: colours, lines, sizes, legends, and the two file formats.

Colours are from the palette of Okabe and Ito, which colour-blind readers can distinguish. Nothing here needs a display.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ds.runtime import records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito 2008, without yellow, which is too pale for a line on white, and without black, the reference's colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLACK = "#000000"
GREY = "#767676"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "h", "d")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
# Shades of a colour: below 0 a share of black is mixed in, above 0 a share of white.
SHADES = (-0.45, -0.2, 0.05, 0.3, 0.5)
LEGEND_CHARACTERS = 13  # of a legend, per inch
DPI = 120
PALETTE = 256  # colours kept in a PNG: the loss is invisible, and the file has a third of the size

STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "text.parse_math": False,  # a name may contain a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "vae_ds",  # without it, the identifiers inside an SVG are random
}


def shade(hue: int, number: int | None) -> str:
    """A colour as #RRGGBB: shade `number` of colour `hue`, or the colour itself. Both repeat after their last."""
    colour = COLOURS[hue % len(COLOURS)]
    mixed = 0.0 if number is None else SHADES[number % len(SHADES)]
    other = 255 if mixed > 0 else 0
    parts = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return "#" + "".join(f"{round(part + abs(mixed) * (other - part)):02X}" for part in parts)


def line(number: int) -> dict[str, Any]:
    """Marker and dashes of a line of a panel, which distinguish it without colour, too."""
    return {"marker": MARKERS[number % len(MARKERS)], "linestyle": DASHES[number % len(DASHES)]}


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of a size in inches, in this style alone: a user's matplotlibrc has no effect on a report."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {**matplotlib.rcParamsDefault, **STYLE}
    with matplotlib.rc_context(style):
        drawn = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn


def legend_height(width: float, labels: Sequence[str]) -> float:
    """Inches that a legend with these labels needs below a figure."""
    return 0.16 * -(-len(labels) // _columns(width, labels)) + 0.1 if labels else 0.0


def legend(drawn: Figure | SubFigure, axes: Axes, width: float) -> None:
    """A legend of the axes below the figure, which is `width` inches wide."""
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=_columns(width, labels), handlelength=3.5)


def save(drawn: Figure, folder: Path, name: str) -> None:
    """Write NAME.png and NAME.svg. The text of the SVG stays text."""
    from PIL import Image

    pixels = io.BytesIO()
    drawn.savefig(pixels, format="png")
    small = io.BytesIO()
    # The default method, median cut, moves the colours of small marks visibly.
    few = Image.open(pixels).convert("RGB").quantize(PALETTE, method=Image.Quantize.MAXCOVERAGE)
    few.save(small, format="png", optimize=True)
    records.replace_file(folder / f"{name}.png", small.getvalue())
    vectors = io.BytesIO()
    drawn.savefig(vectors, format="svg", metadata={"Date": None})
    records.replace_file(folder / f"{name}.svg", vectors.getvalue())


def _columns(width: float, labels: Sequence[str]) -> int:
    """Columns of a legend so many inches wide; the sample of a line takes seven characters."""
    widest = max(map(len, labels), default=0) + 7
    return max(1, min(len(labels), int(LEGEND_CHARACTERS * width) // widest))
