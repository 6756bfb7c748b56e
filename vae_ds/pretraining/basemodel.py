"""A new T5: built from the architecture of a recipe, trained as text to text, exported in the format of transformers.

Shapes: B texts, T tokens, V vocabulary entries.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vae_ds.config import ArchitectureConfig
from vae_ds.model import guard_half
from vae_ds.pretraining.span_corruption import IGNORED
from vae_ds.pretraining.vocabulary import save_tokenizer, sentinel_ids

EMBEDDING_SCALE = 8.0

# Round the vocabulary size up to a multiple of this, for efficient matrix kernels and even shards.
ROUND_VOCABULARY = 64


class TextToText(nn.Module):
    """A T5 that maps a batch to the nats of each text, with weights scaled for Adam.

    Adam changes a weight by about the learning rate, for any size of the weight. The initial sizes of T5, from 1
    (embeddings) to 1/sqrt(d_model d_kv) (queries), were chosen for Adafactor, whose steps are relative to the weights
    (Shazeer & Stern 2018, section 8). So this module stores embeddings divided by EMBEDDING_SCALE and queries
    multiplied by sqrt(d_kv), and undoes both scalings where the weights are used: the function is that of the T5.
    `plain` returns the weights of the stock T5.
    """

    def __init__(self, t5: nn.Module) -> None:
        """Changes the weights of `t5` in place."""
        super().__init__()
        guard_half(t5)
        self.t5 = t5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.div_(self._factor(name))
        for name, module in t5.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf == "q":
                module.register_forward_hook(_Times(self._factor("t5.x.q.weight")))
            elif leaf in ("shared", "embed_tokens"):
                module.register_forward_hook(_Times(EMBEDDING_SCALE))
            elif leaf == "lm_head":
                # Scaling the input is equivalent to scaling the logits, and cheaper by the size of the vocabulary.
                module.register_forward_pre_hook(_TimesFirst(EMBEDDING_SCALE))

    def plain(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert the weights of this module, by its names, to those of the stock T5, by the names of the T5."""
        return {name.removeprefix("t5."): weight * self._factor(name) for name, weight in weights.items()}

    def _factor(self, name: str) -> float:
        if name == "t5.shared.weight":
            return EMBEDDING_SCALE
        config: Any = self.t5.config
        return float(config.d_kv**-0.5) if name.endswith(".q.weight") else 1.0

    def forward(
        self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor, labels_BT: torch.Tensor
    ) -> torch.Tensor:
        """Negative log-likelihood of each target, summed over its tokens: float32 nats, (B,)."""
        t5: Any = self.t5
        logits_BTV = t5(
            input_ids=input_ids_BT,
            attention_mask=attention_mask_BT,
            decoder_input_ids=t5.prepare_decoder_input_ids_from_labels(labels_BT),
            use_cache=False,
        ).logits
        nats = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return nats.view_as(labels_BT).sum(1)


class _Times:
    """A forward hook that scales the output."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.factor


class _TimesFirst(_Times):
    """A forward pre-hook that scales the input."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any = None) -> torch.Tensor:
        scaled: torch.Tensor = inputs[0] * self.factor
        return scaled


def build_t5(architecture: ArchitectureConfig, tokenizer: Any, seed: int) -> Any:
    """A new T5ForConditionalGeneration in float32 on the CPU. Its weights are a function of architecture and seed.

    The input embeddings and the output layer are tied, as in T5 v1.0.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    settings: dict[str, Any] = {
        **architecture.model_dump(exclude={"vocab_size"}),
        "vocab_size": -(-len(tokenizer) // ROUND_VOCABULARY) * ROUND_VOCABULARY,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    config = T5Config(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(config)


def continue_text(model: Any, tokenizer: Any, prefix: str, max_new_tokens: int = 48, **generate_kwargs: Any) -> str:
    """The prefix with its continuation by the model, greedy by default. An empty prefix gives a whole text."""
    before = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    # As in training, a sentinel represents the continuation, unless the continuation is the whole text.
    ids = [*before, *sentinel_ids(tokenizer)[: min(len(before), 1)], tokenizer.eos_token_id]
    with torch.no_grad():
        source = torch.tensor([ids], device=model.device)
        made = model.generate(input_ids=source, max_new_tokens=max_new_tokens, **generate_kwargs)
    # Decode both parts together, because the cut may be within a word.
    return str(tokenizer.decode([*before, *made[0].tolist()], skip_special_tokens=True))


def export_t5(model: Any, tokenizer: Any, pieces: bytes, card: str, target: Path) -> None:
    """Write config.json, model.safetensors in bfloat16, the tokenizer and README.md. Replaces an existing directory."""
    part = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(part)
    # safetensors creates private files; make the model readable for other users.
    (part / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, pieces, part)
    (part / "README.md").write_text(card, encoding="utf-8")
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)
