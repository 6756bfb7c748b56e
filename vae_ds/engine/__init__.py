"""DeepSpeed: resolve a ds_config and run one phase on an engine. No other sub-package imports DeepSpeed.

Depends on `distributed`, `config` and `errors`.
"""

from vae_ds.engine.ds_config import shipped_names, stated_precision
from vae_ds.engine.library import builds_async_io
from vae_ds.engine.phase_engine import DTYPES, PhaseEngine, StepOutcome, resolve
from vae_ds.engine.precision import precision_for
from vae_ds.engine.slices import MOMENTS, WEIGHTS, Part, PhaseState, Reader, Slice, Source, whole

__all__ = [
    "DTYPES",
    "MOMENTS",
    "WEIGHTS",
    "Part",
    "PhaseEngine",
    "PhaseState",
    "Reader",
    "Slice",
    "Source",
    "StepOutcome",
    "builds_async_io",
    "precision_for",
    "resolve",
    "shipped_names",
    "stated_precision",
    "whole",
]
