"""Settings in words, for legends and tables: `free bits 0.5, per unit` and not `free_bits.nats=0.5`.

A setting's key is the recipe's dotted key, but a phase goes by its name: `phases.full.denoise`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vae_ds.config import EXCLUSIVE

_BEFORE_SETTING = {"phases": 2}  # parts of a key before the setting itself: `phases.full.`; 1 for other sections

FREE_BITS_SCOPES = {
    "per_dim": "per unit",
    "per_dim_batch": "per unit (batch mean)",
    "total": "in total",
    "total_batch": "in total (batch mean)",
}
INJECTIONS = {
    "cross_attention": "z in cross-attention",
    "self_attention": "z in self-attention",
    "embedding": "z in embeddings",
    "self_attention+embedding": "z in self-attention and embeddings",
    "none": "no z",
}
# What the runs of a group change, as the legends of the figures name it. Other topics keep the setting's name.
TOPICS = {
    "": "reference",
    "aggressive": "aggressive encoder training",
    "beta": "weight of the KL (beta)",
    "denoise": "denoising",
    "free_bits": "free bits (KL threshold)",
    "freeze": "frozen parameters",
    "injection": "injection of z",
    "latent_dim": "size of the code",
    "optimizer": "optimizer",
    "phases": "other phases",
    "pooling": "pooling",
    "sample_posterior": "sampling of z",
    "several": "several settings",
}


def label(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The values of `keys` in words, such as `mean pooling, denoising 0.15`; empty if `settings` has none of them.

    A phase is named only if another phase has the same setting in `keys`: `denoising 0.4 (warmup)`.
    """
    phrases: dict[str, None] = {}
    for key in keys:
        if key in settings and (phrase := _phrase(key, settings, keys)):
            phrases[phrase] = None
    return ", ".join(phrases)


def topic(key: str) -> str:
    """What a key is about: `phases.full.free_bits.nats` about free_bits, `model.pool_layers` about pooling."""
    name = _split(key)[1].split(".")[0]
    return "pooling" if name == "pool_layers" else name


def topic_words(name: str) -> str:
    """A topic of `runs.by_topic` as a legend names it."""
    return TOPICS.get(name, name.replace("_", " "))


def short(key: str, keys: Sequence[str]) -> str:
    """A dotted key without its section or phase, unless another of `keys` would then have the same name."""
    parts = key.split(".")
    for start in range(min(_BEFORE_SETTING.get(parts[0], 1), len(parts) - 1), 0, -1):
        tail = ".".join(parts[start:])
        if not any(other != key and f".{other}".endswith(f".{tail}") for other in keys):
            return tail
    return key


def shown(value: Any) -> str:
    """A setting's value in a table."""
    if isinstance(value, list):
        return "+".join(shown(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _phrase(key: str, settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """One setting, or all settings of a section such as `free_bits`, in words; empty if there is nothing to say."""
    prefix, name = _split(key)
    section = name.split(".")[0]
    inside = f"{prefix}{section}."
    if section in _SECTIONS:
        values = {other.removeprefix(inside): value for other, value in settings.items() if other.startswith(inside)}
        words = _SECTIONS[section](values, {other.removeprefix(inside) for other in keys if other.startswith(inside)})
    elif settings[key] is None:
        # Of some settings, exactly one has a value: null for the others says nothing.
        is_idle = any(name.rpartition(".")[2] in group for group in EXCLUSIVE)
        words = "" if is_idle else _plain(short(key, keys), False)
    elif name in _WORDS:
        words = _WORDS[name](settings[key])
    else:
        words = _plain(short(key, keys), settings[key])
    if not words or not prefix.startswith("phases."):
        return words
    others = [_split(other) for other in keys if other.startswith("phases.")]
    is_shared = any(other != prefix and its_name.split(".")[0] == section for other, its_name in others)
    return f"{words} ({prefix.split('.')[1]})" if is_shared else words


def _split(key: str) -> tuple[str, str]:
    """`phases.full.free_bits.nats` as `phases.full.` and `free_bits.nats`; `seed` as an empty string and `seed`."""
    parts = key.split(".")
    start = min(_BEFORE_SETTING.get(parts[0], 1), len(parts) - 1)
    return ".".join([*parts[:start], ""]), ".".join(parts[start:])


def _plain(name: str, value: Any) -> str:
    words = name.replace(".", " ").replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {shown(value)}"


def _free_bits(values: Mapping[str, Any], differing: set[str]) -> str:
    if not values["nats"]:
        return "no free bits"
    words = f"free bits {values['nats']:g}"
    return f"{words}, {FREE_BITS_SCOPES.get(values['mode'], values['mode'])}" if "mode" in differing else words


def _beta(values: Mapping[str, Any], differing: set[str]) -> str:
    schedule = values["schedule"]
    if schedule == "constant":
        return f"constant beta {values['value']:g}"
    if schedule == "target":
        return f"beta for a KL of {values['kl']:g}"
    highest = f" to {values['max']:g}" if "max" in differing or values["max"] != 1 else ""
    if schedule == "cyclical":
        cycles = f"{values['cycles']} cycle{'' if values['cycles'] == 1 else 's'}"
        parts = f" ({values['zero']:.0%} at 0, {values['ramp']:.0%} rising)" if differing & {"zero", "ramp"} else ""
        return f"beta{highest} in {cycles}{parts}"
    lengths = {"over_epochs": "{:g} epochs", "over_steps": "{:,} steps", "over_fraction": "{:.0%} of the phase"}
    length = next(words.format(values[key]) for key, words in lengths.items() if values[key] is not None)
    lowest = f" from {values['start']:g}" if values["start"] else ""
    return f"beta linear{lowest}{highest} over {length}"


def _aggressive(values: Mapping[str, Any], differing: set[str]) -> str:
    return "aggressive encoder training" if values else ""


# Sections of a recipe whose settings make one phrase together.
_SECTIONS: dict[str, Callable[[Mapping[str, Any], set[str]], str]] = {
    "free_bits": _free_bits,
    "beta": _beta,
    "aggressive": _aggressive,
}
_WORDS: dict[str, Callable[[Any], str]] = {
    "denoise": lambda value: f"denoising {value:g}" if value else "no denoising",
    "epochs": lambda value: f"{value:g} epochs",
    "freeze": lambda value: f"{' + '.join(value) or 'nothing'} frozen",
    "global": lambda value: f"batches of {value}",
    "injection": lambda value: INJECTIONS.get(value, f"z in {value}"),
    "latent_dim": lambda value: f"{value} units",
    "max_tokens": lambda value: f"at most {value} tokens",
    "optimizer.lr": lambda value: f"learning rate {value:g}",
    "optimizer.new_weights_lr_factor": lambda value: f"{value:g} times the learning rate for the new weights",
    "phases": lambda value: f"phases {' + '.join(value)}" if len(value) > 1 else f"one phase ({value[0]})",
    "pool_layers": lambda value: f"{value} layer{'s' if value == 'all' else ''}",
    "pooling": lambda value: f"{value} pooling",
    "reset_decoder": lambda value: "decoder reset" if value else "decoder not reset",
    "sample_posterior": lambda value: "z sampled" if value else "z = posterior mean",
    "steps": lambda value: f"{value:,} steps",
}
