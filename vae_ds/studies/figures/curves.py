"""The figure of a training phase: mutual information, active units and KL at each validation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ds.studies.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {"mi": "mutual information (nats)", "au": "active units", "kl": "KL (nats)"}
LINES = 6  # in a panel at most
MARKS = 10  # on a curve at most
# The least range of an axis: a smaller one would show noise as if it were a difference.
LEAST_RANGES = {"mi": 0.5, "au": 4.0, "kl": 2.0}
LOG_RATIO = 10  # of the largest to the smallest KL, from which on its axis is logarithmic
WIDTH = 7.4
ROW_HEIGHT = 2.1


@dataclass(frozen=True)
class Curve:
    """A run during a phase: rows with `step`, applied steps since the phase began, and any of PANELS."""

    label: str
    rows: tuple[Mapping[str, Any], ...]
    colour: str
    is_reference: bool = False


def phase(folder: Path, name: str, title: str, curves: Sequence[Curve]) -> None:
    """Write NAME.png and NAME.svg: a column for each of PANELS, and as many rows as six lines a panel need.

    A panel of active units that are the same everywhere is left out; the title then has their number.
    """
    rows = split(curves)
    keys, subtitle = list(PANELS), ""
    units = {row["au"] for curve in curves for row in curve.rows if row.get("au") is not None}
    if len(units) == 1:
        keys, subtitle = [key for key in keys if key != "au"], f"\nactive units: {units.pop()} at every validation"
    legends = [style.legend_height(WIDTH, [curve.label for curve in row]) for row in rows]
    heights = [ROW_HEIGHT + legend for legend in legends]
    with style.figure(WIDTH, sum(heights) + 0.25 + 0.15 * bool(subtitle)) as figure:
        figure.suptitle(title + subtitle, fontsize=9)
        bands = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
        for band, row in zip(bands, rows, strict=True):
            for axes, key in zip(band.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
                axes.set(title=PANELS[key], xlabel="applied steps in the phase")
                _draw(axes, key, row)
                _set_range(axes, key, curves)
            style.legend(band, band.axes[0], WIDTH)
        style.save(figure, folder, name)


def split(curves: Sequence[Curve]) -> list[list[Curve]]:
    """The curves of each row of panels, at most LINES; the reference is in every row.

    Labels that differ only in their numbers stay together where they fit into one row.
    """
    reference = next((curve for curve in curves if curve.is_reference), None)
    others = [curve for curve in curves if curve is not reference]
    room = LINES - (reference is not None)
    alike: dict[str, list[Curve]] = {}
    for curve in others if len(others) <= room else sorted(others, key=lambda curve: natural_order(curve.label)):
        alike.setdefault(natural_order(curve.label)[0], []).append(curve)
    rows: list[list[Curve]] = [[]]
    for members in alike.values():
        # Members that need more than one row are spread evenly.
        count = -(-len(members) // room)
        size = -(-len(members) // count)
        for start in range(0, len(members), size):
            part = members[start : start + size]
            if len(rows[-1]) + len(part) > room:
                rows.append([])
            rows[-1] += part
    return [[*filter(None, [reference]), *row] for row in rows]


def natural_order(label: str) -> tuple[str, list[float]]:
    """A key to sort labels by: the words without the numbers, then the numbers."""
    number = r"\d+(?:\.\d+)?"
    return re.sub(number, "#", label), [float(digits) for digits in re.findall(number, label)]


def _draw(axes: Axes, key: str, curves: Sequence[Curve]) -> None:
    for number, curve in enumerate(curves):
        rows = [row for row in curve.rows if row.get(key) is not None]
        xs, ys = [row["step"] for row in rows], [row[key] for row in rows]
        every = -(-len(xs) // MARKS) or 1
        axes.plot(
            xs, ys, label=curve.label, color=curve.colour, markevery=every, clip_on=False, zorder=3,
            **style.line(number),
        )  # fmt: skip


def _set_range(axes: Axes, key: str, curves: Sequence[Curve]) -> None:
    """The same range in every row, from the lowest value to the highest."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    values = [row[key] for curve in curves for row in curve.rows if row.get(key) is not None]
    if not values:
        return
    low, high = min(values), max(values)
    if key == "au":
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if key == "kl" and low > 0 and high > LOG_RATIO * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_ylim(low / 1.15, high * 1.15)
        return
    spread = max(1.1 * (high - low), LEAST_RANGES[key])
    middle = (low + high) / 2
    axes.set_ylim(middle - spread / 2, middle + spread / 2)
