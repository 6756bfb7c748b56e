"""The weights of a base and of an export as mapped files: the same values, and no memory of the process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from support import tiny
from vae_ds.config import ModelConfig
from vae_ds.errors import CheckpointError
from vae_ds.model import T5VAE, exported_weights
from vae_ds.model.shapes import INDEX

FILE = "model.safetensors"


def as_bin(folder: Path) -> torch.dtype:
    torch.save(load_file(folder / FILE), folder / "pytorch_model.bin")
    (folder / FILE).unlink()
    return torch.float32


def as_16_bits(folder: Path) -> torch.dtype:
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return torch.bfloat16


def as_16_bits_bin(folder: Path) -> torch.dtype:
    as_16_bits(folder)
    as_bin(folder)
    return torch.bfloat16


def in_parts(folder: Path) -> torch.dtype:
    config = (folder / "config.json").read_text(encoding="utf-8")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / FILE).unlink(missing_ok=True)
    assert (folder / INDEX).is_file()
    return torch.bfloat16


STORED = {"safetensors": lambda folder: torch.float32, "bin": as_bin, "bf16": as_16_bits}
STORED |= {"bf16-bin": as_16_bits_bin, "parts": in_parts}
CASES = [("t5", one) for one in STORED] + [(kind, "safetensors") for kind in tiny.KINDS if kind != "t5"]
CASES += [("v1_1", "bf16"), ("mt5", "bf16-bin")]


def ranges(folder: Path) -> list[tuple[int, int]]:
    """Addresses at which files of a directory are mapped."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    found = [line.split()[0].split("-") for line in lines if f"{folder}/" in line]
    return [(int(first, 16), int(last, 16)) for first, last in found]


def is_mapped(tensor: torch.Tensor, folder: Path) -> bool:
    return any(first <= tensor.data_ptr() < last for first, last in ranges(folder))


def is_new(name: str) -> bool:
    return name.startswith("bottleneck") or ".memory." in name or ".lora_" in name


def assert_same(mapped: T5VAE, loaded: T5VAE) -> None:
    ours, theirs = dict(mapped.named_parameters()), dict(loaded.named_parameters())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name].float(), theirs[name]) for name in ours)
    assert {name for name, _ in mapped.named_parameters(remove_duplicate=False)} == {
        name for name, _ in loaded.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize("adapters", [None, {"rank": 2, "modules": ["q", "wo"]}])
@pytest.mark.parametrize(("kind", "stored"), CASES)
def test_a_mapped_base_has_the_weights_of_a_loaded_one(kind: str, stored: str, adapters, tmp_path: Path) -> None:
    """Each kind and each kind of file. Weights that are converted are no longer mapped, so none may be."""
    base = tiny.make_base(tmp_path / "base", kind)
    dtype = STORED[stored](base)
    settings = ModelConfig(base=str(base), latent_dim=4, lora=adapters)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    mapped = T5VAE.mapped(settings, seed=3)
    for name, parameter in mapped.named_parameters():
        assert is_mapped(parameter, base) != is_new(name), name
        assert parameter.dtype == (torch.float32 if is_new(name) else dtype), name
    assert_same(mapped, T5VAE.from_base(settings, seed=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_base_in_several_dtypes_keeps_each_value(tmp_path: Path) -> None:
    """A norm in float32 beside matrices in bf16: as one of these dtypes, the other would be rounded."""
    base = tiny.make_base(tmp_path / "base", "t5")
    tensors = {
        name: tensor * 1.001 if "layer_norm" in name else tensor.to(torch.bfloat16)
        for name, tensor in load_file(base / FILE).items()
    }
    save_file(tensors, base / FILE, metadata={"format": "pt"})
    settings = ModelConfig(base=str(base), latent_dim=4)
    mapped = T5VAE.mapped(settings)
    assert {parameter.dtype for parameter in mapped.parameters()} == {torch.float32}
    assert_same(mapped, T5VAE.from_base(settings))


def test_an_export_is_mapped(tmp_path: Path) -> None:
    model = T5VAE.from_base(ModelConfig(base=tiny.base("t5"), latent_dim=4))
    model.save_pretrained(tmp_path / "export")
    found = exported_weights(tmp_path / "export")
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name])
        assert is_mapped(value, tmp_path / "export")
    file = tmp_path / "export" / FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing or broken"):
        exported_weights(tmp_path / "export")
