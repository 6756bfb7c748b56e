"""The README.md of a pretrained model, generated from the run that made it."""

from collections.abc import Mapping
from typing import Any

from vae_ds import config as configuration
from vae_ds.config import PretrainConfig
from vae_ds.distributed import Ranks
from vae_ds.runtime import records

_CARD = """\
---
language: en
library_name: transformers
pipeline_tag: text2text-generation
---
# {name}: a T5 of {millions:.2f} million parameters, pretrained from nothing

Made by `vae-ds pretrain`, for text VAEs that have to train in minutes on two CPU cores. It writes {corpus_words}; it
knows little of the world. An encoder and a decoder of {layers} blocks, d_model {d_model}, {vocab} SentencePiece pieces
and T5's 100 sentinels; embeddings and output layer are one tensor. Weights are stored in bfloat16.

```python
from transformers import AutoTokenizer, T5ForConditionalGeneration

tokenizer = AutoTokenizer.from_pretrained(path)
model = T5ForConditionalGeneration.from_pretrained(path)
```

## Training

Span corruption on {spans:.0%} of the examples; denoising on {denoising:.0%}: the encoder reads a text without
{deletion:.0%} of its tokens, the decoder writes the whole text; else prefix language modelling: the encoder reads the
beginning of a text and `<extra_id_0>`, the decoder writes that sentinel and the rest; for {empty:.0%} of those the
encoder reads nothing and the decoder writes the whole text.

| | |
|---|---|
| corpus | `{corpus}`, fingerprint `{fingerprint}` |
| training text | {sentences:,} sentences and {paragraphs:,} paragraphs: {texts:,} texts, {tokens:,} tokens |
| held out | sentences of the splits `valid` and `test` are in no training text |
| steps | {step:,} of {steps:,}, {global_batch} texts each |
| target tokens seen | {seen:,} |
| time | {minutes:.0f} minutes on {world} process{plural}, {devices} |
| precision | {precision} compute, float32 master weights |
| versions | {versions} |

{state}

## Held-out loss

On {held_sentences:,} sentences of the split `valid` ({held_tokens:,} tokens, end of sentence counted), in nats:

| task | a token | a sentence |
|---|---|---|
| whole sentence (language model) | {lm_per_token:.3f} | {lm_per_sentence:.2f} |
| second half, given the first | {prefix_per_token:.3f} | |
| corrupted spans | {spans_per_token:.3f} | |
| whole sentence, given it without {deletion:.0%} of its tokens | {denoising_per_token:.3f} | |

## Continuations

Greedy; the model was given what stands before the bar.

{examples}

## Recipe

```yaml
{recipe}```
"""


def base_card(
    config: PretrainConfig,
    sources: Mapping[str, Any],
    state: Mapping[str, Any],
    ranks: Ranks,
    precision: str,
    parameters: int,
    examples: Mapping[str, str],
) -> str:
    """The model card's text: what went in (`sources`), how far training is (`state`), what comes out (`examples`)."""
    place = records.environment(ranks.world, ranks.device.type)
    versions = ", ".join(f"{name} {number}" for name, number in place["packages"].items() if number)
    held = state["held_out"]
    by_time = config.minutes is not None and state["duration_s"] >= 60 * config.minutes
    finished = by_time or state["step"] >= config.steps
    shown = [f"- {prefix} **|** {text.removeprefix(prefix).strip()}" for prefix, text in examples.items()]
    return _CARD.format(
        name=config.name,
        millions=parameters / 1e6,
        corpus_words="English sentences of software documentation" if sources["corpus"] == "docstrings" else "text",
        layers=f"{config.architecture.num_layers} and {config.architecture.num_decoder_layers}",
        d_model=config.architecture.d_model,
        vocab=config.architecture.vocab_size,
        spans=config.span_corruption,
        denoising=config.denoising,
        deletion=config.deletion,
        empty=config.empty_prefix,
        **{key: sources[key] for key in ("corpus", "fingerprint", "sentences", "paragraphs", "texts", "tokens")},
        step=state["step"],
        steps=config.steps,
        global_batch=config.batch.global_size,
        seen=state["tokens"],
        minutes=state["duration_s"] / 60,
        world=ranks.world,
        plural="" if ranks.world == 1 else "es",
        devices="; ".join(place["devices"]),
        precision=precision,
        versions=f"Python {place['python']}, {versions}",
        state="Training is finished." if finished else "An intermediate export: training was still going on.",
        held_sentences=held["sentences"],
        held_tokens=held["tokens"],
        **{key: value for key, value in held.items() if key.startswith("lm_") or key.endswith("_per_token")},
        examples="\n".join(shown),
        recipe=configuration.dump(config),
    )
