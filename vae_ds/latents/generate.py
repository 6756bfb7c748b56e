"""What a latent space is for: reconstruct, sample, interpolate, analogy, traverse.

Shapes: B sentences or latents in a batch, N of them altogether, L latent units, T tokens.
Latents are float32 on the model's device; texts come back in the order in which they were given. Every function takes
the fields of `Decoding` as keywords.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from vae_ds.data import collate, evaluation_batches, from_texts
from vae_ds.distributed import stream
from vae_ds.errors import ConfigError, DataError
from vae_ds.model import T5VAE, gaussian


@dataclass(frozen=True)
class Decoding:
    """How texts are read and tokens chosen. The defaults are greedy, and then nothing is random.

    max_new_tokens: longest output in subword tokens, end-of-sentence included. max_tokens: the same of a given text,
    longer ones are cut; None is `max_new_tokens`.
    temperature: None is greedy (or a beam search); above 0, tokens are drawn, seeded by `seed`.
    top_p: with a temperature, draw from the smallest set of tokens with this probability.
    beams: width of the beam search; 1 is none. batch: sentences at a time; drawn tokens depend on it.
    seed: of drawn tokens, and of posterior samples.
    Raises ConfigError for values that make no sense, alone or together.
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
                raise ConfigError(f"{name} is at least {least}; found {value}")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"temperature is above 0, or left out for greedy decoding; found {self.temperature:g}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is above 0 and at most 1; found {self.top_p:g}")
        if self.top_p is not None and self.temperature is None:
            raise ConfigError("top_p draws tokens: give a temperature with it, for example 1.0")
        if self.beams > 1 and self.temperature is not None:
            raise ConfigError("a beam search draws no tokens: give `beams` or a temperature, not both")

    def arguments(self) -> dict[str, Any]:
        """The same as keyword arguments of transformers' `generate`."""
        if self.temperature is None:
            return {"do_sample": False, "num_beams": self.beams}
        # top_k is said too: the library's own default would silently keep 50 tokens.
        nucleus = 1.0 if self.top_p is None else self.top_p
        return {"do_sample": True, "temperature": self.temperature, "top_p": nucleus, "top_k": 0}


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards each submodule has the mode that it had.

    `no_grad` and not `inference_mode`: ZeRO 3 gathers weights inside, and inference tensors among them would
    break the next backward pass.
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
    """Latents of `texts`, z_NL: the posterior's mean, or (`sampled`) one draw each, seeded by (seed, position).

    Texts longer than `max_tokens` are cut, with a warning.
    Raises DataError for an empty text or none at all, ConfigError for a model without a latent.
    """
    _need_latent(model)
    _check_texts(texts)
    how = Decoding(**decoding)
    longest = how.max_tokens or max(how.max_new_tokens, 2)
    tokens = from_texts(texts, tokenizer, longest)
    if tokens.truncated_N.any():
        # A constant text, so that Python shows it once however often a training run validates.
        warnings.warn(f"sentences longer than {longest} tokens are cut", stacklevel=2)
    device = _device(model)
    z_NL = torch.zeros(len(texts), model.latent_dim, device=device)
    with inference(model):
        for index_B, _ in evaluation_batches(tokens.lengths_N, how.batch, 0, 1):
            batch = collate(
                tokens, index_B, pad_id=tokenizer.pad_token_id, latent_dim=model.latent_dim, seed=how.seed,
                keys=(), sample=sampled, eval=True,
            ).to(device)  # fmt: skip
            mu_BL, logvar_BL = model.encode(batch.input_ids_BT, batch.attention_mask_BT)
            z_BL = gaussian.sample(mu_BL, logvar_BL, batch.eps_BL) if sampled else mu_BL
            z_NL[torch.as_tensor(index_B, device=device)] = z_BL.float()
    return z_NL


def decode(model: T5VAE, tokenizer: Any, z_NL: torch.Tensor, **decoding: Any) -> list[str]:
    """Texts of the latents z_NL, special tokens left out. Leaves torch's own random generators as they were."""
    how = Decoding(**decoding)
    return _decode(model, tokenizer, list(z_NL.split(how.batch)), how)


def reconstruct(
    model: T5VAE, tokenizer: Any, texts: Sequence[str], *, sampled: bool = False, **decoding: Any
) -> list[str]:
    """Each text through its own latent: z = mu, or (`sampled`) one draw from its posterior, seeded.

    Raises as `encode` does.
    """
    return decode(model, tokenizer, encode(model, tokenizer, texts, sampled=sampled, **decoding), **decoding)


def sample(model: T5VAE, tokenizer: Any, n: int, seed: int = 0, **decoding: Any) -> list[str]:
    """`n` texts from the prior z ~ N(0, I); latent i is a function of (seed, i) alone.

    A model without a latent is a plain language model: give a temperature, or all of its texts are one.
    Raises ConfigError if n is below 1.
    """
    if n < 1:
        raise ConfigError(f"the number of samples is at least 1; found {n}")
    if model.bottleneck is None:
        how = Decoding(seed=seed, **decoding)
        sizes = [min(how.batch, n - start) for start in range(0, n, how.batch)]
        return _decode(model, tokenizer, sizes, how)
    eps_NL = np.stack([stream(seed, "prior", row).standard_normal(model.latent_dim) for row in range(n)])
    z_NL = torch.as_tensor(eps_NL, dtype=torch.float32, device=_device(model))
    return decode(model, tokenizer, z_NL, seed=seed, **decoding)


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
    """`steps` texts from `a` to `b`, both ends included, decoded from latents on a line or (slerp) on an arc.

    Raises ConfigError if there are fewer than 2 steps or the path has another name, and as `encode` does.
    """
    if steps < 2:
        raise ConfigError(f"an interpolation has at least its 2 ends; found {steps} steps")
    if path not in ("linear", "slerp"):
        raise ConfigError(f"the path is linear or slerp; found {path}")
    za_L, zb_L = encode(model, tokenizer, [a, b], **decoding)
    between = linear if path == "linear" else slerp
    return decode(model, tokenizer, between(za_L, zb_L, torch.linspace(0, 1, steps, device=za_L.device)), **decoding)


def analogy(model: T5VAE, tokenizer: Any, a: str, b: str, c: str, **decoding: Any) -> str:
    """The text d with a : b :: c : d, from z_c + z_b - z_a. Raises as `encode` does."""
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
    """`steps` texts around `text`: latent unit `unit` (from 0) moved by -reach ... +reach, the others held at mu.

    `reach` is in units of the prior's standard deviation; with an odd number of steps the middle one is the
    reconstruction. Raises ConfigError if the model has no such unit or steps is below 1, and as `encode` does.
    """
    _need_latent(model)
    if not 0 <= unit < model.latent_dim:
        raise ConfigError(f"the latent units are 0 to {model.latent_dim - 1}; found {unit}")
    if steps < 1:
        raise ConfigError(f"a traversal has at least 1 step; found {steps}")
    z_NL = encode(model, tokenizer, [text], **decoding).repeat(steps, 1)
    # Symmetric by construction, so that the middle of an odd number of steps is exactly zero.
    z_NL[:, unit] += reach * (2 * torch.arange(steps, device=z_NL.device) - (steps - 1)) / max(steps - 1, 1)
    return decode(model, tokenizer, z_NL, **decoding)


def linear(a_L: torch.Tensor, b_L: torch.Tensor, share_N: torch.Tensor) -> torch.Tensor:
    """Points on the line from a to b, at the shares 0 (a) to 1 (b), both exact; (N, L)."""
    return (1 - share_N)[:, None] * a_L + share_N[:, None] * b_L


def slerp(a_L: torch.Tensor, b_L: torch.Tensor, share_N: torch.Tensor) -> torch.Tensor:
    """Points on the arc from a to b (Shoemake 1985; White 2016 for latents); (N, L), the ends exact.

    A straight line through the middle of a Gaussian in many dimensions leaves the shell where its mass is.
    Falls back to the line where no arc is defined: parallel or opposite latents, or one of length zero.
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


def _decode(model: T5VAE, tokenizer: Any, parts: Sequence[torch.Tensor | int], how: Decoding) -> list[str]:
    """Texts of latents z_BL, or (an int B, a model without a latent) of B plain samples."""
    device = _device(model)
    texts: list[str] = []
    with inference(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for number, part in enumerate(parts):
            torch.manual_seed(int(stream(how.seed, "tokens", number).integers(2**62)))
            extra = how.arguments()
            if isinstance(part, int):
                ids_BT = model.generate(None, how.max_new_tokens, batch_size=part, **extra)
            else:
                ids_BT = model.generate(part, how.max_new_tokens, **extra)
            texts += tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
    return texts


def shown(
    model: T5VAE, tokenizer: Any, sources: Sequence[str], seed: int, max_new_tokens: int
) -> tuple[list[tuple[str, str]], list[str]]:
    """What a training shows of itself: `sources` with their reconstructions, and as many samples from the prior.

    A plain language model has the latter alone, drawn. Every rank makes the same, as ZeRO 3 needs.
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
        raise ConfigError("this model has injection `none`: it is a plain language model without a latent")


def _check_texts(texts: Sequence[str]) -> None:
    if not texts:
        raise DataError("no sentence was given")
    for position, text in enumerate(texts):
        if not text.strip():
            raise DataError(f"sentence {position + 1} is empty")
