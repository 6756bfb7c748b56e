"""The code of docs/sharing.md runs as it is printed, in the order of the page."""

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx.reference import ReferenceEvaluator

from support import ROOT
from vae_ds import cli
from vae_ds.textvae import TextVAE

PAGE = ROOT / "docs" / "sharing.md"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(400)
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 4
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, str(PAGE), "exec"), names)
            if "T5EncoderModel" in code:
                names["by_hand"] = names["mu"]
        else:
            for line in code.splitlines():
                program, *words = shlex.split(line, comments=True)
                assert (program, cli.run(words)) == ("vae-ds", 0), line
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir() if path.is_dir()) == ["1_Pooling", "2_Dense"]
    rows = {name: names["tokens"][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        of_transformers = names["model"].float().encode(*rows.values())[0]
    run = ReferenceEvaluator(str(tmp_path / "encoder.onnx"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its logarithm of 0, as a position bias has it
        (of_onnx,) = run.run(["mu"], {name: value.numpy() for name, value in rows.items()})
    texts = ["Returns the number of elements in the list.", "A name."]
    expected_BL = TextVAE.from_pretrained("my-model", device="cpu").encode(texts)
    for found_BL in (names["by_hand"], names["mu"], of_transformers, torch.from_numpy(of_onnx)):
        torch.testing.assert_close(found_BL, expected_BL, rtol=0, atol=1e-5)
