"""ds_configs: find the JSON file of a recipe, check it, and fill in the recipe's values. Does not import DeepSpeed.

A ds_config contains settings that only concern DeepSpeed (stage, buckets, offloading). The recipe owns batch sizes,
precision, optimizer, schedule and clipping. For these keys, a ds_config contains "auto" or nothing, as in the Hugging
Face integration.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vae_ds.errors import ConfigError

AUTO = "auto"
PRECISIONS = ("fp32", "bf16", "fp16")
SHIPPED_NAME = re.compile(r"zero(?P<stage>[0-3])(?:_(?P<precision>fp32|bf16|fp16))?(?P<variant>_[a-z_]+)?")

# Keys whose values in a file would mean nothing: the recipe's `batch` decides how a step is divided, step by step.
BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Keys that the recipe owns. `complete` fills them in.
OWNED = (
    *BATCH_SIZES,
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
)

# Values that the arithmetic and the checkpoints of this package require. DeepSpeed would accept other values.
REQUIRED: dict[str, tuple[Any, str]] = {
    "gradient_allreduce_op": ("mean", "the loss is a mean over the global batch"),
    "managed_gradient_accumulation": (True, "the engine counts micro batches"),
    "zero_optimization.compute_grad_norm": (True, "the norm detects a step with non-finite gradients"),
    "zero_optimization.offload_optimizer.ratio": (
        1.0,
        "AdamW's moments are in one optimizer, in host memory or on NVMe",
    ),
    "zero_optimization.offload_optimizer.super_offload": (False, "AdamW's moments are in this process"),
    "aio.use_gds": (False, "swap files go through host memory"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "frozen weights must stay as they are"),
    "bf16.check_grad_overflow": (True, "a step with non-finite gradients must be skipped"),
    "bf16.bf16_master_weights_and_grads": (False, "master weights are float32"),
    "bf16.bf16_optimizer_states": (False, "optimizer states are float32"),
    "fp16.fp16_master_weights_and_grads": (False, "master weights are float32"),
    "torch_autocast.enabled": (False, "the recipe's `precision` decides; use bf16 or fp16"),
}

FP16_STAGE_0 = (
    "fp16 does not work at ZeRO stage 0: DeepSpeed divides the gradients by a loss scale that it never applied to the "
    "loss; use precision bf16, or deepspeed zero1 or higher"
)


def shipped_dir() -> Path:
    """The directory of the shipped ds_configs: inside an installed package, or next to the package in a checkout."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "ds_configs", here.parent / "ds_configs"):
        if any(folder.glob("zero*.json")):
            return folder
    raise ConfigError(f"the shipped ds_configs are missing next to {here}; reinstall vae_ds, or give a JSON file")


def shipped_names() -> list[str]:
    """Sorted names of the shipped ds_configs, without `.json`."""
    return sorted(path.stem for path in shipped_dir().glob("zero*.json"))


def find(name: str, precision: str) -> Path:
    """The file that the setting `deepspeed` selects by zero0 to zero3, a shipped name, or a path.

    Raises ConfigError if there is no such file, or if a shipped file is for another precision.
    """
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        if not path.is_file():
            raise ConfigError(f"deepspeed: {name}: no such file; shipped: {', '.join(shipped_names())}")
        if path.resolve().parent != shipped_dir():
            return path
        name = path.stem
    match = SHIPPED_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"deepspeed: found {name!r}; use zero0, zero1, zero2 or zero3, a shipped name "
            f"({', '.join(shipped_names())}), or a JSON file"
        )
    if match["precision"] not in (None, precision):
        raise ConfigError(
            f"deepspeed: {name} is for {match['precision']}, but the run's precision is {precision}; "
            f"use zero{match['stage']}, or set precision to {match['precision']}"
        )
    if precision == "fp16" and match["stage"] == "0":
        raise ConfigError(f"deepspeed: {name}: {FP16_STAGE_0}")
    path = shipped_dir() / f"zero{match['stage']}_{precision}{match['variant'] or ''}.json"
    if not path.is_file():
        raise ConfigError(f"deepspeed: no ds_config {path.stem} is shipped; shipped: {', '.join(shipped_names())}")
    return path


def stated_precision(name: str) -> str | None:
    """The precision that the setting `deepspeed` implies, by a shipped name or by the content of its file, or None."""
    match = SHIPPED_NAME.fullmatch(Path(name).stem)
    if match is not None and (name == match[0] or Path(name).resolve().parent == shipped_dir()):
        return match["precision"]
    path = Path(name)
    if not path.is_file():
        return None
    tree = read(path)
    enabled = [kind for kind in ("bf16", "fp16") if lookup(tree, f"{kind}.enabled") is True]
    return enabled[0] if len(enabled) == 1 else None


def read(path: Path) -> dict[str, Any]:
    """Parse a ds_config. Raises ConfigError with file and line for invalid JSON, and for a duplicate key."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except _DuplicateError as error:
        raise ConfigError(f"{path}: duplicate key `{error}`") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a ds_config must be an object; found {type(tree).__name__}")
    return tree


def check(tree: dict[str, Any], source: str, stated: Mapping[str, Sequence[Any]]) -> None:
    """Check the keys that the recipe owns. `stated` maps a dotted key to all values that the recipe will set there.

    Raises ConfigError with the file and the key if the file has another value.
    """
    for key in {part for dotted in (*OWNED, *REQUIRED) if "." in dotted for part in [dotted.split(".")[0]]}:
        if key in tree and not isinstance(tree[key], dict):
            raise ConfigError(f"{source}: `{key}` must be an object of settings; found {tree[key]!r}")
    for key in BATCH_SIZES:
        if (found := lookup(tree, key)) not in (None, AUTO):
            raise ConfigError(
                f"{source}: `{key}` is {_show(found)}, but the recipe divides the batches (batch.global, batch.micro, "
                'batch.tokens); write "auto" or remove the key'
            )
    for key, values in stated.items():
        found = lookup(tree, key)
        for value in values:
            if found not in (None, AUTO, value):
                raise ConfigError(
                    f"{source}: `{key}` is {_show(found)}, but the recipe sets it to {_show(value)}; "
                    f'write "auto" or remove the key'
                )
    for key, (value, reason) in REQUIRED.items():
        found = lookup(tree, key)
        if found is not None and found != value:
            raise ConfigError(f"{source}: `{key}` must be {_show(value)} ({reason}); found {_show(found)}")
    _check_optimizer(tree, source)
    if tree.get("scheduler") not in (None, AUTO):
        raise ConfigError(
            f"{source}: `scheduler`: the recipe sets the learning-rate schedule (phases.N.learning_rate); remove it"
        )


def complete(tree: Mapping[str, Any], owned: Mapping[str, Any], source: str = "ds_config") -> dict[str, Any]:
    """A copy of `tree` with the recipe's values, `owned`, at dotted keys. Raises ConfigError if an "auto" remains."""
    check(dict(tree), source, {key: [value] for key, value in owned.items()})
    result: dict[str, Any] = copy.deepcopy(dict(tree))
    for key in ("optimizer", "scheduler"):
        result.pop(key, None)
    for key, value in owned.items():
        *parents, last = key.split(".")
        node = result
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    left = [key for key, value in _leaves(result) if value == AUTO]
    if left:
        raise ConfigError(
            f'{source}: `{left[0]}` is "auto", but the recipe has no value for it; set a value, or remove the key to '
            "use DeepSpeed's default"
        )
    return result


def settle_fp32(filled: dict[str, Any], world: int) -> None:
    """Leave out what DeepSpeed does in vain in float32.

    On one rank, stages 1 and 2 without offload become stage 0. They have nothing to divide, but copy all gradients and
    weights in each step, into buffers that take 4 bytes per parameter. At stage 0, `PhaseEngine` clips the gradients:
    it needs their norm anyway, and DeepSpeed multiplies all of them by 1 where nothing is to be clipped.
    """
    section = filled.setdefault("zero_optimization", {})
    if world == 1 and section.get("stage") in (1, 2) and not section.get("offload_optimizer"):
        section["stage"] = 0
    if section.get("stage", 0) == 0:
        filled["gradient_clipping"] = 0.0


def settle_accumulation(tree: dict[str, Any], stage: int, precision: str, source: str) -> None:
    """Accumulate gradients in float32 wherever DeepSpeed can, and sum them over the ranks in float32.

    At stage 0 in bf16, DeepSpeed raises an error for the accumulation.
    """
    section = tree.setdefault("data_types", {})
    if not isinstance(section, dict):
        raise ConfigError(f"{source}: `data_types` must be an object of settings; found {section!r}")
    found = section.get("grad_accum_dtype", AUTO)
    can_float32 = stage > 0 or precision == "fp32"
    if found == AUTO:
        section.pop("grad_accum_dtype", None)
        if can_float32:
            section["grad_accum_dtype"] = "fp32"
    elif not can_float32 and found != precision:
        raise ConfigError(
            f"{source}: `data_types.grad_accum_dtype` is {found!r}, but ZeRO stage 0 accumulates in {precision}; "
            "remove the key, or use stage 1 or higher"
        )
    _settle_communication(tree, precision)


def _settle_communication(tree: dict[str, Any], precision: str) -> None:
    """Sum 16-bit gradients over the ranks in float32, unless the file says otherwise.

    By default, DeepSpeed rounds the gradients that it has accumulated in float32 to 16 bits, and adds them in 16 bits.
    """
    if tree.get("communication_data_type", AUTO) != AUTO:
        return
    tree.pop("communication_data_type", None)
    if precision != "fp32":
        tree["communication_data_type"] = "fp32"


def stage_of(tree: Mapping[str, Any], source: str) -> int:
    """The ZeRO stage, 0 if none is set. Raises ConfigError if it is not 0, 1, 2 or 3."""
    section = tree.get("zero_optimization", {"stage": 0})
    stage = section.get("stage", 0) if isinstance(section, dict) else section
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{source}: `zero_optimization.stage` must be 0, 1, 2 or 3; found {_show(stage)}")
    return int(stage)


def lookup(tree: Mapping[str, Any], dotted: str) -> Any:
    """The value at a dotted key, or None."""
    node: Any = tree
    for name in dotted.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return None
        node = node[name]
    return node


class _DuplicateError(ValueError):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise _DuplicateError(key)
        tree[key] = value
    return tree


def _check_optimizer(tree: Mapping[str, Any], source: str) -> None:
    """Allow the form of the Hugging Face integration, AdamW with every parameter "auto": it sets no values."""
    optimizer = tree.get("optimizer")
    if optimizer in (None, AUTO):
        return
    plain = isinstance(optimizer, dict) and str(optimizer.get("type", "AdamW")).lower() == "adamw"
    params = optimizer.get("params", {}) if isinstance(optimizer, dict) else {}
    set_here = [name for name, value in params.items() if value != AUTO] if isinstance(params, dict) else [""]
    if not plain or set_here:
        key = f"optimizer.params.{set_here[0]}" if plain and set_here else "optimizer"
        raise ConfigError(f"{source}: `{key}`: the recipe sets the optimizer (phases.N.optimizer); remove it")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{prefix}.{index}")
    else:
        yield prefix, node


def _show(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | int | float | str | dict | list) else repr(value)
