"""Low-rank adapters (LoRA, Hu et al. 2021) in the stacks of a T5, through the library `peft`.

The matrix W of an adapted layer stays as it is, and the layer computes with W + (alpha / rank) B A. A is drawn from
U(-1/sqrt(I), 1/sqrt(I)) and B is 0, as in `peft`, so the model begins as the base. The parameters of a layer `NAME`:
`NAME.base_layer.weight` (W), `NAME.lora_A.default.weight` (A) and `NAME.lora_B.default.weight` (B). Everything else
about adapters follows from these names.

Shapes: I inputs and O outputs of a layer, R rank.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vae_ds.config import LoraConfig
from vae_ds.errors import ConfigError

FOLDER = "adapters"  # of an export
STACKS = ("encoder", "decoder")
_ADAPTER = "default"  # the name that peft gives to a model's only adapter
_A, _B, _OWN = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight", ".base_layer.weight"


def adapt(t5: Any, settings: LoraConfig, generator: torch.Generator) -> None:
    """Put adapters into the stacks of a T5, in place, and freeze the weights that they leave as they are.

    Works after the injection of z: W_proj is not adapted. A is drawn from `generator` only, layer by layer.
    Raises ConfigError if a module does not exist, if there is nothing to adapt, or if `peft` is not installed.
    """
    peft, targets = _peft(), _targets(t5, settings)
    # On the meta device, because the initial values of peft would advance the global generator.
    peft.inject_adapter_in_model(_peft_config(peft, settings, targets), t5, _ADAPTER, low_cpu_mem_usage=True)
    for name in targets:
        layer = t5.get_submodule(name)
        a_RI = torch.rand(settings.rank, layer.in_features, generator=generator) * 2 - 1
        layer.lora_A[_ADAPTER].weight = nn.Parameter(a_RI / math.sqrt(layer.in_features))
        layer.lora_B[_ADAPTER].weight = nn.Parameter(torch.zeros(layer.out_features, settings.rank))
    named = {f"t5.{name}": parameter for name, parameter in t5.named_parameters()}
    held = held_names(named)
    for name, parameter in named.items():
        parameter.requires_grad_(name not in held)


def is_adapter(name: str) -> bool:
    """Whether a parameter of T5VAE belongs to an adapter."""
    return name.endswith((_A, _B))


def plain_name(name: str) -> str:
    """The name of a parameter, other than an adapter's, in the same model without adapters."""
    return name.replace(_OWN, ".weight")


def held_names(names: Iterable[str]) -> set[str]:
    """The parameters that never train in a model with adapters: the own weights of adapted stacks, and the embeddings.

    The decoder includes an untied output head. The embeddings are held because all parts of a T5 share them. A model
    without adapters holds nothing.
    """
    every = tuple(names)
    stacks = [f"t5.{stack}." for stack in STACKS if any(is_adapter(n) and n.startswith(f"t5.{stack}.") for n in every)]
    if not stacks:
        return set()
    held = (*stacks, "t5.shared.", *(["t5.lm_head."] if "t5.decoder." in stacks else []))
    return {name for name in every if name.startswith(held) and not is_adapter(name) and ".memory." not in name}


def merged(tensors: Mapping[str, Tensor], settings: LoraConfig) -> dict[str, Tensor]:
    """The weights of the same model without adapters: W + (alpha / rank) B A, computed in float32, by plain names.

    Makes new tensors for adapted matrices only.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_adapter(name):
            continue
        layer = name.removesuffix(_OWN)
        if layer != name:
            a_RI, b_OR = tensors[layer + _A].float(), tensors[layer + _B].float()
            tensor = torch.addmm(tensor.float(), b_OR, a_RI, alpha=settings.alpha / settings.rank)
        found[plain_name(name)] = tensor
    return found


def save_adapters(folder: Path, tensors: Mapping[str, Tensor], settings: LoraConfig, base: str) -> None:
    """Write the adapters in the layout of `peft`: adapter_config.json and adapter_model.safetensors, in float32.

    The names are those of the stock T5, so that `PeftModel.from_pretrained(T5, folder)` loads them.
    """
    peft = _peft()
    stock = {name: _stock_name(name.removeprefix("t5.")) for name in tensors if is_adapter(name)}
    layers = [name.removesuffix(_A) for name in stock.values() if name.endswith(_A)]
    config = _peft_config(peft, settings, layers)
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, peft.TaskType.SEQ_2_SEQ_LM, True
    config.target_modules = sorted(layers)  # of a set, the file would have another order in each process
    config.save_pretrained(folder)
    stored = {
        f"base_model.model.{short.replace(f'.{_ADAPTER}.', '.')}": tensors[name].to("cpu", torch.float32).contiguous()
        for name, short in stock.items()
    }
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _targets(t5: Any, settings: LoraConfig) -> list[str]:
    """The names of the layers to adapt, in the order of the model."""
    stacks = [stack for stack in STACKS if settings.where in (stack, "both") and hasattr(t5, stack)]
    if not stacks:
        raise ConfigError(f"model.lora.where: injection `none` has no {settings.where}, so there is nothing to adapt")
    layers = [
        name
        for name, module in t5.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in stacks and not name.endswith("memory")
    ]
    known = sorted({name.rpartition(".")[2] for name in layers})
    if unknown := [module for module in settings.modules if module not in known]:
        raise ConfigError(
            f"model.lora.modules: no layer `{unknown[0]}` in the {' and '.join(stacks)}; the layers are "
            f"{', '.join(known)}"
        )
    return [name for name in layers if name.rpartition(".")[2] in settings.modules]


def _stock_name(name: str) -> str:
    """The name that the stock T5 has for a parameter of its cross-attention, of which the injection keeps `o` only."""
    return name.replace(".layer.1.o.", ".layer.1.EncDecAttention.o.")


def _peft_config(peft: ModuleType, settings: LoraConfig, layers: list[str]) -> Any:
    return peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=layers
    )


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f'model.lora: needs the package peft ({error}); install it with `pip install "vae_ds[lora]"`'
        ) from None
    library: ModuleType = peft
    return library
