"""Use the latent space: encode, decode, reconstruct, sample, interpolate, analogy, traverse.

Shapes: B sentences or latents in a batch, N in total, L latent units, T tokens.
Latents are float32 on the device of the model. Texts are returned in the order of the input. Every function takes the
fields of `Decoding` as keyword arguments.

With a model that ZeRO 3 divides, all ranks make the same number of calls, with the same number of batches in each. The
texts may differ in length.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from vae_ds.data import Limits, collate, evaluation_batches, from_texts
from vae_ds.distributed import stream
from vae_ds.errors import ConfigError, DataError
from vae_ds.model import T5VAE, gaussian


@dataclass(frozen=True)
class Decoding:
    """How to read texts and choose tokens. The default is greedy decoding, which is deterministic.

    max_new_tokens: maximum length of the output in subword tokens, with the end-of-sentence token.
    max_tokens: maximum length of an input text; longer texts are cut. None means `max_new_tokens`, but at least 2.
    temperature: None means greedy decoding or beam search. A value above 0 draws the tokens, seeded by `seed`.
    top_p: with a temperature, draw from the smallest set of tokens with this total probability.
    beams: width of the beam search; 1 means no beam search.
    batch: sentences per batch; drawn tokens depend on it.
    seed: seed of drawn tokens and of posterior samples.
    Raises ConfigError for invalid values or combinations.
    """

    max_new_tokens: int = 64
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    beams: int = 1
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("max_tokens", 2), ("beams", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}; found {value}")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0; found {self.temperature:g}; omit it for greedy decoding")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1; found {self.top_p:g}")
        if self.top_p is not None and self.temperature is None:
            raise ConfigError("top_p needs drawn tokens; give a temperature too, for example 1.0")
        if self.beams > 1 and self.temperature is not None:
            raise ConfigError("a beam search draws no tokens; give `beams` or a temperature, not both")

    def arguments(self) -> dict[str, Any]:
        """The corresponding keyword arguments of transformers' `generate`."""
        if self.temperature is None:
            return {"do_sample": False, "num_beams": self.beams}
        # Set top_k explicitly: the default of the library silently keeps only 50 tokens.
        nucleus = 1.0 if self.top_p is None else self.top_p
        return {"do_sample": True, "temperature": self.temperature, "top_p": nucleus, "top_k": 0}


class Written(NamedTuple):
    """A text that a model wrote. `is_complete`: the model ended it; otherwise it reached `max_new_tokens`."""

    text: str
    is_complete: bool


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Context manager for eval mode without gradients. It restores the mode of each submodule afterwards.

    It uses `no_grad` instead of `inference_mode`, because ZeRO 3 gathers weights inside the context, and inference
    tensors among them would break the next backward pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def encode(
    model: T5VAE, tokenizer: Any, texts: Sequence[str], *, sampled: bool = False, **decoding: Any
) -> torch.Tensor:
    """Latents of `texts`, z_NL: the posterior means or, with `sampled`, one sample each, seeded by (seed, position).

    Texts longer than `max_tokens` are cut, with a warning.
    Raises DataError for an empty text or an empty list, ConfigError for a model without a latent code.
    """
    _need_latent(model)
    _check_texts(texts)
    how = Decoding(**decoding)
    longest = how.max_tokens or max(how.max_new_tokens, 2)
    tokens = from_texts(texts, tokenizer, longest)
    if tokens.truncated_N.any():
        # The message is constant, so that Python shows it once per training run and not at each validation.
        warnings.warn(f"sentences longer than {longest} tokens are cut", stacklevel=2)
    device = _device(model)
    z_NL = torch.zeros(len(texts), model.latent_dim, device=device)
    with inference(model):
        for index_B, _ in evaluation_batches(tokens.lengths_N, Limits(how.batch), 0, 1):
            batch = collate(
                tokens, index_B, pad_id=tokenizer.pad_token_id, latent_dim=model.latent_dim, seed=how.seed,
                keys=(), sample=sampled, eval=True,
            ).to(device)  # fmt: skip
            mu_BL, logvar_BL = model.encode(batch.input_ids_BT, batch.attention_mask_BT)
            z_BL = gaussian.sample(mu_BL, logvar_BL, batch.eps_BL) if sampled else mu_BL
            z_NL[torch.as_tensor(index_B, device=device)] = z_BL.float()
    return z_NL


def decode(model: T5VAE, tokenizer: Any, z_NL: torch.Tensor, **decoding: Any) -> list[str]:
    """Texts of the latents z_NL, without special tokens. The state of torch's random generators does not change."""
    return [written.text for written in _decode_latents(model, tokenizer, z_NL, Decoding(**decoding))]


def reconstruct(
    model: T5VAE, tokenizer: Any, texts: Sequence[str], *, sampled: bool = False, **decoding: Any
) -> list[str]:
    """Encode and decode each text, with z = mu or, with `sampled`, one seeded sample of its posterior.

    Raises the same errors as `encode`.
    """
    return decode(model, tokenizer, encode(model, tokenizer, texts, sampled=sampled, **decoding), **decoding)


def sample(model: T5VAE, tokenizer: Any, n: int, seed: int = 0, **decoding: Any) -> list[str]:
    """`n` texts from the prior z ~ N(0, I). Latent i is a function of (seed, i) only.

    A model without a latent code is a plain language model: give a temperature, otherwise all texts are equal.
    Raises ConfigError if n is below 1.
    """
    return [written.text for written in sample_with_ends(model, tokenizer, n, seed, **decoding)]


def sample_with_ends(model: T5VAE, tokenizer: Any, n: int, seed: int = 0, **decoding: Any) -> list[Written]:
    """The texts of `sample`, each with whether the model ended it. Raises ConfigError like `sample`."""
    if n < 1:
        raise ConfigError(f"the number of samples must be at least 1; found {n}")
    if model.bottleneck is None:
        how = Decoding(seed=seed, **decoding)
        sizes = [min(how.batch, n - start) for start in range(0, n, how.batch)]
        return _decode(model, tokenizer, sizes, how)
    eps_NL = np.stack([stream(seed, "prior", row).standard_normal(model.latent_dim) for row in range(n)])
    z_NL = torch.as_tensor(eps_NL, dtype=torch.float32, device=_device(model))
    return _decode_latents(model, tokenizer, z_NL, Decoding(seed=seed, **decoding))


def interpolate(
    model: T5VAE,
    tokenizer: Any,
    a: str,
    b: str,
    steps: int = 7,
    *,
    path: Literal["linear", "slerp"] = "linear",
    **decoding: Any,
) -> list[str]:
    """`steps` texts from `a` to `b`, both ends included, decoded from latents on a line or, with slerp, on an arc.

    Raises ConfigError if `steps` is below 2 or `path` is unknown, and the same errors as `encode`.
    """
    if steps < 2:
        raise ConfigError(f"an interpolation needs at least 2 steps; found {steps} steps")
    if path not in ("linear", "slerp"):
        raise ConfigError(f"the path must be linear or slerp; found {path}")
    za_L, zb_L = encode(model, tokenizer, [a, b], **decoding)
    between = linear if path == "linear" else slerp
    return decode(model, tokenizer, between(za_L, zb_L, torch.linspace(0, 1, steps, device=za_L.device)), **decoding)


def analogy(model: T5VAE, tokenizer: Any, a: str, b: str, c: str, **decoding: Any) -> str:
    """The text d with a : b :: c : d, decoded from z_c + z_b - z_a. Raises the same errors as `encode`."""
    za_L, zb_L, zc_L = encode(model, tokenizer, [a, b, c], **decoding)
    return decode(model, tokenizer, (zc_L + zb_L - za_L)[None], **decoding)[0]


def traverse(
    model: T5VAE,
    tokenizer: Any,
    text: str,
    unit: int,
    *,
    reach: float = 3.0,
    steps: int = 7,
    **decoding: Any,
) -> list[str]:
    """The texts of `traversal`, which also returns the values of the unit."""
    return traversal(model, tokenizer, text, unit, reach=reach, steps=steps, **decoding)[1]


def traversal(
    model: T5VAE,
    tokenizer: Any,
    text: str,
    unit: int,
    *,
    reach: float = 3.0,
    steps: int = 7,
    **decoding: Any,
) -> tuple[list[float], list[str]]:
    """Values of latent unit `unit` (from 0) around that of `text`, and the text of each; the other units stay at mu.

    The `steps` values go from mu - reach to mu + reach. `reach` is in units of the standard deviation of the prior.
    With an odd number of steps, the middle text is the reconstruction. Raises ConfigError if the model has no such
    unit, `steps` is below 1 or `reach` is not above 0, and the same errors as `encode`.
    """
    _need_latent(model)
    if not 0 <= unit < model.latent_dim:
        raise ConfigError(f"the latent units are 0 to {model.latent_dim - 1}; found {unit}")
    if steps < 1:
        raise ConfigError(f"a traversal needs at least 1 step; found {steps}")
    if not 0 < reach < float("inf"):
        raise ConfigError(f"the reach must be above 0; found {reach:g}")
    z_NL = encode(model, tokenizer, [text], **decoding).repeat(steps, 1)
    # Symmetric by construction, so that the middle of an odd number of steps is exactly zero.
    z_NL[:, unit] += reach * (2 * torch.arange(steps, device=z_NL.device) - (steps - 1)) / max(steps - 1, 1)
    return z_NL[:, unit].tolist(), decode(model, tokenizer, z_NL, **decoding)


def linear(a_L: torch.Tensor, b_L: torch.Tensor, share_N: torch.Tensor) -> torch.Tensor:
    """Points on the line from a (share 0) to b (share 1), shape (N, L). The ends are exact."""
    return (1 - share_N)[:, None] * a_L + share_N[:, None] * b_L


def slerp(a_L: torch.Tensor, b_L: torch.Tensor, share_N: torch.Tensor) -> torch.Tensor:
    """Points on the arc from a to b (Shoemake 1985; White 2016 for latents), shape (N, L). The ends are exact.

    In many dimensions, a straight line between samples of a Gaussian leaves the shell that contains most of the mass.
    Uses the line if no arc is defined: for parallel or opposite latents, or for a latent of length zero.
    """
    a, b = a_L.double(), b_L.double()
    lengths = a.norm() * b.norm()
    cosine = (a @ b / lengths).clamp(-1, 1) if lengths > 0 else torch.ones_like(lengths)
    sine = torch.sqrt(1 - cosine**2)
    if sine < 1e-6:
        return linear(a_L, b_L, share_N)
    angle = torch.atan2(sine, cosine)
    share = share_N.double()
    arc_NL = (torch.sin((1 - share) * angle)[:, None] * a + torch.sin(share * angle)[:, None] * b) / torch.sin(angle)
    return arc_NL.to(a_L.dtype)


def _decode_latents(model: T5VAE, tokenizer: Any, z_NL: torch.Tensor, how: Decoding) -> list[Written]:
    return _decode(model, tokenizer, list(z_NL.split(how.batch)), how)


def _decode(model: T5VAE, tokenizer: Any, parts: Sequence[torch.Tensor | int], how: Decoding) -> list[Written]:
    """Decode each part: latents z_BL or, for a model without a latent code, the number B of texts to write."""
    device = _device(model)
    made: list[Written] = []
    with inference(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for number, part in enumerate(parts):
            torch.manual_seed(int(stream(how.seed, "tokens", number).integers(2**62)))
            extra = how.arguments()
            if isinstance(part, int):
                ids_BT = model.generate(None, how.max_new_tokens, batch_size=part, **extra)
            else:
                ids_BT = model.generate(part, how.max_new_tokens, **extra)
            texts = tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
            made += map(Written, texts, (ids_BT == tokenizer.eos_token_id).any(dim=1).tolist())
    return made


def shown(
    model: T5VAE, tokenizer: Any, sources: Sequence[str], seed: int, max_new_tokens: int
) -> tuple[list[tuple[str, str]], list[str]]:
    """Examples to show during training: `sources` with their reconstructions, and as many samples from the prior.

    A plain language model has samples only, with drawn tokens. Every rank makes the same texts: ZeRO 3 needs
    the same number of calls on all ranks.
    """
    if model.bottleneck is None:
        drawn = sample(model, tokenizer, len(sources), seed, max_new_tokens=max_new_tokens, temperature=1.0)
        return [], drawn
    made = reconstruct(model, tokenizer, sources, max_new_tokens=max_new_tokens)
    samples = sample(model, tokenizer, len(sources), seed, max_new_tokens=max_new_tokens)
    return list(zip(sources, made, strict=True)), samples


def _device(model: T5VAE) -> torch.device:
    return next(model.parameters()).device


def _need_latent(model: T5VAE) -> None:
    if model.bottleneck is None:
        raise ConfigError("this model has injection `none` and so no latent code; it can only sample")


def _check_texts(texts: Sequence[str]) -> None:
    if not texts:
        raise DataError("no sentence was given; give at least one")
    for position, text in enumerate(texts):
        if not text.strip():
            raise DataError(f"sentence {position + 1} is empty; remove it or add text")
