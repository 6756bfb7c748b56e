"""The cases that the ranks of test_slices.py run: what each rank stores of a tiny T5, without the other ranks."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.engine_cases import STAGES, engine, main
from vae_ds import distributed
from vae_ds.config.settings import ModelConfig
from vae_ds.distributed.ranks import Ranks
from vae_ds.engine.phase_engine import PhaseEngine
from vae_ds.engine.slices import Part
from vae_ds.model import T5VAE

LARGEST_OVER_MEAN = 1.05
KINDS = [(stage, "fp32", None) for stage in STAGES] + [(2, "bf16", "t5.decoder"), (3, "bf16", "t5.decoder")]
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier")


def engine_of(ranks: Ranks, stage: int, precision: str, frozen: str | None) -> PhaseEngine:
    model = T5VAE.from_base(ModelConfig())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen is None or not name.startswith(frozen))
    return engine(model, ranks, stage, precision)


def bytes_of(part: Part) -> int:
    return sum(value.nbytes for one in part.slices.values() for value in one.values.values())


def balance(ranks: Ranks, stage: int, precision: str, frozen: str | None) -> None:
    """Each rank stores equally much, in its own memory, and calls no collective to find it."""
    built = engine_of(ranks, stage, precision, frozen)
    import deepspeed.comm  # after the engine, which prepares the import

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a save calls a collective")

    with pytest.MonkeyPatch.context() as patch:
        for module in (dist, deepspeed.comm):
            for name in COLLECTIVES:
                patch.setattr(module, name, refuse, raising=False)
        part = built.part()
    if ranks.is_main:
        built.part()  # the other ranks do not: in a collective, rank 0 would wait for ever
    built.close()
    sizes = distributed.gather_objects(bytes_of(part))
    elements = {name: torch.Size(shape).numel() for name, shape in part.shapes.items()}
    whole = sum(size * (4 if name in part.frozen else 12) for name, size in elements.items())
    assert bool(part.frozen) == (frozen is not None)
    assert sum(sizes) == whole
    assert max(sizes) / (whole / ranks.world) < LARGEST_OVER_MEAN, sizes
    # A view of a larger tensor would keep all of it until the shard is written.
    held = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for one in part.slices.values()
        for value in one.values.values()
    }
    assert sum(held.values()) <= bytes_of(part)
    if ranks.is_main:
        print(
            f"zero{stage} {precision}: host copy {sizes} bytes, largest / mean {max(sizes) * ranks.world / whole:.4f}"
        )


def cases() -> dict:
    """All cases by name."""
    return {
        f"balance-zero{stage}-{precision}": lambda ranks, kind=(stage, precision, frozen): balance(ranks, *kind)
        for stage, precision, frozen in KINDS
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), cases())
