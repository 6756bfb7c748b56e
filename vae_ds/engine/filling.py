"""Give a module its weights, one parameter at a time, on the device and in the dtype of the forward pass.

At stage 3, DeepSpeed divides each parameter among the ranks before the next one is filled. So neither a device nor a
host ever holds more of the model than the rank's part and one parameter. `phase_engine` passes in DeepSpeed.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vae_ds.distributed import Ranks
from vae_ds.engine.slices import GATHERED, WEIGHTS, Reader

Divide = Callable[[nn.Parameter], None]


def fill(
    module: nn.Module, weights: Reader | None, ranks: Ranks, dtype: torch.dtype, divide: Divide | None = None
) -> None:
    """Replace the value of every parameter, in the order of the module, and `divide` it at once.

    Without `weights`, the parameters keep their own values. With `weights`, only rank 0 reads them: DeepSpeed sends its
    values to all ranks, at stage 3 when a parameter is divided, and else when the engine is built.
    """
    for name, parameter in module.named_parameters():
        if weights is None:
            parameter.data = parameter.data.to(ranks.device, dtype)
        else:
            value = torch.empty(parameter.shape, dtype=dtype, device=ranks.device)
            if ranks.is_main:
                _read(value.view(-1), name, weights)
            parameter.data = value
            del value
        if divide is not None:
            divide(parameter)
    # DeepSpeed moves the buffers of a module only if it moves the parameters, too.
    for buffer in module.buffers():
        buffer.data = buffer.data.to(ranks.device)


def divider(library: ModuleType, filled: dict[str, Any]) -> Divide:
    """A function that divides a whole parameter among the ranks, as stage 3 keeps it. Its calls are collectives.

    The precision of `filled`, a complete ds_config, is also that of the weights on NVMe. When DeepSpeed divides a
    module itself, it swaps float32 weights as bf16 on processors without fp16.
    """
    first: list[Any] = []

    def divide(parameter: nn.Parameter) -> None:
        if first:
            first[0].convert_to_zero_parameters(param_list=[parameter])
            return
        library.init_distributed(dist_init_required=False)
        # One context for all parameters: on NVMe, each would have buffers of its own.
        library.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=filled)
        first.append(parameter)

    return divide


def _read(target: torch.Tensor, name: str, weights: Reader) -> None:
    # In pieces, because a conversion makes a copy of what it reads.
    for start in range(0, target.numel(), GATHERED):
        weights.copy_to(target[start : start + GATHERED], name, WEIGHTS, start)
