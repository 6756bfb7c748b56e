"""The README.md of a pretrained model, generated from its run."""

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
# {name}: a T5 with {millions:.2f} million parameters, pretrained from scratch

Made by `vae-ds pretrain`, for text VAEs that train in minutes on two CPU cores. It writes {corpus_words}; its knowledge
is limited to this text. Encoder and decoder have {layers} blocks, with d_model {d_model}. The vocabulary has {vocab}
SentencePiece pieces and the 100 sentinels of T5. Embeddings and output layer are tied. Weights are stored in bfloat16.

```python
from transformers import AutoTokenizer, T5ForConditionalGeneration

tokenizer = AutoTokenizer.from_pretrained(path)
model = T5ForConditionalGeneration.from_pretrained(path)
```

## Training

- Span corruption: {spans:.0%} of the examples.
- Denoising: {denoising:.0%} of the examples. The encoder reads a text without {deletion:.0%} of its tokens; the decoder
  writes the whole text.
- Prefix language modelling: all other examples. The encoder reads the beginning of a text and `<extra_id_0>`; the
  decoder writes that sentinel and the rest. In {empty:.0%} of them, the encoder reads nothing and the decoder writes
  the whole text.

| | |
|---|---|
| corpus | `{corpus}`, fingerprint `{fingerprint}` |
| training text | {sentences:,} sentences and {paragraphs:,} paragraphs: {texts:,} texts, {tokens:,} tokens |
| held out | no training text contains sentences of the splits `valid` and `test` |
| steps | {step:,} of {steps:,}, {global_batch} texts each |
| target tokens seen | {seen:,} |
| time | {minutes:.0f} minutes on {world} process{plural}, {devices} |
| precision | {precision} compute, float32 master weights |
| versions | {versions} |

{state}

## Held-out loss

On {held_sentences:,} sentences of the split `valid` ({held_tokens:,} tokens with the ends of sentences), in nats:

| task | per token | per sentence |
|---|---|---|
| whole sentence (language model) | {lm_per_token:.3f} | {lm_per_sentence:.2f} |
| second half, given the first half | {prefix_per_token:.3f} | |
| corrupted spans | {spans_per_token:.3f} | |
| whole sentence, given the sentence without {deletion:.0%} of its tokens | {denoising_per_token:.3f} | |

## Continuations

Greedy decoding. The text before the bar is the input.

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
    """The text of the model card, from the corpus (`sources`), the progress (`state`) and outputs (`examples`)."""
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
        state="Training is finished." if finished else "An intermediate export: training was not finished.",
        held_sentences=held["sentences"],
        held_tokens=held["tokens"],
        **{key: value for key, value in held.items() if key.startswith("lm_") or key.endswith("_per_token")},
        examples="\n".join(shown),
        recipe=configuration.dump(config),
    )
