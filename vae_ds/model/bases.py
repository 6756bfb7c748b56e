"""Find, check and load a pretrained T5 (the base) and its tokenizer. Recognise and describe exports.

A base is `tiny` (shipped with the package), a directory in the hub's layout, or a hub name.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils import logging as transformers_logging

from vae_ds.config import ModelConfig, hub
from vae_ds.errors import CheckpointError, ConfigError
from vae_ds.runtime import run_dirs

EXPORT_FORMAT = "vae_ds"
EXPORT_VERSION = 1
# The key of config.json with the maximum length of a text in the training, in tokens. Older exports have none.
MAX_TOKENS = "max_tokens"
UNKNOWN_MAX_TOKENS = 64  # of an export that does not say it: the default of the recipes
# Classes of the configuration and of the model by model_type. byT5, v1.1 and Flan-T5 have the type `t5`.
FAMILIES: dict[str, tuple[Any, Any]] = {
    "t5": (T5Config, T5ForConditionalGeneration),
    "mt5": (MT5Config, MT5ForConditionalGeneration),
}
SPIECE = "spiece.model"


def check_base(base: str) -> PreTrainedConfig:
    """Check a base and return its configuration, without loading weights.

    Raises ConfigError if the base does not exist, cannot be reached, does not have the architecture of T5 (T5, v1.1,
    Flan-T5, mT5, byT5), or is an export of vae_ds.
    """
    return base_config(base)[0]


def load_t5(settings: ModelConfig, as_stored: bool = False) -> Any:
    """Load the stock model in float32, with the dropout of the recipe. Raises ConfigError if weights are missing.

    `as_stored`: in the dtype of the files. Then, transformers converts nothing, and all weights are memory-mapped.
    """
    config, raw, location = base_config(settings.base)
    if settings.dropout is not None:
        config.dropout_rate = settings.dropout
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    try:
        with _quiet(location):
            t5, report = FAMILIES[config.model_type][1].from_pretrained(
                # Without ignore_mismatched_sizes, the error points to a report that is not printed.
                location,
                config=config,
                dtype=_stored_dtype(location) if as_stored else torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model.base {settings.base}: its weights cannot be loaded: {_line(error)}") from None
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise ConfigError(
            f"model.base {settings.base}: {name} is {list(found)} in the weights, but {list(wanted)} by config.json; "
            "the two are of different models"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(f"model.base {settings.base}: its weights lack {', '.join(missing[:3])}")
    # transformers 5 ties the output head if its stored values equal the embeddings, even against the configuration.
    tie(t5, head=t5.lm_head.weight is t5.shared.weight and raw.get("tie_word_embeddings") is not False)
    return t5


def _stored_dtype(location: str) -> torch.dtype:
    """The dtype of a base's weights, if its files have only one, else float32, which represents any other exactly.

    Files that cannot be read have float32, too: transformers describes the fault when it loads them.
    """
    found: set[torch.dtype] = set()
    with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError, SafetensorError):
        for file in _weight_files(location):
            found |= {tensor.dtype for tensor in load_state_dict(file, map_location="meta").values()}
    return found.pop() if len(found) == 1 else torch.float32


def _weight_files(location: str) -> list[str]:
    """The files that transformers loads, in its order of preference."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        file = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
        if file is not None and not name.endswith(".json"):
            return [file]
        if file is not None:
            parts = set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"].values())
            return [part for one in sorted(parts) if (part := cached_file(location, one)) is not None]
    return []


def tie(t5: Any, head: bool) -> None:
    """Tie the embeddings of the stacks to `shared`. Tie the output head too if `head`, otherwise untie it."""
    for stack in (getattr(t5, "encoder", None), t5.decoder):
        if stack is not None:  # injection `none` has no encoder
            stack.embed_tokens.weight = t5.shared.weight
    if head:
        t5.lm_head.weight = t5.shared.weight
    elif t5.lm_head.weight is t5.shared.weight:
        t5.lm_head.weight = nn.Parameter(t5.shared.weight.detach().clone())


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `tiny`, a directory, a hub name or an export. An export without one uses that of its base.

    Raises ConfigError if there is no tokenizer, or if it has no end-of-sentence or padding token.
    """
    location = _locate(str(base))
    if is_export(Path(location)) and not (Path(location) / "tokenizer_config.json").is_file():
        return load_tokenizer(read_export(Path(location))["model"]["base"])
    try:
        with _quiet(location):
            tokenizer = AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ConfigError(f"model.base {base}: its tokenizer cannot be loaded: {_line(error)}") from None
    # Without tokenizer files, transformers silently makes a T5 tokenizer of four pieces.
    if len(tokenizer) - len(tokenizer.all_special_tokens) < 2:
        raise ConfigError(f"model.base {base}: no tokenizer there; expected {SPIECE} or tokenizer.json")
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise ConfigError(f"model.base {base}: its tokenizer has no end-of-sentence or no padding token")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of the tokenizer, and the SentencePiece model, which a fast tokenizer does not write."""
    tokenizer.save_pretrained(folder)
    source = getattr(tokenizer, "vocab_file", None)
    if not source and tokenizer.name_or_path:
        with contextlib.suppress(OSError, ValueError):
            source = cached_file(
                tokenizer.name_or_path, SPIECE, local_files_only=True, _raise_exceptions_for_missing_entries=False
            )
    if source and os.path.basename(source) == SPIECE and not (folder / SPIECE).exists():
        shutil.copyfile(source, folder / SPIECE)


def model_dir(run: str | Path) -> Path:
    """The exported model of a run directory, or the directory itself if it is an export, or that of `tiny-vae`."""
    path = run_dirs.shipped(run) or Path(run).expanduser()
    return path / "model" if run_dirs.is_run(path) else path


def is_export(path: Path) -> bool:
    """Whether a directory is an export of `T5VAE.save_pretrained`."""
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("format") == EXPORT_FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_export(path: Path) -> dict[str, Any]:
    """Read the description of an export. Raises CheckpointError if it is missing, broken or of another version."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no exported model here (no config.json)")
    if not is_export(path):
        raise CheckpointError(f"{file}: not written by vae_ds; to use a pretrained T5, set model.base in a recipe")
    export: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if export.get("schema_version") != EXPORT_VERSION:
        found = export.get("schema_version")
        raise CheckpointError(f"{file}: export version {found}, but this vae_ds reads version {EXPORT_VERSION}")
    return export


def base_config(base: str) -> tuple[PreTrainedConfig, dict[str, Any], str]:
    """The configuration of a base as an object and as stored in the file, and the directory or hub name of the base."""
    location = _locate(base)
    folder = Path(location)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.base {base}: no config.json in {folder}; use a T5 in the hub's layout")
        if is_export(folder):
            raise ConfigError(f"model.base {base}: an export of vae_ds, not a T5; use the T5 that it was built on")
        if not any(list(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
            raise ConfigError(f"model.base {base}: no weights in {folder}; expected model.safetensors")
    try:
        with _quiet(location):
            raw, _ = PreTrainedConfig.get_config_dict(location)
            kind = raw.get("model_type")
            if kind in FAMILIES:
                return FAMILIES[kind][0].from_pretrained(location), raw, location
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        if folder.is_dir():
            raise ConfigError(f"model.base {base}: config.json cannot be read: {_line(error)}") from None
        raise ConfigError(
            f"model.base {base}: no such directory, and the hub cannot be reached or has no such model; check the name,"
            f" or download it on a machine with a network (`hf download {base}`) and set model.base to the directory"
        ) from None
    raise ConfigError(f"model.base {base}: its model_type is {kind!r}; a base is a T5 or an mT5 (t5, mt5)")


def _locate(base: str) -> str:
    """The directory or hub name of a base. Raises ConfigError for a path that cannot be a hub name."""
    if base == "tiny":
        folder = Path(str(resources.files("vae_ds"))) / "tiny"
        if not (folder / "config.json").is_file():
            raise ConfigError("model.base tiny: missing in this installation; reinstall vae_ds, or use another base")
        return str(folder)
    path = Path(base).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ConfigError(f"model.base {base}: is a file; use the directory that contains config.json and the weights")
    if base.startswith(("/", ".", "~")) or base.count("/") > 1 or not base:
        raise ConfigError(f"model.base {base}: no such directory; use tiny, a directory or a hub name")
    return base


def _line(error: Exception) -> str:
    """The message of an exception as one line."""
    return " ".join(str(error).split()) or repr(error)


@contextlib.contextmanager
def _quiet(location: str) -> Iterator[None]:
    """Suppress progress bars, messages about tied weights and warnings about failed requests of transformers."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with hub.reachable_or_offline(local=Path(location).is_dir()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
