"""The window between two rows of the log: sums over its applied steps, and the means that the row reports.

A window is a plain dictionary, since it goes into each checkpoint.
"""

from collections.abc import Mapping
from typing import Any

Window = dict[str, float]

# Means over the window's steps, each a mean over the sentences of its global batches; nats, but for grad_norm.
MEANS = ("rec", "kl", "kl_weighted", "loss", "grad_norm")


def add_step(
    window: Window,
    totals: Mapping[str, float],
    sentences: int,
    kl: float,
    beta: float,
    lr: float,
    kl_normal: float | None = None,
) -> None:
    """Add one applied step.

    `totals`: sums of the global batch, `loss`, `rec` and `penalty` (the thresholded KL) in nats, `tokens` and
    positions (`target`) of the targets, `grad_norm`. `kl` is the raw KL in nats a sentence, `kl_normal` that to N(0, I)
    beside it.
    """
    adds = {
        "steps": 1.0,
        "loss": totals["loss"] / sentences,
        "rec": totals["rec"] / sentences,
        "kl": kl,
        "kl_weighted": beta * totals["penalty"] / sentences,
        "grad_norm": totals["grad_norm"],
        "tokens": totals["tokens"],
        "positions": totals["target"],
    }
    if kl_normal is not None:
        adds["kl_normal"] = kl_normal
    for key, value in adds.items():
        window[key] = window.get(key, 0.0) + value
    window |= {"beta": beta, "lr": lr}


def row_of(window: Window, decodes: bool = True) -> dict[str, Any]:
    """What the row says of the window: means, the last beta and learning rate, the share of padding.

    A phase that does not decode has no `rec` and no `nelbo`.
    """
    row: dict[str, Any] = {key: window[key] / window["steps"] for key in MEANS if decodes or key != "rec"}
    if "kl_normal" in window:
        row["kl_normal"] = window["kl_normal"] / window["steps"]
    if decodes:
        row["nelbo"] = row["rec"] + row["kl"]
    row |= {"beta": window["beta"], "lr": window["lr"]}
    row["padding"] = 1.0 - window["tokens"] / window["positions"]
    return row
