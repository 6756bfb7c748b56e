"""Out of memory, on a device or on the host, as one line that names the settings that help."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vae_ds.errors import OutOfMemory

# What the CPU allocator of PyTorch says; it has no exception class of its own.
HOST_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


# What helps in a training step; its gap is the micro batch.
STEP_ADVICE = (
    "lower batch.micro (now {}; the result is the same) or data.max_tokens, set model.gradient_checkpointing=true, or "
    "use a higher ZeRO stage (--deepspeed zero2, zero3)"
)


@contextmanager
def explain_out_of_memory(doing: str, advice: str) -> Iterator[None]:
    """Raise OutOfMemory for an allocation that fails inside. `doing` is the operation, `advice` what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        place = _place_of(error)
        if place is None:
            raise
        raise OutOfMemory(f"out of memory on the {place} during {doing}; {advice}") from error


def _place_of(error: BaseException) -> str | None:
    """`GPU` or `host`, None for an error that is not about memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU"
    if isinstance(error, MemoryError) or any(text in str(error) for text in HOST_MESSAGES):
        return "host"
    return None
