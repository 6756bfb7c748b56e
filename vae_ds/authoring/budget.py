"""Bytes of weights, gradients and optimizer states of a rank, for each ds_config: the tables of ds_configs/README.md.

Activations are not part of it; `model.cost` measures them.
"""

from dataclasses import dataclass

# From the least communication to the least memory on the device.
ORDER = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_offload_params")
# DeepSpeed's buffers for communication, at most, from stage 2 on and with offloading.
BUCKETS = 1e9
# `stage3_max_live_parameters` of the shipped files: the weights that ZeRO 3 keeps whole for their next use.
MAX_LIVE = 1_000_000_000


@dataclass(frozen=True)
class States:
    """Bytes of one rank at the largest moment of a step: on its device, and in the memory of its host."""

    device: float
    host: float = 0.0


def is_known(ds_config: str) -> bool:
    """Whether `states` knows this ds_config."""
    return ds_config == "zero0" or ds_config in ORDER


def states(ds_config: str, precision: str, trained: int, frozen: int, ranks: int) -> States:
    """What `trained` and `frozen` parameters take on each of `ranks` ranks.

    ds_config: its name without the precision, such as `zero2_offload`. Raises ValueError if it is not known.
    precision: `fp32`, `bf16` or `fp16`.

    A trained parameter has a weight, a gradient, a gradient that is accumulated in float32, a float32 master weight and
    two moments of Adam. In float32, the gradient is the accumulated one, and the weight is the master weight, except
    where ZeRO divides the master weights and keeps the weights whole. On one rank, it divides nothing in float32.
    """
    if ranks == 1 and precision == "fp32" and ds_config in ("zero1", "zero2"):
        ds_config = "zero0"
    weight, share = (4, 1 / ranks) if precision == "fp32" else (2, 1 / ranks)
    whole, divided = trained + frozen, (trained + frozen) * share
    buckets = min(BUCKETS, 8.0 * trained)
    gathered = weight * min(whole, MAX_LIVE) + buckets
    adam, gradient = 12 * share * trained, 4 * share * trained
    kept = 0 if precision == "fp32" else 4
    of: dict[str, tuple[float, float]] = {
        "zero0": (weight * whole + (12 if precision == "fp32" else 18) * trained, 0),
        "zero1": (weight * (whole + trained) + kept * trained + adam, 0),
        "zero2": (weight * whole + gradient + adam + buckets, 0),
        "zero3": (weight * divided + 2 * gradient + adam + gathered, 0),
        "zero2_offload": (weight * whole + buckets, 2 * gradient + adam),
        "zero3_offload": (weight * divided + gathered, 2 * gradient + adam),
        "zero3_offload_params": (gathered, weight * divided + 2 * gradient + adam),
    }
    if ds_config not in of:
        raise ValueError(f"{ds_config}: the memory of this ds_config is not known; known are zero0, {', '.join(ORDER)}")
    return States(*of[ds_config])
