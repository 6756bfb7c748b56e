"""Places labels beside their points: no label on another label or on a point, and few lines crossed.

All positions are in pixels with the origin at the lower left. The result is a function of the input alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Segment = tuple[float, float, float, float]  # x and y of one end, then of the other

ANGLES = tuple(math.radians(degrees) for degrees in (0, 45, -45, 90, -90, 135, -135, 180))
FAR_ANGLES = tuple(math.radians(15 * number) for number in range(24))
NEAR = 8  # pixels between the centre of a point and its label
FAR = (14, 21, 30, 42, 56, 72, 90, 110, 135, 165, 200, 240)
MARGIN = 2  # pixels around a label that stay free
SWEEPS = 2  # over all labels, after the first placement
# Costs in pixels of distance.
LINE_CROSSED = 12.0
POINT_CROSSED = 60.0
LEADER_CROSSED = 150.0


@dataclass(frozen=True)
class Box:
    """A rectangle with sides parallel to the axes."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Box") -> bool:
        """Whether the two share more than an edge."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def contains(self, other: "Box") -> bool:
        """Whether the other is inside completely."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.bottom <= other.bottom
            and other.top <= self.top
        )

    def is_crossed_by(self, segment: Segment) -> bool:
        """Whether a part of the segment is inside (Liang and Barsky's clipping)."""
        x, y, end_x, end_y = segment
        enters, leaves = 0.0, 1.0
        for step, low, high in ((end_x - x, self.left - x, self.right - x), (end_y - y, self.bottom - y, self.top - y)):
            if step == 0:
                if low > 0 or high < 0:
                    return False
                continue
            first, last = sorted((low / step, high / step))
            enters, leaves = max(enters, first), min(leaves, last)
        return enters <= leaves

    def grown(self, by: float) -> "Box":
        """The box with a margin."""
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)


@dataclass(frozen=True)
class Label:
    """A text of some size that belongs to the point (x, y)."""

    x: float
    y: float
    width: float
    height: float


def place(labels: Sequence[Label], points: Sequence[Box], lines: Sequence[Segment], bounds: Box) -> list[Box | None]:
    """A box for each label, the most important label first; None for a label that has no free place.

    `points`: boxes that stay free, with those of the labels' own points. `lines` should stay free, but may be crossed.
    """
    placed: list[Box | None] = [None] * len(labels)
    for _ in range(1 + SWEEPS):
        for number, label in enumerate(labels):
            others = [
                (box, leader(labels[other], box))
                for other, box in enumerate(placed)
                if box is not None and other != number
            ]
            placed[number] = _best(label, others, points, lines, bounds)
    return placed


def leader(label: Label, box: Box) -> Segment:
    """The line from a label's point to the nearest point of its box."""
    return (label.x, label.y, *box.nearest(label.x, label.y))


def _best(
    label: Label,
    others: Sequence[tuple[Box, Segment]],
    points: Sequence[Box],
    lines: Sequence[Segment],
    bounds: Box,
) -> Box | None:
    best, lowest = None, math.inf
    for distance, box in _candidates(label):
        if distance >= lowest:
            break
        if not bounds.contains(box) or any(box.overlaps(point) for point in points):
            continue
        line, margin = leader(label, box), box.grown(MARGIN)
        if any(
            margin.overlaps(other) or other.is_crossed_by(line) or margin.is_crossed_by(far) for other, far in others
        ):
            continue
        cost = distance + LINE_CROSSED * sum(margin.is_crossed_by(segment) for segment in lines)
        if distance > NEAR:
            crossed = [point for point in points if point.is_crossed_by(line)]
            cost += POINT_CROSSED * sum(not _has(point, label) for point in crossed)
        cost += LEADER_CROSSED * sum(_cross(line, far) for _, far in others)
        if cost < lowest:
            best, lowest = box, cost
    return best


def _candidates(label: Label) -> list[tuple[float, Box]]:
    """The places for a label with their distance from its point, the nearest first."""
    found = []
    for distance, angles in [(NEAR, ANGLES), *((distance, FAR_ANGLES) for distance in FAR)]:
        for angle in angles:
            x = label.x + math.cos(angle) * (distance + label.width / 2)
            y = label.y + math.sin(angle) * (distance + label.height / 2)
            box = Box(x - label.width / 2, y - label.height / 2, x + label.width / 2, y + label.height / 2)
            found.append((float(distance), box))
    return found


def _has(point: Box, label: Label) -> bool:
    return point.left <= label.x <= point.right and point.bottom <= label.y <= point.top


def _cross(one: Segment, other: Segment) -> bool:
    """Whether two segments cross; those that only touch do not."""

    def side(line: Segment, x: float, y: float) -> float:
        return (line[2] - line[0]) * (y - line[1]) - (line[3] - line[1]) * (x - line[0])

    return (
        side(one, other[0], other[1]) * side(one, other[2], other[3]) < 0
        and side(other, one[0], one[1]) * side(other, one[2], one[3]) < 0
    )
