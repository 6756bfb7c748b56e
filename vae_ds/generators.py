"""The state of this process's random generators as plain data, for checkpoints: no pickle, readable JSON.

They are behind dropout alone; the method's own draws are functions of seed, step and sentence (see `runtime.stream`).
"""

import base64
import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators, and of this process's GPU, as JSON values."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    plain = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), _pack(np.asarray(keys).tobytes()), int(position), int(has_gauss), float(cached)],
        "torch": _pack(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available():
        plain["cuda"] = _pack(torch.cuda.get_rng_state().numpy().tobytes())
    return plain


def restore(plain: dict[str, Any]) -> None:
    """Set the generators to what `capture` returned; a GPU's state is skipped where there is none."""
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(plain["torch"]))
    if "cuda" in plain and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(plain["cuda"]))


def _pack(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
