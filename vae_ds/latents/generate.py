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
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from vae_ds.data import collate, evaluation_batches, from_texts
from vae_ds.distributed import stream
from vae_ds.errors import CheckpointError, ConfigError, DataError
from vae_ds.latents.decoding import Decoding
from vae_ds.model import T5VAE, gaussian


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
    trained = [module for module in model.modules() if module.training]
    if trained:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in trained:
            module.training = True


def encode(
    model: T5VAE, tokenizer: Any, texts: Sequence[str], *, sampled: bool = False, **decoding: Any
) -> torch.Tensor:
    """Latents of `texts`, z_NL: the posterior means or, with `sampled`, one sample each, seeded by (seed, position).

    Texts longer than `max_tokens` are cut, with a warning.
    Raises DataError for an empty text or an empty list, ConfigError for a model without a latent code.
    """
    return _encode(model, tokenizer, texts, Decoding(**decoding), sampled).z_NL


def posterior(model: T5VAE, tokenizer: Any, texts: Sequence[str], **decoding: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and log variances of the posteriors of `texts`, mu_NL and logvar_NL. Raises the same errors as `encode`."""
    found = _encode(model, tokenizer, texts, Decoding(**decoding), sampled=False)
    return found.z_NL, found.logvar_NL


def decode(model: T5VAE, tokenizer: Any, z_NL: torch.Tensor, **decoding: Any) -> list[str]:
    """Texts of the latents z_NL, without special tokens. The state of torch's random generators does not change."""
    return [written.text for written in decode_with_ends(model, tokenizer, z_NL, **decoding)]


def decode_with_ends(model: T5VAE, tokenizer: Any, z_NL: torch.Tensor, **decoding: Any) -> list[Written]:
    """The texts of `decode`, each with whether the model ended it."""
    _need_latent(model)
    return _decode(model, tokenizer, z_NL, Decoding(**decoding))


def reconstruct(
    model: T5VAE, tokenizer: Any, texts: Sequence[str], *, sampled: bool = False, **decoding: Any
) -> list[str]:
    """Encode and decode each text, with z = mu or, with `sampled`, one seeded sample of its posterior.

    Raises the same errors as `encode`.
    """
    how = Decoding(**decoding)
    found = _encode(model, tokenizer, texts, how, sampled)
    # A batch is decoded until its longest text ends, and the texts are about as long as their sources.
    order_N = np.argsort(-found.lengths_N, kind="stable")
    return [written.text for written in _decode(model, tokenizer, found.z_NL, how, order_N)]


def sample(model: T5VAE, tokenizer: Any, n: int, seed: int = 0, **decoding: Any) -> list[str]:
    """`n` texts from the model's prior, z ~ p(z). Latent i is a function of (seed, first + i) and the prior only.

    A model without a latent code is a plain language model: give a temperature, otherwise all texts are equal.
    Raises ConfigError if n is below 1.
    """
    return [written.text for written in sample_with_ends(model, tokenizer, n, seed, **decoding)]


def sample_with_ends(model: T5VAE, tokenizer: Any, n: int, seed: int = 0, **decoding: Any) -> list[Written]:
    """The texts of `sample`, each with whether the model ended it. Raises ConfigError like `sample`."""
    if n < 1:
        raise ConfigError(f"the number of samples must be at least 1; found {n}")
    how = Decoding(seed=seed, **decoding)
    if model.bottleneck is None:
        return _decode(model, tokenizer, n, how)
    return _decode(model, tokenizer, prior_codes(model, n, seed, how.first), how)


def prior_codes(model: T5VAE, n: int, seed: int = 0, first: int = 0) -> torch.Tensor:
    """`n` codes z ~ p(z), float32 (n, L), those of `sample`. Code i is a function of (seed, first + i) and the prior.

    Raises CheckpointError if a learned prior draws codes that are not finite.
    """
    streams = [stream(seed, "prior", row) for row in range(first, first + n)]
    eps_NL = torch.as_tensor(np.stack([own.standard_normal(model.latent_dim) for own in streams]), dtype=torch.float32)
    choice_N = torch.as_tensor([own.random() for own in streams])
    with inference(model):
        z_NL = model.draw_codes(eps_NL.to(_device(model)), choice_N.to(_device(model)))
    if not z_NL.isfinite().all():
        raise CheckpointError(
            "the learned prior draws codes that are not finite; fit it again, or use the prior `normal`"
        )
    return z_NL


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
    za_L, zb_L = encode(model, tokenizer, [a, b], **decoding)
    return decode(model, tokenizer, between(za_L, zb_L, steps, path), **decoding)


def between(a_L: torch.Tensor, b_L: torch.Tensor, steps: int, path: str = "linear") -> torch.Tensor:
    """`steps` latents from a to b, both included, on a line or an arc, shape (steps, L). Raises ConfigError."""
    if steps < 2:
        raise ConfigError(f"an interpolation needs at least 2 steps; found {steps} steps")
    if path not in ("linear", "slerp"):
        raise ConfigError(f"the path must be linear or slerp; found {path}")
    return (linear if path == "linear" else slerp)(a_L, b_L, torch.linspace(0, 1, steps, device=a_L.device))


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
    z_NL = around(encode(model, tokenizer, [text], **decoding)[0], unit, reach, steps)
    return z_NL[:, unit].tolist(), decode(model, tokenizer, z_NL, **decoding)


def around(z_L: torch.Tensor, unit: int, reach: float, steps: int) -> torch.Tensor:
    """`steps` latents that differ from z in one unit, from z - reach to z + reach, shape (steps, L).

    Raises ConfigError like `traversal`.
    """
    if not 0 <= unit < len(z_L):
        raise ConfigError(f"the latent units are 0 to {len(z_L) - 1}; found {unit}")
    if steps < 1:
        raise ConfigError(f"a traversal needs at least 1 step; found {steps}")
    if not 0 < reach < float("inf"):
        raise ConfigError(f"the reach must be above 0; found {reach:g}")
    z_NL = z_L.repeat(steps, 1)
    # Symmetric by construction, so that the middle of an odd number of steps is exactly zero.
    z_NL[:, unit] += reach * (2 * torch.arange(steps, device=z_NL.device) - (steps - 1)) / max(steps - 1, 1)
    return z_NL


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


class _Encoded(NamedTuple):
    """Codes of N texts: z_NL (the mean of the posterior, or a sample of it), logvar_NL, and lengths in tokens."""

    z_NL: torch.Tensor
    logvar_NL: torch.Tensor
    lengths_N: np.ndarray


def _encode(model: T5VAE, tokenizer: Any, texts: Sequence[str], how: Decoding, sampled: bool) -> _Encoded:
    _need_latent(model)
    check_texts(texts)
    tokens = from_texts(texts, tokenizer, how.longest)
    if tokens.truncated:
        # The message is constant, so that Python shows it once per training run and not at each validation.
        warnings.warn(f"sentences longer than {how.longest} tokens are cut", stacklevel=3)
    device = _device(model)
    z_NL, logvar_NL = torch.zeros(2, len(texts), model.latent_dim, device=device)
    with inference(model):
        for index_B, _ in evaluation_batches(tokens.lengths_N, how.limits, 0, 1):
            batch = collate(
                tokens, index_B, pad_id=tokenizer.pad_token_id, latent_dim=model.latent_dim, seed=how.seed,
                keys=(), sample=sampled, eval=True, first=how.first,
            ).to(device)  # fmt: skip
            mu_BL, logvar_BL = model.encode(batch.input_ids_BT, batch.attention_mask_BT)
            z_BL = gaussian.sample(mu_BL, logvar_BL, batch.eps_BL) if sampled else mu_BL
            row_B = torch.as_tensor(index_B, device=device)
            z_NL[row_B], logvar_NL[row_B] = z_BL.float(), logvar_BL.float()
    return _Encoded(z_NL, logvar_NL, tokens.lengths_N)


def _decode(
    model: T5VAE, tokenizer: Any, z_NL: torch.Tensor | int, how: Decoding, order_N: np.ndarray | None = None
) -> list[Written]:
    """Decode latents z_NL or, for a model without a latent code, write N texts. `order_N`: which come first."""
    device = _device(model)
    count = z_NL if isinstance(z_NL, int) else len(z_NL)
    step = how.limits.count(how.max_new_tokens, count)
    order_N = np.arange(count) if order_N is None else order_N
    made: dict[int, Written] = {}
    with inference(model):
        for start in range(0, count, step):
            index_B = order_N[start : start + step]
            extra = how.arguments(index_B, device)
            if isinstance(z_NL, int):
                ids_BT = model.generate(None, how.max_new_tokens, batch_size=len(index_B), **extra)
            else:
                z_BL = z_NL[torch.as_tensor(index_B, device=z_NL.device)]
                ids_BT = model.generate(z_BL, how.max_new_tokens, **extra)
            texts = tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
            ends = (ids_BT == tokenizer.eos_token_id).any(dim=1).tolist()
            made |= zip(index_B.tolist(), map(Written, texts, ends), strict=True)
    return [made[row] for row in range(count)]


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


def check_texts(texts: Sequence[str]) -> None:
    """Raise DataError if there is no text, or if one is empty, no string or no Unicode."""
    if isinstance(texts, str):
        raise DataError("one string was given; give a list of sentences")
    if not len(texts):
        raise DataError("no sentence was given; give at least one")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"sentence {position + 1} is no text but {type(text).__name__}")
        if not text.strip():
            raise DataError(f"sentence {position + 1} is empty; remove it or add text")
        # Python reads arguments and file names that are not UTF-8 with such characters. No tokenizer takes them.
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise DataError(f"sentence {position + 1} has bytes that are not UTF-8; convert it to UTF-8")
