"""A trained model and its tokenizer in one object.

Shapes: N texts, L latent units. Codes are float32 tensors on the CPU, which numpy, scikit-learn and matplotlib take as
they are. Where a code goes in, it may be a tensor on any device, a numpy array or a list of lists.
"""

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch

from vae_ds import latents
from vae_ds.config import EvaluationConfig, hub
from vae_ds.data import Progress, from_texts, tokenizer_fingerprint
from vae_ds.distributed import Ranks
from vae_ds.errors import ConfigError, DataError
from vae_ds.evaluation import finished_run, log_likelihoods
from vae_ds.model import MAX_TOKENS, T5VAE, UNKNOWN_MAX_TOKENS
from vae_ds.runtime import run_dirs
from vae_ds.sharing import write_card
from vae_ds.textvae.nearest import Nearest

Codes = torch.Tensor | np.ndarray | Sequence[Any]

BATCHES_AT_ONCE = 16  # between two steps of the progress; texts are sorted by length within so many batches
BATCH = {"cpu": 64, "cuda": 256}
TOKENS = 1 << 14  # of one forward pass: 256 texts of 64 tokens, or 64 texts of 256
SAMPLED_VALUES = 4096  # of each weight, for the fingerprint


class Neighbour(NamedTuple):
    """A text of a corpus, its row there (from 0), and the distance of its code."""

    text: str
    row: int
    distance: float


class TextVAE:
    """A trained VAE: texts to codes and back. Results do not depend on the order and the batches, but for rounding.

    The keyword arguments `decoding` are the fields of `vae_ds.latents.Decoding`: `temperature`, `top_p`, `beams`,
    `max_new_tokens`, `seed`, and so on. Decoding is greedy by default. Texts of any number and length are accepted;
    longer ones than `max_tokens` are cut, with a warning. A bar shows the progress of long work on a terminal.

    Every method raises DataError for an empty list or an empty text, and for codes of a wrong shape or that are not
    finite; ConfigError for wrong options, or if the model has no latent code (injection `none`).
    """

    def __init__(
        self,
        model: T5VAE,
        tokenizer: Any,
        max_tokens: int = UNKNOWN_MAX_TOKENS,
        device: str = "auto",
        batch: int | None = None,
    ) -> None:
        """Moves `model` to `device`: auto (a GPU if there is one), cpu or cuda, or a device of PyTorch.

        max_tokens: most tokens of a text, with its end: of the input, and unless `decoding` says otherwise, of the
            output.
        batch: most texts in one forward pass; fewer, if they are long. None means 64 on a CPU and 256 on a GPU.
        """
        self.device = _device(device)
        self.model, self.tokenizer = model.to(self.device).eval(), tokenizer
        self.max_tokens = max_tokens
        self._notes: dict[str, Any] = {}
        self.batch = BATCH.get(self.device.type, 64) if batch is None else batch

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "auto",
        batch: int | None = None,
        *,
        prior: str | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a run directory, an export, an export on the Hugging Face hub (OWNER/NAME), or the shipped `tiny-vae`.

        revision: a branch, a tag or a commit, for a name on the hub.

        `max_tokens` is that of the training. `prior` is the kind of one of its priors, None for the one in use.
        Raises CheckpointError if there is no model, if it is broken, or if it has no such prior.
        """
        chosen = _device(device)
        place = (revision is None and run_dirs.shipped(path)) or hub.folder_of(path, revision)
        max_tokens = finished_run.max_tokens(place) or UNKNOWN_MAX_TOKENS
        made = cls(*finished_run.load_model(place, prior), max_tokens, str(chosen), batch)
        made._notes = finished_run.notes(place)
        return made

    def save_pretrained(self, path: str | Path) -> None:
        """Write an export that `from_pretrained` reads. Raises CheckpointError if `path` exists and is no export."""
        notes = self._notes | {MAX_TOKENS: self.max_tokens}
        self.model.save_pretrained(path, self.tokenizer, notes=notes, complete=write_card)

    @property
    def latent_dim(self) -> int:
        """L, the number of latent units; 0 for a plain language model."""
        return self.model.latent_dim

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen digits that differ for other weights or another tokenizer: codes belong to one fingerprint.

        A learned prior does not count, because codes do not depend on it.

        It is a hash of the names, shapes and evenly spread values of all weights, so it takes milliseconds for each
        billion parameters. A change of a few single values can go unnoticed; a step of training cannot.
        """
        hashed = hashlib.sha256(tokenizer_fingerprint(self.tokenizer).encode())
        for name, weight in self.model.named_parameters():
            if name.startswith("prior."):
                continue
            flat = weight.detach().flatten()
            index = torch.linspace(0, len(flat) - 1, min(len(flat), SAMPLED_VALUES), dtype=torch.float64)
            values = flat[index.long().to(flat.device)].float().cpu().numpy()
            hashed.update(f"{name} {tuple(weight.shape)}".encode() + values.tobytes())
        return hashed.hexdigest()[:16]

    def encode(self, texts: Iterable[str], *, sampled: bool = False, **decoding: Any) -> torch.Tensor:
        """Codes z_NL: the posterior means or, with `sampled`, one sample of each posterior, given by `seed`."""
        return self._in_parts(
            "Encoding",
            _listed(texts),
            lambda part, how: latents.encode(*self._pair, part, sampled=sampled, **how),
            decoding,
        )

    def posterior(self, texts: Iterable[str], **decoding: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """mu_NL and logvar_NL: the posterior of text n is N(mu, exp(logvar)), independent over the units."""
        both_N2L = self._in_parts(
            "Encoding",
            _listed(texts),
            lambda part, how: torch.stack(latents.posterior(*self._pair, part, **how), 1),
            decoding,
        )
        return both_N2L[:, 0], both_N2L[:, 1]

    def decode(self, z: Codes, **decoding: Any) -> list[str]:
        """The text of each of the codes z_NL."""
        z_NL = self._codes(z)
        return self._texts("Decoding", z_NL, lambda part, how: latents.decode(*self._pair, part, **how), decoding)

    def reconstruct(self, texts: Iterable[str], *, sampled: bool = False, **decoding: Any) -> list[str]:
        """Encode and decode each text."""
        return self._texts(
            "Reconstructing",
            _listed(texts),
            lambda part, how: latents.reconstruct(*self._pair, part, sampled=sampled, **how),
            decoding,
        )

    def sample(self, n: int, **decoding: Any) -> list[str]:
        """`n` texts from codes of the prior, given by `seed`. The first ones of more are the same."""
        if n < 1:
            raise ConfigError(f"the number of samples must be at least 1; found {n}")
        return self._texts(
            "Sampling", range(n), lambda part, how: latents.sample(*self._pair, len(part), **how), decoding
        )

    def interpolate(
        self, a: str, b: str, steps: int = 7, *, path: Literal["linear", "slerp"] = "linear", **decoding: Any
    ) -> list[str]:
        """`steps` texts from `a` to `b`, both ends included, on a line or an arc (slerp) between their codes."""
        return latents.interpolate(*self._pair, a, b, steps, path=path, **self._how(decoding))

    def analogy(self, a: str, b: str, c: str, **decoding: Any) -> str:
        """The text d with a : b :: c : d, decoded from z_c + z_b - z_a."""
        return latents.analogy(*self._pair, a, b, c, **self._how(decoding))

    def traverse(self, text: str, unit: int, *, reach: float = 3.0, steps: int = 7, **decoding: Any) -> list[str]:
        """`steps` texts with the value of one unit (from 0) from mu - reach to mu + reach."""
        return latents.traverse(*self._pair, text, unit, reach=reach, steps=steps, **self._how(decoding))

    def direction(self, negative: Iterable[str], positive: Iterable[str], **decoding: Any) -> torch.Tensor:
        """The mean code of the `positive` texts minus that of the `negative` ones, (L,), for `shift`."""
        start_L, end_L = (self.encode(texts, **decoding).double().mean(0) for texts in (negative, positive))
        return (end_L - start_L).float()

    def shift(self, texts: Iterable[str], direction: Codes, factor: float = 1.0, **decoding: Any) -> list[str]:
        """The text of z + `factor` times `direction` for each of `texts`; `direction` has the shape (L,)."""
        listed = _listed(texts)
        step_L = factor * self._codes(_array(direction)[None])[0].cpu()
        return self.decode(self.encode(listed, **decoding) + step_L, **decoding)

    def neighbours(
        self,
        text: str,
        corpus: Iterable[str],
        k: int = 5,
        *,
        z: Codes | None = None,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        **decoding: Any,
    ) -> list[Neighbour]:
        """The `k` texts of `corpus` whose codes are nearest to that of `text`, nearest first.

        z: the codes of the corpus, if they are known; they are encoded otherwise. `cosine` is 1 minus the cosine.
        """
        texts = _listed(corpus)
        nearest = Nearest(self.encode([text], **decoding), k, metric)
        z_NL = self.encode(texts, **decoding) if z is None else self._codes(z)
        if len(z_NL) != len(texts):
            raise DataError(f"{len(z_NL)} codes for {len(texts)} texts of the corpus; give one for each")
        nearest.add(z_NL)
        index_QK, distance_QK = nearest.found()
        pairs = zip(index_QK[0].tolist(), distance_QK[0].tolist(), strict=True)
        return [Neighbour(texts[row], row, distance) for row, distance in pairs]

    def log_prob(
        self, texts: Iterable[str], samples: int = 100, *, seed: int = 0, first: int = 0, max_tokens: int | None = None
    ) -> torch.Tensor:
        """An estimate of the natural logarithm of the probability of each text, with its end: (N,), float64, nats.

        log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), with K = `samples` (Burda et al. 2016): in expectation a lower bound.
        A model without a latent code gives the exact value. Of a text that is cut, it is the value of the kept tokens.
        """
        listed = _listed(texts)
        if samples < 1:
            raise ConfigError(f"the number of samples must be at least 1; found {samples}")
        latents.check_texts(listed)
        longest = max_tokens or self.max_tokens
        tokens = from_texts(listed, self.tokenizer, longest)
        if tokens.truncated:
            warnings.warn(f"sentences longer than {longest} tokens are cut", stacklevel=2)
        nats_N = log_likelihoods(
            self.model,
            tokens,
            Ranks(0, 0, 1, self.device),
            EvaluationConfig(iw_samples=samples),
            seed=seed,
            pad_id=self.tokenizer.pad_token_id,
            first=first,
            is_shown=_is_terminal(),
        )
        return torch.from_numpy(nats_N)

    def __repr__(self) -> str:
        return f"TextVAE({self.latent_dim} latent units, {self.max_tokens} tokens, {self.device}, {self.fingerprint})"

    @property
    def _pair(self) -> tuple[T5VAE, Any]:
        return self.model, self.tokenizer

    def _how(self, decoding: dict[str, Any]) -> dict[str, Any]:
        own = {"max_tokens": self.max_tokens, "max_new_tokens": self.max_tokens, "batch": self.batch, "tokens": TOKENS}
        return own | {name: value for name, value in decoding.items() if value is not None}

    def _parts(
        self, task: str, rows: Sequence[Any] | torch.Tensor, decoding: dict[str, Any]
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The rows in parts of some batches, each with the options for it. Shows the progress."""
        how = self._how(decoding)
        first = how.pop("first", 0)
        latents.Decoding(**how, first=first)  # wrong options are found before the first part
        size = BATCHES_AT_ONCE * how["batch"]
        with _progress(task, len(rows)) as add:
            # An empty list is one part, so that it meets its error.
            for start in range(0, max(1, len(rows)), size):
                part = rows[start : start + size]
                yield part, how | {"first": first + start}
                add(len(part))

    def _in_parts(
        self, task: str, texts: list[str], work: Callable[..., torch.Tensor], decoding: dict[str, Any]
    ) -> torch.Tensor:
        latents.check_texts(texts)
        return torch.cat([work(part, how).cpu() for part, how in self._parts(task, texts, decoding)])

    def _texts(self, task: str, rows: Any, work: Callable[..., list[str]], decoding: dict[str, Any]) -> list[str]:
        if isinstance(rows, list):
            latents.check_texts(rows)
        return [text for part, how in self._parts(task, rows, decoding) for text in work(part, how)]

    def _codes(self, z: Codes) -> torch.Tensor:
        """z as a float32 tensor (N, L) on the device. Raises DataError if it is something else."""
        array = _array(z)
        if array.ndim != 2 or array.shape[1] != self.latent_dim or not len(array):
            raise DataError(
                f"codes have the shape {array.shape}; this model needs (N, {self.latent_dim}), N at least 1"
            )
        wrong_N = ~np.isfinite(array).all(axis=1)
        if wrong_N.any():
            raise DataError(f"the code in row {int(wrong_N.argmax())} (counted from 0) has values that are not finite")
        return torch.from_numpy(array).to(self.device)


def _array(z: Codes) -> np.ndarray:
    """A float32 copy. Raises DataError if z is no array of numbers."""
    try:
        if isinstance(z, list | tuple) and z and isinstance(z[0], torch.Tensor):
            z = torch.stack(list(z))
        return np.array(z.detach().to("cpu", torch.float32).numpy() if isinstance(z, torch.Tensor) else z, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"codes are no matrix of numbers: {error}") from None


def _listed(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise DataError("one string was given; give a list of sentences")
    return list(texts)


def _device(name: str) -> torch.device:
    """Raises ConfigError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name} is unknown; use auto, cpu or cuda") from None
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        raise ConfigError(f"device {name}: this machine has no such usable GPU; use auto or cpu")
    return found


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def _progress(task: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A function that counts finished texts. Away from a terminal nothing is shown: other programs use this object."""
    if not _is_terminal():
        yield lambda count: None
        return
    with Progress(task, total, "texts") as shown:
        yield shown.add
