"""Random numbers: streams that are functions of their keys, and the states of this process's generators.

The random numbers of the method (sentence order, deletion noise, eps) come from `stream`. Only dropout uses the
generators of the process. `capture` and `restore` save their states in checkpoints as JSON, without pickle.
"""

import base64
import hashlib
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
    """Set the generators to the states that `capture` returned. Without a GPU, the state of a GPU is ignored."""
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


def stream(*keys: int | str) -> np.random.Generator:
    """A counter-based random generator that depends only on `keys`. It is the same on every rank and machine."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def seed_everything(seed: int, rank: int, phase: int) -> None:
    """Seed the generators that dropout uses, differently on each rank."""
    numbers = stream(seed, "phase", phase, "rank", rank).integers(0, 2**31, size=3)
    random.seed(int(numbers[0]))
    np.random.seed(int(numbers[1]))
    torch.manual_seed(int(numbers[2]))
