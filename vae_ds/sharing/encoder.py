"""The encoder of an export alone, from token ids to mu, in the formats of other programs.

`sentence_transformers` writes a directory that `SentenceTransformer(DIR)` loads: the stock modules Transformer, Pooling
and Dense, without code of this package. `program` writes a file of `torch.export`, `onnx` one of ONNX.

Shapes: B sentences, T tokens, H = d_model, L latent units.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vae_ds.errors import CheckpointError, ConfigError
from vae_ds.model import MAX_TOKENS, T5VAE, UNKNOWN_MAX_TOKENS, exported_weights, load_tokenizer, read_export

INPUTS, OUTPUTS = ("input_ids", "attention_mask"), ("mu", "logvar")
TOLERANCE = 1e-5  # the largest difference from PyTorch that a written program may have
ONNX_BYTES = 2 * 10**9  # a little less than the limit of its format, 2 GiB
OF_ENCODER = ("t5.encoder.", "t5.shared.", "bottleneck.")  # the names of its weights
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel"}


class Encoder(nn.Module):
    """(input_ids (B, T), attention_mask (B, T)) to (mu (B, L), logvar (B, L)), float32."""

    def __init__(self, model: T5VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of each sentence."""
        return self.model.encode(input_ids, attention_mask)


def sentence_transformers(export: Path, to: Path) -> None:
    """Write the encoder of an export as a sentence-transformers model: its embedding is mu.

    It costs the memory of the encoder in float32. Raises ConfigError if `to` is not empty, or for a model that the
    stock modules cannot express: without an encoder, or with `pool_layers: all`.
    """
    described = read_export(export)
    settings = described["model"]
    _need_encoder(described)
    if settings["pool_layers"] != "last":
        raise ConfigError("a sentence-transformers model pools the last layer only; this one has pool_layers: all")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} is not empty; name a new directory")
    weights = exported_weights(export)
    encoder = {
        name.removeprefix("t5."): tensor.float() for name, tensor in weights.items() if name.startswith(OF_ENCODER[:2])
    }
    mu_LH = weights["bottleneck.mu.weight"].float().contiguous()
    units, width = mu_LH.shape
    t5 = described["t5"] | {"architectures": [ENCODERS[described["t5"]["model_type"]]], "dtype": "float32"}
    limit = {"max_seq_length": described.get(MAX_TOKENS, UNKNOWN_MAX_TOKENS), "do_lower_case": False}
    kinds = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling: dict[str, Any] = {"word_embedding_dimension": width}
    pooling |= {f"pooling_mode_{kind}": kind == f"{settings['pooling']}_tokens" for kind in kinds}
    dense: dict[str, Any] = {"in_features": width, "out_features": units, "bias": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    places = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(places.items())
    ]
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as folder:
        fresh = Path(folder) / "fresh"
        for path in ("", "1_Pooling", "2_Dense"):
            (fresh / path).mkdir(parents=True)
        for name, content in {
            "modules.json": modules,
            "sentence_bert_config.json": limit,
            "config.json": t5,
            "1_Pooling/config.json": pooling,
            "2_Dense/config.json": dense,
        }.items():
            (fresh / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(encoder, fresh / "model.safetensors", metadata={"format": "pt"})
        save_file({"linear.weight": mu_LH}, fresh / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
        for file in export.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "added_tokens", "spiece")):
                shutil.copyfile(file, fresh / file.name)
        fresh.rename(to)


def program(export: Path, to: Path) -> None:
    """Write the encoder as a file of `torch.export`, for any number of sentences and tokens.

    `torch.export.load(to).module()` is a function of (input_ids, attention_mask) that returns (mu, logvar). It was
    compared with PyTorch. Raises ConfigError without an encoder, CheckpointError if it differs by more than 1e-5.
    """
    check_file(to)
    encoder, given = _encoder(export)
    dynamic = {name: {0: torch.export.Dim("sentences"), 1: torch.export.Dim("tokens")} for name in INPUTS}

    def write(file: Path) -> Callable[..., Any]:
        torch.export.save(torch.export.export(encoder, given[0], dynamic_shapes=dynamic), file)
        return torch.export.load(file).module()

    _write(to, write, encoder, given)


def onnx(export: Path, to: Path) -> None:
    """Write the encoder as an ONNX file with the inputs `input_ids` and `attention_mask`, for any number of both.

    The outputs are `mu` and `logvar`. They were compared with PyTorch by the reference evaluator of ONNX. Raises
    ConfigError without an encoder or without the package `onnx`, CheckpointError if they differ by more than 1e-5.
    """
    try:
        from onnx.reference import ReferenceEvaluator
    except ImportError:
        raise ConfigError(
            "the format onnx needs the packages onnx and onnxscript: pip install vae_ds[formats]"
        ) from None
    check_file(to)
    weights = exported_weights(export)
    size = sum(4 * tensor.numel() for name, tensor in weights.items() if name.startswith(OF_ENCODER))
    if size > ONNX_BYTES:
        raise ConfigError(
            f"the encoder has {size / 1e9:.1f} GB in float32, and an ONNX file holds 2 GB; use --format torch"
        )
    encoder, given = _encoder(export)
    dynamic = {name: {0: torch.export.Dim("sentences"), 1: torch.export.Dim("tokens")} for name in INPUTS}

    def write(file: Path) -> Callable[..., Any]:
        torch.onnx.export(
            encoder,
            given[0],
            str(file),
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_shapes=dynamic,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        evaluator = ReferenceEvaluator(str(file))

        def run(*values: Tensor) -> list[Tensor]:
            feed = {name: value.numpy() for name, value in zip(INPUTS, values, strict=True)}
            return [torch.from_numpy(found) for found in evaluator.run(None, feed)]

        return run

    _write(to, write, encoder, given)


def _need_encoder(described: dict[str, Any]) -> None:
    if described["model"]["injection"] == "none":
        raise ConfigError("this model has injection `none`, so no encoder; export the model of a VAE")


def check_file(to: Path) -> None:
    """Raise ConfigError if `to` exists."""
    if to.exists():
        raise ConfigError(f"{to} exists; name a new file")


def _encoder(export: Path) -> tuple[Encoder, list[tuple[Tensor, Tensor]]]:
    """The encoder, and inputs of two sizes: the first one is traced, both are compared."""
    _need_encoder(read_export(export))
    model = T5VAE.from_pretrained(export)
    del model.t5.decoder, model.t5.lm_head  # else the file would hold them
    encoder = Encoder(model).eval()
    tokenizer = load_tokenizer(export)
    texts = (
        ["Two sentences of text.", "The second is longer than the first."],
        ["A text.", "Another one.", "a b c d e f g"],
    )
    rows = [tokenizer(list(some), padding=True, return_tensors="pt") for some in texts]
    return encoder, [(row["input_ids"], row["attention_mask"]) for row in rows]


def _write(
    to: Path, write: Callable[[Path], Callable[..., Any]], encoder: Encoder, given: list[tuple[Tensor, Tensor]]
) -> None:
    """Write a file, compare what it computes, and give it its name."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as folder, torch.no_grad():
        fresh = Path(folder) / to.name
        run = write(fresh)
        for inputs in given:
            for name, found_BL, expected_BL in zip(OUTPUTS, run(*inputs), encoder(*inputs), strict=True):
                apart = (found_BL - expected_BL).abs().max().item()
                if not apart <= TOLERANCE:
                    raise CheckpointError(
                        f"{to}: {name} differs from that of PyTorch by {apart:.1e}; nothing was written"
                    )
        fresh.replace(to)
