"""The cases that the ranks of test_communication.py run: how exact the sum of 16-bit gradients over the ranks is.

The gradients of each rank are known numbers of 16 bits, so their exact mean is known, too. After the first step, the
first moment of AdamW is 0.1 times the gradient that it was given.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from support.engine_cases import STAGES, main
from vae_ds import distributed
from vae_ds.config.settings import OptimizerConfig
from vae_ds.distributed.ranks import Ranks
from vae_ds.engine.library import deepspeed_library
from vae_ds.engine.phase_engine import PhaseEngine, resolve

MICROS = 3
SIZES = (1000, 37, 4099)  # the last one is larger than a bucket
BUCKET = 2048
SMALLER = 256  # for the first loss scale of fp16
KINDS = [(stage, kind) for kind in ("bf16", "fp16", "bf16_offload") for stage in STAGES[kind != "bf16" :]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Linear(nn.Module):
    """sum_i w_i g_i / SMALLER: the gradient of w is g / SMALLER, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in SIZES)

    def forward(self, parts: list[Tensor]) -> Tensor:
        sums = [(own * given.to(own)).sum() for own, given in zip(self.parts, parts, strict=True)]
        return torch.stack(sums).sum().float() / SMALLER


def gradient(rank: int, micro: int, dtype: torch.dtype) -> Tensor:
    """What one micro batch of one rank contributes, float64, exact in the dtype."""
    draw = torch.Generator().manual_seed(100 * rank + micro)
    return torch.randn(sum(SIZES), generator=draw).to(dtype).double()


def error(ranks: Ranks, stage: int, kind: str, communication: str | None) -> float:
    """|g - exact| / |exact| of the gradient g that AdamW is given; `communication` None: as resolved."""
    precision = kind.partition("_")[0]
    tree = resolve(f"zero{stage}_{kind}", precision)
    if communication is not None:
        tree["communication_data_type"] = communication
    tree["zero_optimization"] |= {"reduce_bucket_size": BUCKET}
    if stage == 3:
        tree["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    settings = OptimizerConfig(weight_decay=0, clip=0, betas=(0.9, 0.999))
    built = PhaseEngine(Linear(), optimizer=settings, ranks=ranks, precision=precision, ds_config=tree)
    dtype = DTYPES[precision]
    for micro in range(MICROS):
        built.backward(built.forward(list(gradient(ranks.rank, micro, dtype).split(SIZES))), micro == MICROS - 1)
        outcome = built.step(1e-3)
    assert outcome is not None
    assert outcome.applied
    moments = built.state().moments["exp_avg"]
    built.close()
    found = torch.cat([moments[f"parts.{number}"] for number in range(len(SIZES))]).double() / 0.1 * SMALLER
    exact = sum(gradient(rank, micro, dtype) for rank in range(ranks.world) for micro in range(MICROS)) / ranks.world
    return float((found - exact).norm() / exact.norm())


def measure(ranks: Ranks, stage: int, kind: str, to: Path) -> None:
    """Write the errors as resolved, and with a sum in 16 bits."""
    found = {"resolved": error(ranks, stage, kind, None), "in16": error(ranks, stage, kind, kind.partition("_")[0])}
    if ranks.is_main:
        to.write_text(json.dumps(found))
    distributed.barrier()


def cases(to: Path) -> dict:
    """All cases by name."""
    return {
        f"zero{stage}-{kind}": lambda ranks, one=(stage, kind): measure(ranks, *one, to / f"zero{one[0]}-{one[1]}.json")
        for stage, kind in KINDS
    }


if __name__ == "__main__":
    # Sums and products in fp16 work on every CPU, but DeepSpeed asks for fast ones.
    accelerator = deepspeed_library().accelerator.get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    main(Path(sys.argv[1]), cases(Path(sys.argv[1])))
