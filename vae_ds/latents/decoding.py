"""How tokens are chosen: greedily, by a beam search, or drawn from a random stream of each sentence.

Shapes: B sentences in a batch, T tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from vae_ds.data import Limits
from vae_ds.distributed import stream
from vae_ds.errors import ConfigError


@dataclass(frozen=True)
class Decoding:
    """How to read texts and choose tokens. The default is greedy decoding, which is deterministic.

    max_new_tokens: maximum length of the output in subword tokens, with the end-of-sentence token.
    max_tokens: maximum length of an input text; longer texts are cut. None means `max_new_tokens`, but at least 2.
    temperature: None means greedy decoding or beam search. A value above 0 draws the tokens, seeded by `seed`.
    top_p: with a temperature, draw from the smallest set of tokens with this total probability.
    beams: width of the beam search; 1 means no beam search.
    batch: most sentences per batch. The result does not depend on it, but for rounding.
    tokens: most tokens per batch, with padding: fewer sentences, if they are long. None means no limit, so that the
        number of batches does not depend on the lengths, which a model needs that ZeRO 3 divides.
    seed: seed of drawn tokens and of posterior samples. Each sentence has its own stream of random numbers.
    first: number of the first sentence. Sentences that are given in parts, each with the number of its first, get the
        same random numbers as in one call.
    Raises ConfigError for invalid values or combinations.
    """

    max_new_tokens: int = 64
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    beams: int = 1
    seed: int = 0
    batch: int = 64
    tokens: int | None = None
    first: int = 0

    def __post_init__(self) -> None:
        least_of = {"max_new_tokens": 1, "max_tokens": 2, "beams": 1, "batch": 1, "tokens": 1, "first": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}; found {value}")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature must be above 0; found {self.temperature:g}; omit it for greedy decoding")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1; found {self.top_p:g}")
        if self.top_p is not None and self.temperature is None:
            raise ConfigError("top_p needs drawn tokens; give a temperature too, for example 1.0")
        if self.beams > 1 and self.temperature is not None:
            raise ConfigError("a beam search draws no tokens; give `beams` or a temperature, not both")

    @property
    def longest(self) -> int:
        """The maximum length of an input text, in subword tokens."""
        return self.max_tokens or max(self.max_new_tokens, 2)

    @property
    def limits(self) -> Limits:
        """What one forward pass holds."""
        return Limits(self.batch, self.tokens)

    def arguments(self, index_B: np.ndarray, device: torch.device) -> dict[str, Any]:
        """The keyword arguments of transformers' `generate` for the sentences with the numbers first + `index_B`."""
        if self.temperature is None:
            return {"do_sample": False, "num_beams": self.beams}
        streams = (stream(self.seed, "tokens", self.first + int(index)) for index in index_B)
        uniform_BT = torch.from_numpy(np.stack([own.random(self.max_new_tokens) for own in streams])).to(device)
        chain = [TemperatureLogitsWarper(float(self.temperature)), DrawToken(uniform_BT)]
        if self.top_p is not None and self.top_p < 1:
            chain.insert(1, TopPLogitsWarper(self.top_p))
        # `do_sample` would draw from the generator of the device, in an order that depends on the batch.
        return {"do_sample": False, "num_beams": 1, "logits_processor": LogitsProcessorList(chain)}


class DrawToken(LogitsProcessor):
    """Draws the next token of each sentence, and gives all other tokens the score minus infinity.

    The token is the first one at which the distribution function exceeds a uniform number of the sentence (inversion).
    So it depends on the scores of this sentence and this number only. The tokens are added up in the order of their
    ids: an order by probability would change with the rounding of the scores, which depends on the batch.
    """

    def __init__(self, uniform_BT: torch.Tensor) -> None:
        """`uniform_BT` are float64 numbers in [0, 1), one for each sentence and new token."""
        self._uniform_BT = uniform_BT

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Ids (B, T), beginning with the decoder's start token, and scores (B, V) give new scores (B, V)."""
        sums_BV = scores.double().softmax(-1).cumsum(-1)
        level_B1 = self._uniform_BT[:, input_ids.shape[1] - 1, None] * sums_BV[:, -1:]
        chosen_B1 = torch.searchsorted(sums_BV, level_B1, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen_B1, 0.0)
