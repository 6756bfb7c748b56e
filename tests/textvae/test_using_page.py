"""The code of docs/using.md runs as it is printed, in the order of the page."""

import io
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import ROOT, tiny
from support.launch import launch
from vae_ds import cli
from vae_ds.config import ModelConfig
from vae_ds.model import T5VAE, load_tokenizer
from vae_ds.textvae import TextVAE

PAGE = ROOT / "docs" / "using.md"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = {
    "texts.txt": ["The red bicycle was near the river.", "A tired nurse forgot the small clock.", "Two letters."],
    "past.txt": ["My sister found two letters.", "They walked."],
    "present.txt": ["My sister finds two letters.", "They walk."],
    "pairs.txt": ["two letters\tan empty bottle", "the captain\ta young teacher"],
}


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `vae-ds ...` or `cat FILE | vae-ds ...` in this process, and what a launcher starts as two ranks."""
    piped = re.fullmatch(r"cat (\S+) \| (.*)", line)
    if piped:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path(piped[1]).read_bytes())))
        line = piped[2]
    program, *words = shlex.split(line)
    if program in ("torchrun", "srun"):
        name = "vae_ds" if program == "torchrun" else "vae-ds"
        launch(["-m", "vae_ds", *words[words.index(name) + 1 :]], cwd=Path.cwd())
        return
    assert program == "vae-ds"
    assert cli.run(words) == 0, line


@pytest.mark.timeout(400)
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny.base()
    TextVAE(T5VAE.from_base(ModelConfig(base=base, latent_dim=4)), load_tokenizer(base), 24).save_pretrained(
        "runs/mine"
    )
    for name, lines in FILES.items():
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) > 8
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, str(PAGE), "exec"), names)
        else:
            for line in code.splitlines():
                command(line, monkeypatch)
    assert names["z"].shape == (3, 4)
    assert np.load("codes.npz")["z"].shape == (3, 4)
    assert len(Path("decoded.txt").read_text(encoding="utf-8").splitlines()) == 3
    assert len(Path("moved.csv").read_text(encoding="utf-8").splitlines()) == 4
    assert "0.75  " in capsys.readouterr().out
