"""The figures of a report: curves during a phase, the rate-distortion plane, likelihood against information.

`curves` and `planes` draw them. `label_placement` finds room for the names of the runs, `style` has the colours.
"""

from vae_ds.studies.figures.curves import PANELS, Curve, natural_order, phase
from vae_ds.studies.figures.planes import (
    ABOVE,
    REFERENCE_MARKER,
    Limit,
    Point,
    describe,
    perplexity_information,
    rate_distortion,
)
from vae_ds.studies.figures.style import BLACK, COLOURS, MARKERS, shade

__all__ = [
    "ABOVE",
    "BLACK",
    "COLOURS",
    "MARKERS",
    "PANELS",
    "REFERENCE_MARKER",
    "Curve",
    "Limit",
    "Point",
    "describe",
    "natural_order",
    "perplexity_information",
    "phase",
    "rate_distortion",
    "shade",
]
