"""What a code tells: labelled texts, probes, disentanglement scores, maps, texts by label, a page to explore with.

Depends on `textvae`, `evaluation`, `latents`, `data`, `model`, `runtime`, `config` and `errors`. Classifiers are those
of scikit-learn, which is an extra (`vae_ds[look]`).
"""

from vae_ds.inspection import (
    by_label,
    disentanglement,
    mapping,
    maps,
    pictures,
    positions,
    probes,
    server,
    shifts,
    targets,
)
from vae_ds.inspection.targets import Labelled

__all__ = [
    "Labelled",
    "by_label",
    "disentanglement",
    "mapping",
    "maps",
    "pictures",
    "positions",
    "probes",
    "server",
    "shifts",
    "targets",
]
