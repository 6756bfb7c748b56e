"""Small models, a batch of texts for them, and the stock T5 for comparison."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration

from support import tiny
from vae_ds.config import ModelConfig
from vae_ds.data import collate, from_texts
from vae_ds.model import T5VAE, load_tokenizer

UNITS = 5
TEXTS = tiny.ENGLISH[:4]


def build(kind: str = "t5", seed: int = 0, **settings) -> T5VAE:
    overrides = settings.pop("overrides", {})
    config = ModelConfig(base=tiny.base(kind, **overrides), **{"latent_dim": UNITS, "dropout": 0.0} | settings)
    return T5VAE.from_base(config, seed)


def gathered_in_forward_only(model: T5VAE, run: Callable[[], tuple[Tensor, ...]]) -> bool:
    """Whether `run` gives the same if each weight is not a number outside of its owner's forward.

    ZeRO stage 3 gathers a weight only while the forward of its owner runs.
    """
    with torch.no_grad():
        expected = run()
        weights = {id(parameter): parameter.clone() for parameter in model.parameters()}

        def gather(module: nn.Module, _: object) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.copy_(weights[id(parameter)])

        def release(module: nn.Module, *_: object) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.fill_(math.nan)

        for module in model.modules():
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
            release(module)
        return all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def taught(units: int = UNITS) -> T5VAE:
    """Briefly trained to reconstruct twelve texts of ENGLISH, so that its texts differ from code to code."""
    base = tiny.base()
    model, count = T5VAE.from_base(ModelConfig(base=base, latent_dim=units)), 12
    tokens = from_texts(tiny.ENGLISH[:count], load_tokenizer(base), 40)
    rows = collate(tokens, range(count), pad_id=0, latent_dim=units, seed=0, keys=(), sample=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(50):
        optimizer.zero_grad()
        model(**rows.arguments()).rec_B.mean().backward()
        optimizer.step()
    return model.eval()


def batch(kind: str = "t5", extra: int = 0) -> dict[str, Tensor]:
    """Ids, mask and labels of TEXTS, with `extra` additional padding positions, and a fixed eps."""
    tokens = load_tokenizer(tiny.base(kind))(list(TEXTS), padding=True, return_tensors="pt")
    ids_BT = nn.functional.pad(tokens["input_ids"], (0, extra))
    mask_BT = nn.functional.pad(tokens["attention_mask"], (0, extra))
    return {
        "input_ids_BT": ids_BT,
        "attention_mask_BT": mask_BT,
        "labels_BT": ids_BT.masked_fill(mask_BT.eq(0), -100),
        "eps_BL": torch.randn(len(TEXTS), UNITS, generator=torch.Generator().manual_seed(9)),
    }


def latents(rows: int = len(TEXTS)) -> Tensor:
    return torch.randn(rows, UNITS, generator=torch.Generator().manual_seed(8))


def groups_by_module(model: T5VAE) -> dict[str, str]:
    """The freezing group of each parameter by the module that owns it, whatever its name."""
    ids = {
        "embeddings": {id(model.t5.shared.weight)},
        "memory": {
            id(p)
            for name, m in model.named_modules()
            if name.split(".")[-1] in ("memory", "memory_mlp")
            for p in m.parameters()
        },
        "bottleneck": {id(p) for p in model.bottleneck.parameters()} if model.bottleneck is not None else set(),
        "encoder": {id(p) for p in model.t5.encoder.parameters()},
        "decoder": {id(p) for stack in (model.t5.decoder, model.t5.lm_head) for p in stack.parameters()},
    }
    if model.prior is not None:
        ids["prior"] = {id(p) for p in model.prior.parameters()}
    # The stacks share the embeddings, and the memory is inside the decoder: the first group that has one owns it.
    return {
        name: next(group for group, members in ids.items() if id(parameter) in members)
        for name, parameter in model.named_parameters()
    }


def stock(kind: str) -> T5ForConditionalGeneration:
    return AutoModelForSeq2SeqLM.from_pretrained(tiny.base(kind), dtype=torch.float32).eval()
