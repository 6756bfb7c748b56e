"""Evaluations of runs, with the values of each sentence, for tests of their readers.

Shapes: N sentences.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vae_ds.runtime import evaluations

DATA = {"tokenizer": "0123456789abcdef", "texts": "1123456789abcdef", "lengths": "2123456789abcdef"}
MEANS = ("rec", "kl", "iw_nll")  # metrics that are means of an array of the same name


def write_evaluation(
    folder: Path,
    metrics: Mapping[str, Any],
    split: str = "test",
    data: Mapping[str, str] = DATA,
    values: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write an evaluation of `metrics`. Without `values`, the sentences have evenly spread values with these means."""
    folder.mkdir(parents=True, exist_ok=True)
    if values is None:
        sizes = {name: metrics.get("iw_sentences" if name == "iw_nll" else "sentences") for name in MEANS}
        values = {
            name: metrics[name] + _spread(sizes[name] or metrics["sentences"])
            for name in MEANS
            if metrics.get(name) is not None
        }
        if metrics.get("z_gain") is not None:
            values |= {"rec_swapped": values["rec"] + metrics["z_gain"]}
    evaluations.write(folder, split, {**metrics, evaluations.FINGERPRINT: dict(data)}, values)
    return folder


def _spread(count: int) -> np.ndarray:
    values_N = np.linspace(-1.0, 1.0, count)
    return values_N - values_N.mean()


def change_evaluation(folder: Path, split: str = "test", data: Mapping[str, str] | None = None, **changes: Any) -> None:
    """Change metrics of an evaluation, and shift the values of its sentences so that they have these means."""
    metrics, values = evaluations.read(folder, split), evaluations.read_values(folder, split)
    for name in MEANS:
        if name in changes and name in values:
            values[name] = values[name] + (changes[name] - metrics[name])
    evaluations.write(
        folder, split, metrics | changes | ({evaluations.FINGERPRINT: dict(data)} if data else {}), values
    )
