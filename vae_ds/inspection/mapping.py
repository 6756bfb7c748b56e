"""All pictures of `vae-ds map`, with their numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vae_ds.data import corpora
from vae_ds.errors import ConfigError
from vae_ds.inspection import maps, pictures, positions
from vae_ds.inspection.targets import Labelled
from vae_ds.runtime import records, require
from vae_ds.textvae import TextVAE

POSITION_TEXTS = 2000  # at most, for z_gain by position, which decodes each twice


@dataclass(frozen=True)
class Wanted:
    """What to draw: the file of the map, the target that colours it (None: the label, if any), PCA or UMAP."""

    path: Path
    colour: str | None = None
    is_umap: bool = False
    projector: str | None = None
    seed: int = 0

    def check(self, labelled: Labelled) -> None:
        """Raise ConfigError if the texts have no such target, or a package is missing."""
        if self.colour is not None and self.colour not in labelled.targets:
            raise ConfigError(f"--colour {self.colour}: the texts have {', '.join(labelled.targets)}")
        if self.is_umap:
            require("look", "umap-learn", "umap", "--umap")

    def beside(self, name: str) -> Path:
        """The file of another picture."""
        return self.path.with_name(f"{self.path.stem}-{name}{self.path.suffix}")


def draw_all(vae: TextVAE, labelled: Labelled, wanted: Wanted, run: Path) -> dict[str, Any]:
    """Write the map, the grid, z_gain by position, the KL of the units if `run` has their record, and a JSON file.

    Returns what the JSON file has, without the texts, and `files`.
    """
    z_NL = vae.encode(labelled.texts).numpy()
    plane = maps.umap(z_NL, wanted.seed) if wanted.is_umap else maps.pca(z_NL)
    grid = maps.grid(vae, z_NL, plane)
    colour = wanted.colour or (corpora.LABEL if corpora.LABEL in labelled.targets else None)
    values = None if colour is None else labelled.targets[colour]
    title = f"{run.name}: {len(z_NL):,} texts" + ("" if colour is None else f", coloured by {colour}")
    pictures.draw_map(wanted.path, plane, values, title, grid.corners)
    corners = [labelled.texts[row] for row in grid.corners]
    pictures.draw_grid(wanted.beside("grid"), grid, f"{run.name}: texts decoded between the codes of A, B, C and D")
    files = [wanted.path, wanted.beside("grid")]
    some = labelled.texts[:: -(-len(z_NL) // POSITION_TEXTS)]
    gains = positions.gains(vae, some, wanted.seed)
    pictures.draw_positions(
        wanted.beside("positions"), gains, f"{run.name}: what the code decides ({len(some):,} texts)"
    )
    files.append(wanted.beside("positions"))
    record = maps.units_over_training(run)
    if record is not None:
        pictures.draw_units(wanted.beside("units"), *record, f"{run.name}: KL of each unit at the validations")
        files.append(wanted.beside("units"))
    if wanted.projector is not None:
        maps.write_projector(Path(wanted.projector), z_NL, {"text": labelled.texts, **labelled.targets})
        files.append(Path(wanted.projector))
    facts: dict[str, Any] = {
        "model": vae.fingerprint,
        "seed": wanted.seed,
        "axes": list(plane.axes),
        "colour": colour,
        "grid": {"corners": corners, "texts": grid.texts},
        "z_gain": {
            "texts": len(some),
            "by_position": gains.gain_T.tolist(),
            "by_position_se": [None if np.isnan(error) else error for error in gains.se_T.tolist()],
            "tokens": gains.count_T.tolist(),
            "end": gains.end,
            "end_se": gains.end_se,
            "total": gains.total,
            "total_se": gains.total_se,
        },
        "kl_per_unit": record and {"steps": record[0], "kl": record[1].tolist()},
    }
    numbers = wanted.path.with_suffix(".json")
    places = [{"text": text, "x": x, "y": y} for text, (x, y) in zip(labelled.texts, plane.xy_N2.tolist(), strict=True)]
    if values is not None:
        places = [place | {"value": value} for place, value in zip(places, values, strict=True)]
    records.write_json(numbers, facts | {"texts": places})
    return facts | {"files": [str(file) for file in [*files, numbers]]}
