"""Resolve the setting `precision: auto` for a device."""

import logging

import torch

from vae_ds import distributed
from vae_ds.engine import ds_config

_log = logging.getLogger(__name__)

NO_NATIVE_BF16 = (
    "precision: auto is fp32, because {where} computes bf16 only by emulation; precision=fp16 is possible too (ZeRO 1 "
    "to 3), and faster on GPUs with tensor cores (V100, T4)"
)


def precision_for(
    precision: str, device: torch.device | str, deepspeed: str | None = None, *, tell: bool = False
) -> str:
    """Resolve `auto`: the precision of the ds_config, else bf16 on GPUs that compute it natively, else fp32.

    The result is the same on all ranks: with one GPU that only emulates bf16, all of them use fp32. With `tell`, logs
    that fp16 can be used there. A collective for `auto`. The GPU of a rank is the current device of torch.
    """
    if precision != ds_config.AUTO:
        return precision
    stated = ds_config.stated_precision(deepspeed) if deepspeed else None
    if stated is not None:
        return stated
    if torch.device(device).type != "cuda":
        return "fp32"
    # By default, torch counts emulation too: V100 and T4 accept bf16, but compute it more slowly than float32.
    natives = distributed.gather_objects(torch.cuda.is_bf16_supported(including_emulation=False))
    if all(natives):
        return "bf16"
    if tell:
        _log.warning(NO_NATIVE_BF16.format(where="a GPU of this run" if any(natives) else "this GPU"))
    return "fp32"
