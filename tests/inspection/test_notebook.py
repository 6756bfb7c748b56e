"""The cells of the notebook run as a script, with a short training. A kernel would need 35 more packages."""

import json
from pathlib import Path
from typing import Any

import pytest

from support import ROOT

BOOK = ROOT / "examples" / "latent-space.ipynb"


@pytest.mark.timeout(400)
def test_the_cells_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    book = json.loads(BOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    names: dict[str, Any] = {}
    for cell in book["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"]).replace("STEPS = 600", "STEPS = 2")
        exec(compile(source, str(BOOK), "exec"), names)
    assert names["STEPS"] == 2
    assert set(names["kinds"]) == {"kitchen", "garage"}
    assert len(names["facts"]["files"]) >= 4
    told = capsys.readouterr().out
    assert "| label | 300 | 2 |" in told
    assert "| kitchen | 50 |" in told
