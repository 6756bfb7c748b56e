"""The numbers of a new recipe: from the base's size, the sentences' lengths and the number of steps.

Two kinds of rules. Those around the recipe `recommended` repeat what this project measured with the tiny T5. The rules
for larger bases come from elsewhere and were not measured by this project; docs/recipes.md names their sources.

Shapes: S sentences of the sample.
"""

import math

import numpy as np
from numpy.typing import NDArray

from vae_ds.authoring import budget

# The tiny T5, for which the rate of `recommended` was chosen, without its embeddings (test_rules compares it).
ANCHOR_PARAMETERS = 1_838_080
TOKEN_MULTIPLE = 8
SMALLEST_BATCH, LARGEST_BATCH = 32, 512
LONGEST_RUN_STEPS = 100_000
LEAST_STEPS, MOST_EPOCHS = 2600, 10  # steps of `recommended`
MOST_VALIDATED = 2000
CHECKPOINTING_PARAMETERS = 1_000_000_000
CHECKPOINTING_TOKENS = 512
USED_SHARE = 2 / 3  # of the memory of a GPU; the rest is for activations


def learning_rate(parameters: int, anchor: float) -> float:
    """The peak rate for a base with so many parameters outside of its embeddings, to two digits.

    The rate falls with the square root of the size: `anchor` at ANCHOR_PARAMETERS, at most `anchor`. The exponent is
    that of a line from the tiny T5 to t5-base, for which 1e-4 to 3e-4 is customary (transformers' page on T5).
    """
    return float(f"{anchor * min(1.0, math.sqrt(ANCHOR_PARAMETERS / parameters)):.2g}")


def length_at(lengths_S: NDArray[np.integer], percentile: float) -> int:
    """The smallest length that at least `percentile` % of the sentences do not exceed."""
    return int(np.percentile(lengths_S, percentile, method="inverted_cdf"))


def max_tokens(lengths_S: NDArray[np.integer], percentile: float) -> int:
    """`length_at`, rounded up to a multiple of TOKEN_MULTIPLE."""
    return -(-length_at(lengths_S, percentile) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def global_batch(sentences: int, ranks: int) -> int:
    """Sentences per step: SMALLEST_BATCH, doubled until the training has at most LONGEST_RUN_STEPS steps.

    At most LARGEST_BATCH, and then the next multiple of `ranks`. `sentences`: those of all epochs together.
    """
    size = SMALLEST_BATCH
    while size < LARGEST_BATCH and sentences > size * LONGEST_RUN_STEPS:
        size *= 2
    return -(-size // ranks) * ranks


def epochs(steps_per_epoch: int) -> int:
    """The smallest number of epochs with at least LEAST_STEPS steps, at most MOST_EPOCHS."""
    return min(MOST_EPOCHS, -(-LEAST_STEPS // steps_per_epoch))


def every_steps(steps: int) -> int:
    """Steps between validations, and between checkpoints: a tenth of the run to two digits, at most 5,000."""
    return min(5000, _floored(max(1, steps // 10)))


def logged_every(steps: int) -> int:
    """Steps between log lines: about 250 lines, at most 100 steps."""
    return min(100, max(1, steps // 250))


def warmup_steps(steps: int) -> int:
    """2 % of the steps, as in `recommended`, at most 1,000."""
    return min(1000, steps // 50)


def recomputes(parameters: int, tokens: int) -> bool:
    """Whether to recompute activations in the backward pass: for a large base, or for long sentences."""
    return parameters >= CHECKPOINTING_PARAMETERS or tokens >= CHECKPOINTING_TOKENS


def deepspeed(parameters: int, gpus: int, gpu_gb: float) -> tuple[str, float]:
    """The ds_config for 16 bits, and the memory in GB that it takes on each GPU besides activations.

    The first one of `budget.ORDER` that takes at most USED_SHARE of the GPU's memory; if there is none, the last.
    """
    sizes = {name: budget.states(name, "bf16", parameters, 0, gpus).device for name in budget.ORDER}
    fits = [name for name, size in sizes.items() if size <= USED_SHARE * gpu_gb * 1e9]
    chosen = fits[0] if fits else budget.ORDER[-1]
    return chosen, sizes[chosen] / 1e9


def _floored(number: int) -> int:
    """The number with all but its first two digits set to 0."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return number // unit * unit
