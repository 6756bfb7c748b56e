"""Read and write the exact float32 weights and Adam moments of an engine as whole tensors, at any ZeRO stage.

A *master* is the float32 tensor that AdamW updates: the parameter itself at stage 0 in float32, a copy of it at stage 0
in 16 bits, or a slice of a flat buffer at stages 1 to 3. At stage 3, the buffer can be in a file on NVMe. DeepSpeed's
own accessors work from stage 1 on; this module covers the cases that they do not. `phase_engine` passes in DeepSpeed
and its engine.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vae_ds.distributed import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class Masters:
    """The masters and moments of one engine's trainable parameters. Every method except `steps` is a collective."""

    def __init__(
        self,
        library: ModuleType,
        engine: Any,
        adam: torch.optim.AdamW,
        trainable: Mapping[str, nn.Parameter],
        stage: int,
        ranks: Ranks,
    ) -> None:
        self._library, self._engine, self._adam = library, engine, adam
        self._trainable, self._stage, self._ranks = trainable, stage, ranks
        self._direct = self._pairs() if stage == 0 else None
        self._create_moments()

    @property
    def steps(self) -> int:
        """The number of steps that AdamW has applied."""
        return int(self._adam.state[self._owned()[0]]["step"].item())

    @steps.setter
    def steps(self, number: int) -> None:
        for master in self._owned():
            self._adam.state[master]["step"].fill_(float(number))

    def read(self, name: str, moment: str | None = None) -> torch.Tensor:
        """A copy of the whole master, or of one of its moments, in float32 on the CPU."""
        parameter = self._trainable[name]
        if self._direct is not None:
            master = self._direct[parameter]
            found = master if moment is None else self._adam.state[master][moment]
        elif moment is None:
            found = self._library.utils.safe_get_full_fp32_param(parameter)
        else:
            found = self._library.utils.safe_get_full_optimizer_state(parameter, moment)
        return found.detach().to("cpu", torch.float32, copy=True).contiguous()

    @torch.no_grad()
    def write(self, name: str, value: torch.Tensor, moment: str | None = None) -> None:
        """Set the whole master, or one of its moments. The forward pass uses new masters after `publish`."""
        parameter, utils = self._trainable[name], self._library.utils
        if self._direct is not None:
            master = self._direct[parameter]
            (master if moment is None else self._adam.state[master][moment]).copy_(value)
        elif self._stage == 3:
            self._write_part(parameter, value, moment)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)

    def publish(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy the masters to the weights of the forward pass. `weights` are the values just written to the masters."""
        if self._stage in (1, 2):
            self._engine.optimizer.update_lp_params()
            return
        for name, parameter in self._trainable.items():
            self.write_forward(parameter, weights[name])

    @torch.no_grad()
    def write_forward(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Set the weight of the forward pass, rounded to the engine's precision. Works for frozen parameters too."""
        with self._library.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def _pairs(self) -> dict[nn.Parameter, torch.Tensor]:
        """The master of each parameter at stage 0, which DeepSpeed's accessors do not support."""
        wrapper = self._engine.optimizer
        if wrapper is self._adam:
            return {parameter: parameter for parameter in self._trainable.values()}
        groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return {p: master for group, masters in groups for p, master in zip(group, masters, strict=True)}

    def _owned(self) -> list[torch.Tensor]:
        """The tensors that AdamW updates on this rank."""
        if self._direct is not None:
            return list(self._direct.values())
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [master for group in self._adam.param_groups for master in group["params"]]

    def _create_moments(self) -> None:
        """Create zero moments now, as the first step would. The accessors raise errors before the moments exist."""
        for number, master in enumerate(self._owned()):
            with self._in_memory(number):
                self._adam.state[master] = {
                    "step": torch.zeros((), dtype=torch.float32, device=master.device),
                    **{moment: torch.zeros_like(master, requires_grad=False) for moment in MOMENTS},
                }
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _write_part(self, parameter: Any, value: torch.Tensor, moment: str | None) -> None:
        """Write this rank's padded slice at stage 3.

        DeepSpeed's setters do not always work: the one for whole tensors fails if the world size does not divide the
        number of elements, the one for slices fails if the parameter is on NVMe.
        """
        wrapper = self._engine.optimizer
        number, start, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
        flat = torch.zeros(size * self._ranks.world, dtype=torch.float32)
        flat[: value.numel()] = value.flatten()
        with self._in_memory(number):
            master = wrapper.fp32_partitioned_groups_flat[number]
            whole = master if moment is None else self._adam.state[master][moment]
            whole.narrow(0, start, size).copy_(flat.narrow(0, size * self._ranks.rank, size))

    @contextmanager
    def _in_memory(self, number: int) -> Iterator[None]:
        """Read an owned tensor and its moments, by number, from NVMe if they are there. Write them back at the end."""
        wrapper = self._engine.optimizer
        if self._stage < 3 or not wrapper._swappable_optimizer_subgroup(number):
            yield
            return
        wrapper._optimizer_states_and_gradient_swap_in(number)
        yield
        wrapper._optimizer_states_and_gradient_swap_out(number)
