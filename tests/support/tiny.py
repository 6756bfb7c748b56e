"""Tiny random bases in the layout of the Hugging Face hub, and generated English text, for all tests."""

import atexit
import io
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import AutoTokenizer, MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

KINDS = ("t5", "v1_1", "flan", "mt5", "byt5")
EXTRA_IDS = 100

PEOPLE = ("the old farmer", "a young teacher", "my sister", "the captain", "our neighbour", "a tired nurse")
VERBS = ("found", "painted", "carried", "sold", "forgot", "repaired")
THINGS = ("a wooden chair", "the red bicycle", "two letters", "an empty bottle", "some warm bread", "the small clock")
PLACES = ("near the river", "in the garden", "behind the school", "at the market", "on the train", "under the bridge")
TIMES = ("yesterday", "before dinner", "last winter", "every morning", "at noon", "after the storm")


def _sentences(count: int) -> tuple[str, ...]:
    everything = [" ".join(parts) + " ." for parts in itertools.product(PEOPLE, VERBS, THINGS, PLACES, TIMES)]
    short = [f"{person} {verb} {thing} ." for person, verb, thing in itertools.product(PEOPLE, VERBS, THINGS)]
    draw = random.Random(7)
    mixed = draw.sample(everything, count // 2) + draw.sample(short, count - count // 2)
    draw.shuffle(mixed)
    return tuple(mixed)


ENGLISH: tuple[str, ...] = _sentences(400)


@cache
def spiece_model() -> bytes:
    """A SentencePiece unigram model of ENGLISH with T5's special ids: pad 0, end-of-sentence 1, unknown 2.

    SentencePiece forms pieces only from strings that occur in at least two words. The plurals make whole words pieces.
    """
    plurals = sorted({f"{word}s" for sentence in ENGLISH for word in sentence.split()})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*ENGLISH, *plurals]),
        model_writer=model,
        model_type="unigram",
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


@cache
def base(kind: str = "t5", **overrides: Any) -> str:
    """The directory of a random base, made once per session and shared. Do not write to it."""
    name = "-".join([kind, *(f"{key}_{value}" for key, value in overrides.items())])
    return str(make_base(_session_directory() / name, kind, **overrides))


@cache
def _session_directory() -> Path:
    folder = tempfile.mkdtemp(prefix="vae_ds_bases_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def make_base(directory: str | Path, kind: str = "t5", seed: int = 0, **overrides: Any) -> Path:
    """Write a random base of a kind: `t5` is tied; `v1_1`, `flan`, `mt5` and `byt5` are gated and untied.

    Returns its directory. `overrides` are settings of T5Config. d_kv differs from d_model / heads, and the encoder and
    the decoder have different depths. The random weights are scaled so that logits and gradients have a normal size.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "d_model": 32,
        "d_kv": 12,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 32,
        "vocab_size": _tokenizer(directory, kind),
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "feed_forward_proj": "relu" if kind == "t5" else "gated-gelu",
    }
    if kind == "byt5":  # as in byT5 on the hub: the encoder is three times as deep as the decoder
        settings |= {"num_layers": 3, "num_decoder_layers": 1}
    settings |= overrides
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family: Any = (T5Config, T5ForConditionalGeneration)
        if kind == "mt5":
            family = (MT5Config, MT5ForConditionalGeneration)
        model = family[1](family[0](**settings))
        if kind != "t5":
            head = torch.randn(model.lm_head.weight.shape) * settings["d_model"] ** -0.5
            model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(directory)
    _hub_config(directory / "config.json", tied=kind == "t5")
    return directory


def write_splits(folder: Path, train: Sequence[str], valid: Sequence[str], test: Sequence[str]) -> Path:
    """Make a directory with train.txt, valid.txt and test.txt, one sentence per line. Returns the directory."""
    folder.mkdir()
    for name, lines in {"train": train, "valid": valid, "test": test}.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# The model of the demo with the prior N(0, I), one key and value of z, and a threshold for each unit.
NORMAL_PRIOR = (
    *("model.injection=cross_attention", "model.slots=1", "model.memory_mlp=0", "model.prior=normal"),
    "phases.1.free_bits={mode: per_dim_batch, nats: 0.3}",
)


def demo_settings(folder: Path, **base: Any) -> list[str]:
    """Settings with which the demo's recipes take seconds: a random base without dropout and a text, in `folder`."""
    made = make_base(folder / "base", dropout_rate=0.0, **base)
    text = write_splits(folder / "text", ENGLISH[:256], ENGLISH[256:320], ENGLISH[320:])
    return [
        f"model.base={made}",
        "model.latent_dim=4",
        "data.corpus=text",
        f"data.path={text}",
        "data.max_tokens=24",
        "batch.global=16",
        "logging.every=1",
        "logging.progress=false",
        "validation.sentences=32",
    ]


def _hub_config(file: Path, tied: bool) -> None:
    """Change config.json to the format of the hub's files, which are older than transformers 5.

    They contain no `scale_decoder_outputs`, and `tie_word_embeddings` only if it is false.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("scale_decoder_outputs", None)
    config.pop("tie_word_embeddings", None)
    if not tied:
        config["tie_word_embeddings"] = False
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _tokenizer(directory: Path, kind: str) -> int:
    """Write the tokenizer files that the hub has for this kind. Returns the size of the embedding."""
    if kind == "byt5":
        settings: dict[str, Any] = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return 384
    (directory / "spiece.model").write_bytes(spiece_model())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece_model()).get_piece_size()
    extra = 0 if kind == "mt5" else EXTRA_IDS
    settings = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": extra}
    settings["tokenizer_class"] = "T5Tokenizer"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if kind in ("t5", "flan"):  # on the hub these also have the file of the fast tokenizer
        (directory / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
        AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    return -(-(pieces + extra) // 64) * 64
