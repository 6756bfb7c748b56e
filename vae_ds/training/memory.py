"""Memory of a training: the size of a micro batch that fits, and what to change if it did not."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from vae_ds import distributed
from vae_ds.data import Limits
from vae_ds.engine import PhaseEngine
from vae_ds.errors import OutOfMemory
from vae_ds.training.preparation import Setup

log = logging.getLogger(__name__)

# What the CPU allocator of PyTorch says; it has no exception class of its own.
HOST_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")

# What helps in a training step; its gap is the size of a micro batch.
STEP_ADVICE = (
    "lower batch.tokens or batch.micro (now at most {}; the result is the same) or data.max_tokens, set "
    "model.gradient_checkpointing=true, or use a higher ZeRO stage (--deepspeed zero2, zero3)"
)

USED_SHARE = 0.5  # of the free memory; the estimate does not know the kernels and the allocator of the GPU
MOST_TOKENS = 65_536  # a larger forward pass is not faster
GATHERED_BYTES = 2e9  # DeepSpeed's buckets, and at stage 3 the weights that are gathered at a time


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


def describe_limits(setup: Setup) -> str:
    """The limits of a forward pass in words, before there is an engine."""
    return "as many tokens as the GPU's memory permits" if _is_by_memory(setup) else str(setup.limits)


def limits_for(setup: Setup, engine: PhaseEngine) -> Limits:
    """The limits of a forward pass in a phase: those of the recipe or, on GPUs with `auto`, by the free memory.

    The rank with the least memory decides, so that all ranks cut a batch alike. A collective. The number is a power of
    two: a little more or less free memory gives the same cut, so a run resumes exactly.
    """
    if not _is_by_memory(setup):
        return setup.limits
    device, longest = setup.ranks.device, setup.config.data.max_tokens
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused - to_come(engine, setup)
    least = min(distributed.gather_objects(free))
    of_token = bytes_per_token(engine.module, 4 if setup.precision == "fp32" else 2, longest)
    tokens = fitting_tokens(least, of_token)
    if setup.ranks.is_main:
        message = (
            "batch.tokens auto: at most %d tokens per rank and forward pass (%.1f GB free, about %.2f MB per token)"
        )
        log.info(message, tokens, least / 1e9, of_token / 1e6)
        if tokens < longest:
            log.warning(
                "a sentence of data.max_tokens %d may not fit into the memory; set model.gradient_checkpointing=true, "
                "use a higher ZeRO stage (--deepspeed zero2, zero3), or lower data.max_tokens",
                longest,
            )
    return replace(setup.limits, tokens=tokens)


def _is_by_memory(setup: Setup) -> bool:
    batch = setup.config.batch
    return setup.ranks.device.type == "cuda" and batch.micro == batch.tokens == "auto"


def fitting_tokens(free_bytes: float, of_token_bytes: float) -> int:
    """The largest power of two of tokens that takes at most USED_SHARE of the memory; at least 1."""
    most = int(min(MOST_TOKENS, max(1.0, USED_SHARE * free_bytes / of_token_bytes)))
    return 1 << (most.bit_length() - 1)


def to_come(engine: PhaseEngine, setup: Setup) -> float:
    """Bytes that the first step takes besides activations: gradients, their float32 sums, buckets, at stage 0 moments.

    As in the table of ds_configs/README.md.
    """
    stage = int(setup.ds_config.get("zero_optimization", {}).get("stage", 0))
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)
    if stage == 0:
        return 12.0 * trained
    if stage == 1:
        return 6.0 * trained
    return 4.0 * trained / setup.ranks.world + (stage - 1) * GATHERED_BYTES


def bytes_per_token(model: Any, element_bytes: int, longest: int) -> float:
    """About what a training step keeps per token of a micro batch, for the encoder and the decoder together.

    Counted from the tensors that a T5 saves for its backward pass, of sentences with `longest` tokens. The logits are
    counted as they are at their peak: in the model's format, in float32, and their gradient.
    """
    config = model.t5.config
    width, inner, heads = config.d_model, config.num_heads * config.d_kv, config.num_heads
    forward = (16 if config.is_gated_act else 6) * config.d_ff
    # A layer of the encoder and one of the decoder. The norms and the attention weights are computed in float32.
    pair = (32 + 9 * element_bytes) * width + 32 * inner + element_bytes * forward + 24 * heads * longest
    layers = config.num_layers + config.num_decoder_layers
    kept = layers * element_bytes * width + pair if model.settings.gradient_checkpointing else layers / 2 * pair
    return float(kept + (20 + 5 * element_bytes) * width + 12 * config.vocab_size)
