"""The only module that imports DeepSpeed: resolve a ds_config, build the engine of a phase, read and load its state.

Each phase has its own engine: at ZeRO 1 to 3, parameters that are unfrozen in an existing engine would not be trained.
A phase starts from a new float32 module and passes exact float32 weights to the next phase.
"""

import contextlib
import gc
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vae_ds import distributed
from vae_ds.config import OptimizerConfig
from vae_ds.distributed import Ranks
from vae_ds.engine import ds_config, ds_keys, filling, groups, nvme
from vae_ds.engine.library import builds_async_io, deepspeed_library
from vae_ds.engine.masters import Masters
from vae_ds.engine.slices import KINDS, MOMENTS, WEIGHTS, Frozen, Part, PhaseState, Reader, Slice, Source, host_copy
from vae_ds.errors import CheckpointError, ConfigError

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of one optimizer step: applied or skipped, gradient norm before clipping, loss scale of fp16.

    The norm is the same on every rank. A tensor of one element is on the device: reading it waits for the step.
    """

    applied: bool
    grad_norm: float | torch.Tensor
    loss_scale: float | None = None


def resolve(
    deepspeed: str,
    precision: str,
    device: torch.device | str = "cpu",
    *,
    stated: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, Any]:
    """The ds_config for the setting `deepspeed` at a resolved precision. Needs no process group and no model.

    Batch sizes and clipping stay "auto" until an engine is built. `stated` maps such a key to all values that the
    recipe will set, for example {"gradient_clipping": [0.0]}, so that conflicts are reported now.
    Raises ConfigError with the file and the key: a value that differs from the recipe's, a key that DeepSpeed does not
    know, an "auto" without a value in the recipe, fp16 where it does not work.
    """
    path = ds_config.find(deepspeed, precision)
    source = str(path)
    tree = ds_config.read(path)
    stage = ds_config.stage_of(tree, source)
    if precision == "fp16" and stage == 0:
        raise ConfigError(f"{source}: {ds_config.FP16_STAGE_0}")
    chosen = {f"{kind}.enabled": precision == kind for kind in ("bf16", "fp16")}
    ds_config.check(tree, source, {**{key: [value] for key, value in chosen.items()}, **(stated or {})})
    ds_config.settle_accumulation(tree, stage, precision, source)
    nvme.settle(tree, source)
    if ds_config.lookup(tree, "zero_optimization.offload_optimizer"):
        tree.setdefault("zero_force_ds_cpu_optimizer", False)
    probe = {key: 1 for key in ds_config.OWNED if key.startswith("train_micro")} | chosen | nvme.owned(tree)
    rest = {key: value for key, value in tree.items() if key not in ds_config.OWNED}
    _check_known(ds_config.complete(rest, probe, source), source)
    if precision == "fp16" and not deepspeed_library().accelerator.get_accelerator().is_fp16_supported():
        raise ConfigError(f"precision: this {torch.device(device).type} cannot compute in fp16; use bf16 or fp32")
    if nvme.sections(tree) and not builds_async_io():
        raise ConfigError(
            f"{source}: DeepSpeed cannot build its operator for NVMe here; install libaio's header (libaio-dev or "
            "libaio-devel), g++, ninja and, for GPUs, the CUDA toolkit (see `vae-ds doctor`), or offload to cpu"
        )
    for key, value in chosen.items():
        tree.setdefault(key.split(".")[0], {})["enabled"] = value
    return tree


class PhaseEngine:
    """The DeepSpeed engine of one phase.

    `module` is on the CPU, with `requires_grad` already set; the engine keeps it. It starts with the float32 values of
    `weights`, which are read by slices and not kept: no rank holds more of them than it owns. Without `weights`, the
    module itself has them. Every method is a collective. Raises ConfigError if nothing is trainable, or if the
    ds_config conflicts with the recipe, and CheckpointError if the weights are those of another model.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: OptimizerConfig,
        ranks: Ranks,
        precision: str,
        ds_config: dict[str, Any],
        weights: Reader | None = None,
        half_of: Callable[[str], str] | None = None,
        is_new: Callable[[str], bool] | None = None,
    ) -> None:
        """`half_of` maps a parameter name to its part of the model, for steps that update only one part.

        `is_new` says whether a parameter has the learning rate of the new weights.
        """
        parameters = dict(module.named_parameters())
        wrong = [name for name, p in parameters.items() if p.dtype != torch.float32 or p.device.type != "cpu"]
        if wrong and weights is None:
            raise ValueError(f"a phase starts from float32 weights on the CPU; `{wrong[0]}` is not")
        self._trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        if not self._trainable:
            raise ConfigError("freeze: the phase freezes every parameter, so it has nothing to train")
        self._parameters = parameters
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        if weights is not None:
            self._check_shapes(weights)
        # Of the module's own weights, these are references: a weight is rounded into a new tensor.
        exact: Reader | None = weights or PhaseState({name: p.detach() for name, p in parameters.items()}, {})
        self._ranks = ranks
        self._adam = groups.adamw(self._trainable, optimizer, half_of, is_new)
        filled = _fill(ds_config, optimizer, ranks, precision, parameters.values())
        self._swap = nvme.claim(filled, parameters.values(), ranks, 4 if precision == "fp32" else 2)
        self._stage = int(filled.get("zero_optimization", {}).get("stage", 0))
        self._is_plain = self._stage == 0 and precision == "fp32"
        self._largest_norm = optimizer.clip
        frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self._frozen = Frozen(frozen, ranks, None if self._stage < 3 and precision == "fp32" else exact)
        if precision == "fp32":
            exact = None
        self._has_scale = precision == "fp16"
        self._library = deepspeed_library()
        self._engine = self._initialize(module, filled, weights, DTYPES[precision])
        distributed.apply_timeout()  # to the process groups that DeepSpeed has made
        # To sum gradients over the ranks, DeepSpeed copies all of them into a buffer, even on one rank.
        self._engine.enable_backward_allreduce = ranks.world > 1 or not self._is_plain
        self._masters = Masters(self._library, self._engine, self._adam, self._trainable, self._stage, ranks)
        # DeepSpeed derives the masters from weights that it has already rounded to 16 bits. At stage 0, it has also
        # taken a step with zero gradients.
        if exact is not None:
            self._masters.write(exact, kinds=(WEIGHTS,))

    @property
    def module(self) -> nn.Module:
        """The trained module, for calls other than `forward`. At stage 3, every rank must make the same calls."""
        module: nn.Module = self._engine.module
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output for a micro batch."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, is_last: bool = True) -> None:
        """Accumulate the gradient of `loss`: summed over the micro batches of a step, averaged over the ranks.

        `is_last` says that the step has no further micro batch. All ranks have the same number of them in a step.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss)

    def step(self, lr: float, half: str | None = None) -> StepOutcome | None:
        """Call this after each backward. Returns None inside an accumulation, else the outcome of the optimizer step.

        `lr` is the rate of the pretrained weights; the new weights have `new_weights_lr_factor` times this rate.
        With `half`, a name that `half_of` returns, all other parameters stay unchanged, but their moments are updated.
        A step with non-finite gradients is skipped on every rank: weights, moments and AdamW's step stay unchanged.
        """
        is_boundary = self._engine.is_gradient_accumulation_boundary()
        groups.set_rates(self._adam, lr, half)
        norm: float | torch.Tensor | None = None
        if is_boundary and self._is_plain:
            norm = groups.clip(self._trainable.values(), self._largest_norm)
            if not math.isfinite(norm):
                # Torch's AdamW would apply the step.
                self._engine.zero_grad()
                return StepOutcome(applied=False, grad_norm=norm)
        self._engine.step()
        if not is_boundary:
            return None
        if norm is None:
            norm = self._engine.get_global_grad_norm()
            assert norm is not None
        scale = float(self._engine.optimizer.loss_scale) if self._has_scale else None
        applied = bool(self._engine.was_step_applied())
        if not applied and self._stage in (1, 2):
            # With an offloaded optimizer, a skipped step keeps its non-finite sums, and all later steps add to them.
            sums = getattr(self._engine.optimizer, "averaged_gradients", {})
            sums.update(dict.fromkeys(sums))
        return StepOutcome(applied, norm, scale)

    def train(self) -> None:
        """Training mode, as in torch."""
        self._engine.train()

    def eval(self) -> None:
        """Evaluation mode, as in torch."""
        self._engine.eval()

    def tensors(self, *, moments: bool = True) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield each whole tensor, float32 on the CPU, as (name, `weights` or the moment, tensor).

        Gathers one parameter at a time. Each item is a collective, so every rank must read the iterator to its end.
        Without `moments` only the weights, a third of the work.
        """
        for name in self._parameters:
            if name in self._frozen:
                yield name, WEIGHTS, self._frozen.read(name)
                continue
            for kind in KINDS if moments else (WEIGHTS,):
                yield name, kind, self._masters.read(name, kind)

    def weights(self, on_main: bool = False) -> dict[str, torch.Tensor]:
        """All weights, whole, float32 on the CPU, on every rank; with `on_main` on rank 0 alone, {} on the others."""
        is_wanted = self._ranks.is_main or not on_main
        gathered = {}
        for name, _, tensor in self.tensors(moments=False):
            if is_wanted:
                gathered[name] = tensor
        return gathered

    def state(self) -> PhaseState:
        """The exact state of the phase, whole on every rank, at any stage and precision."""
        state = PhaseState({}, {key: {} for key in MOMENTS}, self._masters.steps, self._scaler())
        for name, kind, tensor in self.tensors():
            (state.weights if kind == WEIGHTS else state.moments[kind])[name] = tensor
        return state

    def part(self, left_out: Mapping[str, str] | None = None) -> Part:
        """What this rank stores of the exact state, 12 / world bytes per trained parameter. Not a collective.

        `left_out` are frozen parameters that are not stored, with the SHA-256 of each.
        """
        left_out = dict(left_out or {})
        slices = {
            name: Slice(one.offset, {WEIGHTS: host_copy(one.values[WEIGHTS])})
            for name, one in self._frozen.slices()
            if name not in left_out
        }
        slices.update(self._masters.slices())
        frozen = frozenset(self._shapes.keys() - self._trainable.keys())
        return Part(self._shapes, frozen, slices, self._masters.steps, self._scaler(), left_out)

    @torch.no_grad()
    def load(self, state: Source) -> None:
        """Set masters, forward weights, moments and AdamW's step exactly, and the generators if the state has them.

        `state` must be from a phase with the same frozen parameters. A rank reads what it owns, and its share of the
        frozen weights, except those that `state` leaves out. Raises CheckpointError if names or shapes differ.
        """
        self._check_fits(state)
        for name in self._frozen.take(state):
            self._masters.write_forward(self._parameters[name], name, state)
        self._masters.write(state)
        self._masters.publish()
        self._masters.steps = state.steps
        if self._has_scale:
            for key, value in state.scaler.items():
                setattr(self._engine.optimizer.loss_scaler, key, value)
        if state.generators is not None:
            distributed.restore(state.generators)

    def close(self) -> None:
        """Destroy the engine and free its memory. The module cannot be used afterwards."""
        engine = self._engine
        if engine is None:
            return
        swappers = nvme.quiet(engine.optimizer, self._parameters.values())
        engine.destroy()
        nvme.free(swappers)
        self._swap.close()
        # `destroy` does not remove these references, which keep the whole engine and its optimizer state in memory.
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        for parameter in self._parameters.values():
            parameter.grad = None
            for name in ("_z3_optimizer", "_hp_mapping", "_zero_optimizer", "_dp_group", "nvme_swapper"):
                if hasattr(parameter, name):
                    delattr(parameter, name)
        self._engine = None
        del self._masters, self._adam, self._frozen
        self._trainable, self._parameters = {}, {}
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _initialize(self, module: nn.Module, filled: dict[str, Any], weights: Reader | None, dtype: torch.dtype) -> Any:
        if self._ranks.device.type == "cuda":
            # DeepSpeed uses LOCAL_RANK as the device index, even if a task sees only one device.
            os.environ["LOCAL_RANK"] = str(self._ranks.device.index)
        # At stage 1 in bf16, DeepSpeed prints memory statistics to stdout instead of its log.
        with contextlib.redirect_stdout(io.StringIO()):
            divide = filling.divider(self._library, filled) if self._stage == 3 else None
            filling.fill(module, weights, self._ranks, dtype, divide)
            engine, *_ = self._library.initialize(
                model=module,
                optimizer=self._adam,
                model_parameters=list(self._trainable.values()),
                config=filled,
                dist_init_required=False,
            )
        return engine

    def _scaler(self) -> dict[str, float]:
        if not self._has_scale:
            return {}
        scaler = self._engine.optimizer.loss_scaler
        return {key: getattr(scaler, key) for key in SCALER if hasattr(scaler, key)}

    def _check_shapes(self, weights: Reader) -> None:
        found = {name: tuple(shape) for name, shape in weights.shapes.items()}
        if found != self._shapes:
            name = sorted(set(found.items()) ^ set(self._shapes.items()))[0][0]
            raise CheckpointError(f"the checkpoint has the weights of another model: `{name}` differs")

    def _check_fits(self, state: Source) -> None:
        self._check_shapes(state)
        if differing := set(state.trained) ^ set(self._trainable):
            raise CheckpointError(
                f"the checkpoint is of a phase that freezes other parameters: `{min(differing)}` differs"
            )


def _fill(
    tree: dict[str, Any],
    optimizer: OptimizerConfig,
    ranks: Ranks,
    precision: str,
    parameters: Iterable[nn.Parameter],
) -> dict[str, Any]:
    owned = nvme.owned(tree, parameters, ranks.world) | {
        # The number of micro batches differs between steps, so `backward` is told which one is the last.
        **dict.fromkeys(ds_config.BATCH_SIZES, 1),
        "train_batch_size": ranks.world,
        "gradient_clipping": optimizer.clip,
        "bf16.enabled": precision == "bf16",
        "fp16.enabled": precision == "fp16",
    }
    filled = ds_config.complete(tree, owned)
    if precision == "fp32":
        ds_config.settle_fp32(filled, ranks.world)
    return filled


def _check_known(tree: dict[str, Any], source: str) -> None:
    """Raise ConfigError for a key that DeepSpeed would ignore, or a value that it rejects."""
    deepspeed_library()
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    ds_keys.check_known(tree, source, DeepSpeedConfig, DeepSpeedConfigModel)
