"""The parts of the GPU check, the most important first, and the cells of each: what is measured by itself.

The seconds are expectations for one GPU of a data centre. They are guesses until the check has run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vae_ds.engine import shipped_names
from vae_ds.errors import ConfigError

START_S = 20.0
"""Time until a process has loaded torch, DeepSpeed and its device."""

PRECISIONS = ("bf16", "fp16", "fp32")
REFERENCE = "reference"

TOLERANCES = {"fp32": 2e-3, "bf16": 2e-2, "fp16": 2e-2}
"""Largest relative difference of the loss of a step from that of the CPU in float32, with no step skipped."""
AFTER_SKIPS = 6e-2
"""The same if fp16 skipped steps: the noise of a step is another one then."""

PARTS = {
    REFERENCE: "the loss curve of the same steps on the CPU in float32; needs no GPU",
    "curves-bf16": "each ds_config in bf16: both phases, beside the reference",
    "speed": "throughput and MFU by shape and sentence length",
    "waits": "copies to the host and waits for the device in a step",
    "memory": "peak memory of a step beside `vae-ds plan`",
    "resume": "stopped in the middle of a phase, resumed at another ZeRO stage",
    "evaluation": "metrics and generated texts beside those of the CPU",
    "curves-fp16": "each ds_config in fp16, with its skipped steps",
    "curves-fp32": "each ds_config in fp32",
}


@dataclass(frozen=True)
class Cell:
    """One measurement: a row of a table. `name` says what it measures, words of it separated by spaces."""

    part: str
    name: str
    expected_s: float

    @property
    def id(self) -> str:
        """`PART/NAME` without spaces."""
        return f"{self.part}/{self.name.replace(' ', '+')}"


def cells(cpu: bool = False) -> list[Cell]:
    """All cells in the order of their importance. `cpu`: the few small ones that a CPU measures in a minute."""
    return [cell for part in PARTS for cell in (_small(part) if cpu else _of(part))]


def chosen(parts: Sequence[str] | None, cpu: bool = False) -> list[Cell]:
    """The cells of some parts, None for all. Raises ConfigError for a part that does not exist."""
    wrong = [part for part in parts or () if part not in PARTS]
    if wrong:
        raise ConfigError(f"--only {wrong[0]}: there is no such part; the parts are {', '.join(PARTS)}")
    return [cell for cell in cells(cpu) if parts is None or cell.part in parts]


def difference(found: list[float], expected: list[float]) -> float | None:
    """The largest relative difference of two curves. None if their lengths differ or a value is not finite."""
    if len(found) != len(expected) or None in found or None in expected:
        return None
    one, other = np.array(found), np.array(expected)
    return float(np.max(np.abs(one - other) / np.maximum(np.abs(other), 1e-9)))


def _of(part: str) -> list[Cell]:
    if part.startswith("curves-"):
        precision = part.removeprefix("curves-")
        names = [name for name in shipped_names() if f"_{precision}" in name]
        return [Cell(part, name, 15 if "nvme" in name else 8 if "offload" in name else 5) for name in names]
    seconds: dict[str, dict[str, float]] = {
        REFERENCE: {"zero0_fp32 on the CPU": 15},
        "speed": {
            f"{shape} {profile} {precision}": spent
            for shape, spent in {"t5-small": 8, "t5-base": 14, "t5-large": 35}.items()
            for profile in ("ptb", "snli", "yahoo")
            for precision in (("bf16", "fp16", "fp32") if (shape, profile) == ("t5-base", "snli") else ("bf16",))
        },
        "waits": dict.fromkeys(("zero1_bf16", "zero2_bf16", "zero3_bf16", "zero2_fp16"), 6),
        "memory": {
            "t5-small zero1_bf16": 10,
            "t5-base zero1_bf16": 14,
            "t5-base zero2_bf16": 14,
            "t5-base zero1_fp32": 14,
            "t5-large zero1_bf16": 35,
            "t5-large zero3_bf16": 35,
        },
        "resume": dict.fromkeys(("bf16 zero1 to zero3", "fp16 zero2 to zero1", "fp32 zero3 to zero0"), 12),
        "evaluation": {"metrics": 15, "texts": 10},
    }
    return [Cell(part, name, spent) for name, spent in seconds[part].items()]


def _small(part: str) -> list[Cell]:
    names = {
        REFERENCE: ["zero0_fp32 on the CPU"],
        "curves-bf16": ["zero1_bf16"],
        "speed": ["tiny snli fp32"],
        "waits": ["zero1_bf16"],
        "memory": ["tiny zero1_fp32"],
        "resume": ["fp32 zero0 to zero1"],
        "evaluation": ["metrics", "texts"],
        "curves-fp16": ["zero2_fp16"],
        "curves-fp32": ["zero3_fp32"],
    }
    return [Cell(part, name, 6) for name in names[part]]
