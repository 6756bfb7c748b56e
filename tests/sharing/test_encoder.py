"""The encoder alone in other formats computes the codes of the model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5EncoderModel

from support import tiny
from support.models import TEXTS, batch, build
from vae_ds import cli
from vae_ds.model import T5VAE, load_tokenizer
from vae_ds.sharing import encoder
from vae_ds.textvae import TextVAE


def exported(to: Path, kind: str = "t5", **settings: object) -> T5VAE:
    model = build(kind, **settings)
    TextVAE(model, load_tokenizer(tiny.base(kind)), 20, device="cpu").save_pretrained(to)
    return model


def mu_of(model: T5VAE) -> torch.Tensor:
    rows = batch()
    with torch.no_grad():
        return model.encode(rows["input_ids_BT"], rows["attention_mask_BT"])[0]


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_the_directory_is_what_sentence_transformers_reads(tmp_path: Path, pooling: str) -> None:
    """By the documentation of its format: stock modules, applied one after the other."""
    model = exported(tmp_path / "mine", pooling=pooling)
    encoder.sentence_transformers(tmp_path / "mine", tmp_path / "st")
    read = {path: json.loads((tmp_path / "st" / path).read_text(encoding="utf-8")) for path in (
        "modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json"
    )}  # fmt: skip
    assert [(row["path"], row["type"].rpartition(".")[2]) for row in read["modules.json"]] == [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        ("2_Dense", "Dense"),
    ]
    assert read["sentence_bert_config.json"]["max_seq_length"] == 20
    assert [key for key, value in read["1_Pooling/config.json"].items() if value is True] == [
        f"pooling_mode_{pooling}_tokens"
    ]
    stock, report = T5EncoderModel.from_pretrained(tmp_path / "st", output_loading_info=True)
    assert not any(report.values())
    rows = AutoTokenizer.from_pretrained(tmp_path / "st")(list(TEXTS), padding=True, return_tensors="pt")
    mask_BT1 = rows["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        states_BTH = stock(**rows).last_hidden_state
    pooled_BH = states_BTH.masked_fill(mask_BT1 == 0, -torch.inf).amax(1)
    if pooling == "mean":
        pooled_BH = (states_BTH * mask_BT1).sum(1) / mask_BT1.sum(1)
    dense = torch.nn.Linear(
        **{key: read["2_Dense/config.json"][key] for key in ("in_features", "out_features", "bias")}
    )
    from safetensors.torch import load_file

    dense.load_state_dict({"weight": load_file(tmp_path / "st" / "2_Dense" / "model.safetensors")["linear.weight"]})
    torch.testing.assert_close(dense(pooled_BH), mu_of(model), rtol=0, atol=1e-5)


def test_sentence_transformers_loads_it(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    for kind, pooling in (("t5", "max"), ("mt5", "mean")):
        exported(tmp_path / kind, kind, pooling=pooling)
        assert (
            cli.run(
                [
                    "export",
                    str(tmp_path / kind),
                    "--to",
                    str(tmp_path / f"{kind}-st"),
                    "--format",
                    "sentence-transformers",
                ]
            )
            == 0
        )
        made = library.SentenceTransformer(str(tmp_path / f"{kind}-st"), device="cpu").encode(list(TEXTS))
        expected_BL = TextVAE.from_pretrained(tmp_path / kind, device="cpu").encode(TEXTS)
        torch.testing.assert_close(torch.from_numpy(made), expected_BL, rtol=0, atol=1e-5)


@pytest.mark.timeout(240)
def test_a_program_of_torch_export_takes_other_sizes(tmp_path: Path) -> None:
    model = exported(tmp_path / "mine", "v1_1", pool_layers="all", pooling="mean")
    encoder.program(tmp_path / "mine", tmp_path / "a.pt2")
    run = torch.export.load(tmp_path / "a.pt2").module()
    assert not any("decoder" in name for name, _ in run.named_parameters())
    rows = batch("v1_1")
    for size in (1, 4):
        ids_BT, mask_BT = rows["input_ids_BT"][:size], rows["attention_mask_BT"][:size]
        with torch.no_grad():
            for found, expected in zip(run(ids_BT, mask_BT), model.encode(ids_BT, mask_BT), strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    exported(tmp_path / "mine")
    monkeypatch.setattr(encoder, "TOLERANCE", -1.0)
    assert cli.run(["export", str(tmp_path / "mine"), "--to", str(tmp_path / "a.pt2"), "--format", "torch"]) == 2
    assert "mu differs from that of PyTorch" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize(
    ("settings", "words", "told"),
    [
        ({"injection": "none"}, ["sentence-transformers"], "this model has injection `none`, so no encoder"),
        ({"injection": "none"}, ["torch"], "this model has injection `none`, so no encoder"),
        ({"pool_layers": "all"}, ["sentence-transformers"], "pools the last layer only; this one has pool_layers: all"),
        ({}, ["torch", "--dtype", "bfloat16"], "--dtype is of the format vae_ds; found --format torch"),
    ],
)
def test_what_a_format_cannot_hold_is_told(tmp_path: Path, settings, words: list[str], told: str, capsys) -> None:
    exported(tmp_path / "mine", **settings)
    assert cli.run(["export", str(tmp_path / "mine"), "--to", str(tmp_path / "made"), "--format", *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_an_encoder_too_large_for_onnx_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("onnx.reference")
    exported(tmp_path / "mine")
    monkeypatch.setattr(encoder, "ONNX_BYTES", 1000)
    assert cli.run(["export", str(tmp_path / "mine"), "--to", str(tmp_path / "a.onnx"), "--format", "onnx"]) == 2
    assert "and an ONNX file holds 2 GB; use --format torch" in capsys.readouterr().err


def test_nothing_is_replaced(tmp_path: Path, capsys) -> None:
    exported(tmp_path / "mine")
    for place in ("file", "folder"):
        (tmp_path / place).mkdir() if place == "folder" else (tmp_path / place).write_text("a")
    (tmp_path / "folder" / "a").write_text("a")
    for kind, place in (("torch", "file"), ("torch", "folder"), ("sentence-transformers", "folder")):
        assert cli.run(["export", str(tmp_path / "mine"), "--to", str(tmp_path / place), "--format", kind]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "a").read_text() == "a"
