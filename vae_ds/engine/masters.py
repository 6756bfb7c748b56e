"""Read and write the exact float32 weights and Adam moments of an engine, at any ZeRO stage.

A *master* is the float32 tensor that AdamW updates: the parameter itself at stage 0 in float32, a copy of it at stage 0
in 16 bits, or a slice of a flat buffer at stages 1 to 3. At stage 3, the buffer can be in a file on NVMe. DeepSpeed's
own accessors give whole tensors from stage 1 on; this module covers stage 0, and the slice that a rank owns. At stages
1 and 2 this is the part of a parameter in the rank's flat buffer, at stage 3 an equal part of each parameter, the last
one padded. `phase_engine` passes in DeepSpeed and its engine.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vae_ds.distributed import Ranks
from vae_ds.engine.slices import KINDS, MOMENTS, WEIGHTS, Reader, Slice, host_copy, shares, whole


class Masters:
    """The masters and moments of one engine's trainable parameters."""

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

    def read(self, name: str, kind: str = WEIGHTS) -> torch.Tensor:
        """A copy of the whole master, or of one of its moments, in float32 on the CPU. A collective."""
        parameter = self._trainable[name]
        if self._direct is not None:
            master = self._direct[parameter]
            found = master if kind == WEIGHTS else self._adam.state[master][kind]
        elif kind == WEIGHTS:
            found = self._library.utils.safe_get_full_fp32_param(parameter)
        else:
            found = self._library.utils.safe_get_full_optimizer_state(parameter, kind)
        return host_copy(found).contiguous()

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """Copies of what this rank stores, by name: what it owns, or at stage 0, where it has all, an equal share."""
        mine = None
        if self._direct is not None:
            mine = shares({name: parameter.numel() for name, parameter in self._trainable.items()}, self._ranks)
        for name in self._trainable if mine is None else mine:
            with self._slice(name) as one:
                first, length = (0, one.length) if mine is None else mine[name]
                copies = {kind: host_copy(value.narrow(0, first, length)) for kind, value in one.values.items()}
            if length:
                yield name, Slice(one.offset + first, copies)

    @torch.no_grad()
    def write(self, source: Reader, kinds: tuple[str, ...] = KINDS) -> None:
        """Set what this rank owns of all masters, or of some `kinds`. The forward pass uses them after `publish`."""
        for name in self._trainable:
            with self._slice(name, changes=True) as (offset, values):
                for kind in kinds if values else ():
                    source.copy_to(values[kind], name, kind, offset)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters to the weights of the forward pass, as after a step. A collective."""
        wrapper = self._engine.optimizer
        if self._direct is not None:
            for parameter, master in self._direct.items():
                parameter.data.copy_(master)
        elif self._stage < 3:
            wrapper.update_lp_params()
        else:
            wrapper._partition_all_parameters()
            for number in range(len(wrapper.fp32_partitioned_groups_flat)):
                with self._in_memory(number):
                    wrapper._reassign_or_swap_out_partitioned_parameters(number)
            if wrapper.persistent_parameters:
                wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)

    @torch.no_grad()
    def write_forward(self, parameter: nn.Parameter, name: str, source: Reader) -> None:
        """Set a frozen weight of the forward pass, rounded to the engine's precision. A collective."""
        with self._library.zero.GatheredParameters([parameter], modifier_rank=0):
            if self._stage < 3 or self._ranks.is_main:
                parameter.data.copy_(whole(source, name))

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

    @contextmanager
    def _slice(self, name: str, changes: bool = False) -> Iterator[Slice]:
        """What this rank owns of a parameter, by reference; without values if it owns nothing of it.

        With `changes`, what is then written into the values also reaches a master on NVMe.
        """
        parameter: Any = self._trainable[name]
        wrapper = self._engine.optimizer
        if self._direct is not None:
            master = self._direct[parameter]
            yield Slice(0, {kind: self._of(master, kind).view(-1) for kind in KINDS})
        elif self._stage < 3:
            fragment = parameter._hp_mapping
            if fragment is None:
                yield Slice(0, {})
                return
            keys = {kind: None if kind == WEIGHTS else kind for kind in KINDS}
            values = {kind: fragment.get_hp_fragment(key).detach() for kind, key in keys.items()}
            yield Slice(fragment.lp_fragment_address.start, values)
        else:
            number, start, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
            offset = size * self._ranks.rank
            length = min(size, parameter.ds_numel - offset)
            if length <= 0:
                yield Slice(0, {})
                return
            with self._in_memory(number, changes):
                master = wrapper.fp32_partitioned_groups_flat[number]
                yield Slice(offset, {kind: self._of(master, kind).narrow(0, start, length) for kind in KINDS})

    def _of(self, master: torch.Tensor, kind: str) -> torch.Tensor:
        found: torch.Tensor = master if kind == WEIGHTS else self._adam.state[master][kind]
        return found.detach()

    @contextmanager
    def _in_memory(self, number: int, changes: bool = True) -> Iterator[None]:
        """Read an owned tensor and its moments, by number, from NVMe if they are there. Write `changes` back."""
        wrapper = self._engine.optimizer
        if self._stage < 3 or not wrapper._swappable_optimizer_subgroup(number):
            yield
            return
        wrapper._optimizer_states_and_gradient_swap_in(number)
        yield
        if changes:
            wrapper._optimizer_states_and_gradient_swap_out(number)
        else:
            wrapper._release_swap_buffers(number)
