"""The model card of an export: README.md, with the metadata that the Hugging Face hub reads.

It is made from `config.json`, the recipe and a stored evaluation. Only the header of the weights is read. The card
names no directory of the machine that trained, and no sentence of the corpus.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open

from vae_ds.config import RunConfig, portable
from vae_ds.model import MAX_TOKENS, UNKNOWN_MAX_TOKENS, prior_in_use, read_export
from vae_ds.runtime import evaluations, records

CARD = "README.md"
RECIPE = "recipe"  # the key of `config.json` with the recipe
TAGS = ["text-vae", "variational-autoencoder", "t5", "vae_ds"]
METRICS = {
    "nelbo": "nats per sentence, rec + kl: a bound on the negative log-likelihood",
    "rec": "nats per sentence, of the sentence given its code",
    "kl": "nats per sentence, what the code costs",
    "iw_nll": "nats per sentence, a tighter bound by importance sampling",
    "above_yardstick": "nats per sentence, iw_nll minus the loss of the language model",
    "ppl": "per word, from nelbo",
    "iw_ppl": "per word, from iw_nll",
    "mi_train": "nats, a lower bound on the information of the code about the sentence",
    "au": "latent units that vary from sentence to sentence",
    "z_gain": "nats per sentence, what the code of the right sentence saves against another's",
    "lm_gain": "nats per sentence, what the code saves against the language model",
    "bleu": "of reconstructions",
}
# What the hub shows as results.
SHOWN = ("nelbo", "iw_nll", "ppl", "iw_ppl", "mi_train", "z_gain", "bleu")


@dataclass(frozen=True)
class Examples:
    """Texts of the model: samples of the prior, and of the first one with other values of one latent unit."""

    samples: Sequence[str] = ()
    unit: int = 0
    traversal: Sequence[tuple[float, str]] = field(default_factory=tuple)


def write_card(folder: Path, name: str = "", **known: Any) -> None:
    """Write the card of an export, atomically. The arguments and errors are those of `card_text`."""
    records.replace_file(folder / CARD, card_text(folder, name, **known).encode())


def card_text(
    folder: Path,
    name: str = "",
    *,
    recipe: RunConfig | None = None,
    evaluation: Mapping[str, Any] | None = None,
    language_model: Mapping[str, Any] | None = None,
    examples: Examples | None = None,
    sections: Sequence[str] = (),
) -> str:
    """The card of an export.

    name: of the model, otherwise that of the recipe.
    recipe: if config.json has none.
    evaluation: of the model on a split, and `language_model`, that of its yardstick on the same sentences.
    sections: further ones, in Markdown, after the facts.
    Raises CheckpointError if `folder` is no export.
    """
    described = read_export(folder)
    known = described.get(RECIPE) or (None if recipe is None else portable(recipe))
    title = name or (known or {}).get("name") or "text VAE"
    parts = [
        _metadata(title, described, known, evaluation),
        _intro(title, described),
        _facts(folder, described, known),
        *sections,
        _table(evaluation, language_model),
        _texts(examples, described),
        _limits(described, known, evaluation),
        ""
        if known is None
        else f"## Recipe\n\n```yaml\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}```\n",
    ]
    return "\n".join(part for part in parts if part)


def _metadata(
    name: str, described: Mapping[str, Any], recipe: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None
) -> str:
    base, corpus = described["model"]["base"], (recipe or {}).get("data", {}).get("corpus")
    of_hub = (recipe or {}).get("data", {}).get("path") if corpus == "dataset" else None
    results = []
    for metric in SHOWN if evaluation is not None and corpus is not None else ():
        value = (evaluation or {}).get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            results.append(
                EvalResult(
                    task_type="feature-extraction",
                    dataset_type=_hub_name(of_hub) or str(corpus),
                    dataset_name=str(corpus),
                    dataset_split=str((evaluation or {}).get("split")),
                    metric_type=metric,
                    metric_name=f"{metric} ({METRICS[metric]})",
                    metric_value=round(value, 4),
                )
            )
    data = ModelCardData(
        language="en" if corpus in ("docstrings", "wordnet", "grammar", "ptb", "snli", "yahoo", "yelp") else None,
        library_name="vae_ds",
        pipeline_tag="feature-extraction",
        tags=TAGS,
        base_model=_hub_name(base),
        datasets=_hub_name(of_hub),
        model_name=name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _hub_name(name: str | None) -> str | None:
    """`name` if it can be OWNER/NAME on the hub, otherwise None."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _intro(name: str, described: Mapping[str, Any]) -> str:
    units = described["model"]["latent_dim"]
    if described["model"]["injection"] == "none":
        return f"""# {name}: a plain language model

A T5 decoder without encoder and latent code, trained with vae_ds as the yardstick of text VAEs.

## Load

```python
import vae_ds

model = vae_ds.TextVAE.from_pretrained("OWNER/NAME")  # or a directory
print(model.sample(3, temperature=1.0))
```
"""
    return f"""# {name}: a text VAE

A variational autoencoder for text. It encodes a sentence as a vector of {units} numbers, and decodes a vector into a
sentence. It is a T5 that was finetuned with vae_ds.

## Load

```python
import vae_ds

vae = vae_ds.TextVAE.from_pretrained("OWNER/NAME")  # or a directory
z = vae.encode(["A sentence to encode."])  # posterior means, (1, {units})
print(vae.decode(z), vae.sample(3))
```

Without vae_ds, with transformers 5:

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("OWNER/NAME", trust_remote_code=True)
model = AutoModel.from_pretrained("OWNER/NAME", trust_remote_code=True).eval()
tokens = tokenizer(["A sentence to encode."], return_tensors="pt")
mu, logvar = model.encode(tokens["input_ids"], tokens["attention_mask"])
ids = model.generate(mu, max_new_tokens={described.get(MAX_TOKENS, UNKNOWN_MAX_TOKENS)})
print(tokenizer.batch_decode(ids, skip_special_tokens=True))
codes = model.sample_codes(5)  # drawn from the prior; `generate` makes new sentences of them
```
"""


def _facts(folder: Path, described: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> str:
    settings = described["model"]
    rows = {"base": f"`{_last(settings['base'])}`", "parameters": f"{_parameters(folder) / 1e6:,.2f} million"}
    if settings["injection"] != "none":
        pooled = "the mean of all layers" if settings["pool_layers"] == "all" else "the last layer"
        rows |= {
            "latent units": str(settings["latent_dim"]),
            "pooling of the encoder": f"{settings['pooling']} over the tokens, of {pooled}",
            "the decoder reads z by": f"`{settings['injection']}`",
        }
    if MAX_TOKENS in described:
        rows["maximum length"] = f"{described[MAX_TOKENS]} tokens"
    rows["weights"] = str(described.get("dtype", "float32"))
    if recipe is not None:
        data, phases = recipe["data"], recipe["phases"]
        source = data.get("path") or data.get("train")
        length = [f"{one['steps']:,} steps" if one["steps"] else f"{one['epochs']:g} epochs" for one in phases]
        rows |= {
            "corpus": f"`{data['corpus']}`" + (f", `{source}`" if source else ""),
            "training": f"{', '.join(length)} of {recipe['batch']['global']} sentences, seed {recipe['seed']}",
        }
    if isinstance(described.get("origin"), dict):
        rows["exported"] = str(described["origin"].get("reason"))
    return "## Model\n\n| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _table(evaluation: Mapping[str, Any] | None, language_model: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "## Evaluation\n\nNot evaluated yet; `vae-ds evaluate` does it and renews this card.\n"
    columns = [evaluation, *([language_model] if language_model else [])]
    rows = []
    for metric, meaning in METRICS.items():
        if evaluation.get(metric) is None:
            continue
        cells = ["" if one.get(metric) is None else _cell(metric, one) for one in columns]
        rows.append(f"| `{metric}` | {' | '.join(cells)} | {meaning} |\n")
    heads = ["metric", "value", *(["language model"] if language_model else []), "unit and meaning"]
    lines = [f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n", *rows]
    sizes = f"{evaluation['sentences']:,} sentences of the split `{evaluation['split']}`"
    if evaluation.get("iw_sentences") and evaluation.get("iw_samples"):
        sizes += (
            f"; `iw_nll` and `iw_ppl`: {evaluation['iw_sentences']:,} with {evaluation['iw_samples']:,} samples each"
        )
    words = [f"{sizes}. ± is the standard error over the sentences."]
    if language_model:
        words.append("The language model was trained without a latent code and evaluated on the same sentences.")
    if evaluation.get("verdict_reason"):
        words.append(f"Verdict: {evaluation['verdict_reason']}.")
    if evaluation.get("cost") and evaluation.get("above_yardstick") is not None:
        words.append(f"Cost: {evaluation['cost']}.")
    return "## Evaluation\n\n" + "".join(lines) + "\n" + "\n".join(words) + "\n"


def _cell(metric: str, found: Mapping[str, Any]) -> str:
    value = found[metric]
    if metric == "au":
        return f"{value} of {len(found.get('kl_per_dim') or ())}"
    if metric in ("ppl", "iw_ppl") and found.get(f"{metric}_se") is None:
        return f"{value:.1f}"
    return evaluations.with_error(value, found.get(f"{metric}_se"))


def _texts(examples: Examples | None, described: Mapping[str, Any]) -> str:
    if examples is None or not examples.samples:
        return ""
    prior = prior_in_use(described)
    drawn = "N(0, I)" if prior == "normal" else f"the learned prior (`{prior}`)"
    told = f"## Samples\n\nGreedy decoding of z drawn from {drawn}.\n\n" + _block(examples.samples)
    if examples.traversal:
        told += f"\n## A traversal\n\nThe first sample with other values of latent unit {examples.unit}.\n\n"
        told += _block([f"{value:6.2f}  {text}" for value, text in examples.traversal])
    return told


def _block(lines: Sequence[str]) -> str:
    # A text of the model must not end the block.
    return "```text\n" + "".join(" ".join(line.replace("```", "'''").split("\n")) + "\n" for line in lines) + "```\n"


def _limits(
    described: Mapping[str, Any], recipe: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None
) -> str:
    told = [
        "- The model writes text like that of its training. What it writes can be wrong, and it can repeat sentences of"
        " its training text.",
    ]
    if recipe is not None:
        told.append(f"- It was trained on the corpus `{recipe['data']['corpus']}` alone. Other text was not measured.")
    if MAX_TOKENS in described:
        told.append(f"- Longer texts than {described[MAX_TOKENS]} tokens are cut.")
    if described["model"]["injection"] != "none":
        told.append("- A code keeps a part of a sentence: reconstructions are similar sentences, rarely equal ones.")
        if evaluation is not None and evaluation.get("verdict") not in (None, "uses z"):
            told.append(f"- By the evaluation, the code is not used as it should be: {evaluation['verdict']}.")
        prior = prior_in_use(described)
        if evaluation is not None and (evaluated := evaluations.prior_of(evaluation)) != prior:
            told.append(f"- The evaluation is under the prior `{evaluated}`; the model now has the prior `{prior}`.")
    return "## Limits\n\n" + "\n".join(told) + "\n"


def _parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        names = list(stored.keys())
        return sum(math.prod(stored.get_slice(name).get_shape()) for name in names)


def _last(place: str) -> str:
    """A hub name or a shipped name as it is, and the last part of a path."""
    return place if _hub_name(place) else Path(place).name
