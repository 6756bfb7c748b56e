"""Codes in the plane: PCA or UMAP, a grid of texts between four corners, the KL of each unit over the training.

Shapes: N texts, L latent units, R rows and columns of a grid, S validations.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vae_ds.errors import DataError
from vae_ds.runtime import records, require
from vae_ds.textvae import TextVAE


class Plane(NamedTuple):
    """The place of each text, and the names of both axes."""

    xy_N2: np.ndarray
    axes: tuple[str, str]


class Principal(NamedTuple):
    """The mean of codes, the two directions of their largest variance, and the shares of the variance there."""

    mean_L: np.ndarray
    axes_L2: np.ndarray
    share_2: np.ndarray

    @classmethod
    def of(cls, z_NL: np.ndarray) -> "Principal":
        """The sign of an axis is that of its largest weight. Raises DataError for fewer than two texts, or units."""
        if min(z_NL.shape) < 2:
            raise DataError(f"a map needs two texts and two latent units; found {z_NL.shape[0]} and {z_NL.shape[1]}")
        mean_L = z_NL.mean(0, dtype=np.float64)
        # The covariance has the size of the code; the texts may be many.
        variance_L, axes_LL = np.linalg.eigh(np.cov(z_NL.astype(np.float64).T, bias=True))
        axes_L2 = axes_LL[:, :-3:-1]
        axes_L2 = axes_L2 * np.sign(axes_L2[np.abs(axes_L2).argmax(0), [0, 1]])
        return cls(mean_L, axes_L2, variance_L[:-3:-1] / max(variance_L.sum(), 1e-300))

    def place(self, z_NL: np.ndarray) -> np.ndarray:
        """The places of codes in the plane, float64 (N, 2)."""
        return (z_NL - self.mean_L) @ self.axes_L2


class Grid(NamedTuple):
    """R rows of R texts; the rows of the four corner texts in the corpus: top left, top right, bottom left, right."""

    texts: list[list[str]]
    corners: list[int]


def pca(z_NL: np.ndarray) -> Plane:
    """The two directions of the largest variance. Raises DataError for fewer than two texts, or units."""
    found = Principal.of(z_NL)
    share = found.share_2
    names = [
        f"principal component {number} ({100 * part:.0f} % of the variance)" for number, part in enumerate(share, 1)
    ]
    return Plane(found.place(z_NL), (names[0], names[1]))


def umap(z_NL: np.ndarray, seed: int = 0) -> Plane:
    """UMAP (McInnes et al. 2018) with the package's default settings. Raises ConfigError if it is not installed."""
    require("look", "umap-learn", "umap", "--umap")
    pca(z_NL)  # the same errors
    from umap import UMAP

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed means one thread, and what few texts mean for the spectral start
        neighbours = min(15, len(z_NL) - 1)
        xy_N2 = UMAP(n_components=2, n_neighbors=neighbours, random_state=seed).fit_transform(z_NL)
    return Plane(np.asarray(xy_N2, np.float64), ("UMAP 1", "UMAP 2"))


def grid(vae: TextVAE, z_NL: np.ndarray, plane: Plane, size: int = 5) -> Grid:
    """Texts decoded between the codes of the four texts in the corners of a map (bilinear). They may coincide."""
    scaled_N2 = (plane.xy_N2 - plane.xy_N2.mean(0)) / np.maximum(plane.xy_N2.std(0), 1e-12)
    corners = [int((scaled_N2 @ np.array(sign)).argmax()) for sign in ((-1, 1), (1, 1), (-1, -1), (1, -1))]
    down, right = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    weights_P4 = np.stack(
        [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], axis=-1
    ).reshape(-1, 4)
    made = vae.decode((weights_P4 @ z_NL[corners].astype(np.float64)).astype(np.float32))
    return Grid([made[start : start + size] for start in range(0, len(made), size)], corners)


def units_over_training(run: Path) -> tuple[list[int], np.ndarray] | None:
    """The steps of the validations of a run, and the mean KL of each unit there, nats (S, L); None without a record."""
    steps, rows = [], []
    for row in records.read_rows(run / "evaluations.jsonl"):
        if row.get("split") == "valid" and row.get("kl_per_dim"):
            steps.append(int(row["step"]))
            rows.append(row["kl_per_dim"])
    if len({len(row) for row in rows}) != 1:
        return None
    return steps, np.array(rows, np.float64)


def write_projector(folder: Path, z_NL: np.ndarray, columns: dict[str, Sequence[str | None]]) -> None:
    """Write codes, texts and labels for the projector of TensorBoard: `tensorboard --logdir FOLDER`.

    columns: what is known of each text, by name; the first is the text. Raises StorageError.
    """

    def cell(value: str | None) -> str:
        return " ".join((value or "").split()) or "-"

    names = list(columns)
    rows = ["\t".join(map(cell, row)) for row in zip(*columns.values(), strict=True)]
    # A single column has no line of names.
    head = ["\t".join(names)] if len(names) > 1 else []
    vectors = "\n".join("\t".join(f"{value:.6g}" for value in row) for row in z_NL)
    config = 'embeddings {\n  tensor_name: "codes"\n  tensor_path: "codes.tsv"\n  metadata_path: "texts.tsv"\n}\n'
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "codes.tsv": vectors + "\n", "texts.tsv": "\n".join([*head, *rows, ""]), "projector_config.pbtxt": config,
    }.items():  # fmt: skip
        records.replace_file(folder / name, text.encode())
