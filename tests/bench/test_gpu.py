"""`vae-ds bench gpu`: its half for a CPU, its list, its tables, and what a process that ends too early leaves."""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from support import ROOT
from vae_ds import cli
from vae_ds.bench import gpu
from vae_ds.bench.gpu import cells, copies, results, running
from vae_ds.bench.gpu.cells import Cell

pytestmark = pytest.mark.timeout(560)
# Begins the first cell, and ends as a process that has lost its device.
DYING = """
import json, os, sys, time
to, _, _, *names = sys.argv[1:]
open(f"{to}/current.json", "w").write(json.dumps({"cell": names[0], "began_s": time.time()}))
os.abort()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "gpu", "--to", str(tmp_path / "to")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: torch finds no GPU here; run the check on a machine with one, or use --cpu")
    assert not (tmp_path / "to").exists()


def test_the_list_has_every_part_and_ds_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "gpu", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["part", *cells.PARTS, "all"]
    assert all(line.split()[2:4][1] == "s" for line in lines[1:-1])
    curves = {cell.name for cell in cells.cells() if cell.part.startswith("curves-")}
    assert curves == {path.stem for path in (ROOT / "ds_configs").glob("zero*.json")}
    assert cli.run(["bench", "gpu", "--dry-run", "--only", "sped"]) == 2
    assert "--only sped: there is no such part; the parts are reference," in capsys.readouterr().err


def test_the_small_half_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All parts, by the code that a GPU runs. A second call finds all results."""
    words = ["bench", "gpu", "--cpu", "--to", str(tmp_path)]
    assert cli.run(words) == 0, capsys.readouterr().err
    found = {one["part"]: one for one in json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["cells"]}
    assert list(found) == list(cells.PARTS)
    states = {part: one["state"] for part, one in found.items()}
    # Some CPUs do not compute in fp16.
    assert set(states.pop("curves-fp16")) <= set("doneskipped")
    assert set(states.values()) == {"done"}, states
    reference = found["reference"]["values"]["losses"]
    assert cells.difference(found["curves-fp32"]["values"]["losses"], reference) < 1e-5
    assert 0 < cells.difference(found["curves-bf16"]["values"]["losses"], reference) < cells.TOLERANCES["bf16"]
    assert found["resume"]["values"]["difference"] < 1e-5
    assert found["waits"]["values"]["to_host"] == 1
    assert found["speed"]["values"]["tokens_per_s"] > 0
    assert found["memory"]["values"]["plan_gb"] > 0
    assert "| zero3_fp32 | 3 | 0 |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert not (tmp_path / "work").exists()

    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("cells/*/*.json") if "fp16" not in str(file)}
    capsys.readouterr()
    assert cli.run([*words, "--only", *(part for part in cells.PARTS if part != "curves-fp16")]) == 0
    assert capsys.readouterr().out.startswith("9 of 9 results are in")
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_a_process_that_dies_takes_one_cell_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WORKER", ("-c", DYING))
    told: list[str] = []
    found = gpu.check(tmp_path, only=["evaluation"], cpu=True, tell=told.append)
    assert [one["state"] for one in found.values()] == ["failed", "failed"]
    assert "its process ended with code -6; see" in found["evaluation/texts"]["reason"]
    # The first process had both cells, the second one the cell that was left.
    assert [line.split(",")[0] for line in told if "cells" in line] == ["evaluation: 2 cells", "evaluation: 1 cells"]


def test_a_part_that_does_not_fit_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    gpu.check(tmp_path, minutes=0.1, only=["waits"], cpu=True, tell=told.append)
    assert told == ["  skipped waits/zero1_bf16: 6 s were left, 26 s are expected"]


def test_the_reason_of_a_failure_is_one_line(tmp_path: Path) -> None:
    cell = Cell("speed", "tiny snli fp32", 1)
    try:
        raise RuntimeError("CUDA error: out of luck\nmore words")
    except RuntimeError as error:
        results.failed(tmp_path, cell, error, 2.0)
    found = results.read(tmp_path, [cell])[cell.id]
    assert found["reason"] == "RuntimeError: CUDA error: out of luck"
    assert "more words" in (tmp_path / "cells" / "speed" / found["traceback"]).read_text(encoding="utf-8")
    assert "| tiny snli fp32 | | | | | | | | RuntimeError: CUDA error: out of luck |" in gpu.markdown(
        [cell], {cell.id: found}
    )


def test_the_table_says_what_differs() -> None:
    reference, curve = Cell(cells.REFERENCE, "cpu", 1), Cell("curves-fp16", "zero2_fp16", 1)

    def last_of(loss: float, skipped: int) -> str:
        values: dict[str, Any] = {"steps": 2, "skipped_steps": 0, "losses": [10.0, 8.0]}
        found = {reference.id: {"state": "done", "values": values}}
        found[curve.id] = {"state": "done", "values": values | {"losses": [10.0, loss], "skipped_steps": skipped}}
        return gpu.markdown([reference, curve], found).splitlines()[-1]

    assert last_of(8.1, 0) == "| zero2_fp16 | 2 | 0 | 10.00 | 8.10 | 1.2e-02 | 2e-02 | |"
    assert last_of(8.2, 0).endswith("| differs from the reference |")
    # Other noise after a skipped step.
    assert last_of(8.2, 1) == "| zero2_fp16 | 2 | 1 | 10.00 | 8.20 | 2.5e-02 | 6e-02 | |"
    assert "the reference is missing" in gpu.markdown(
        [curve], {curve.id: {"values": {"steps": 1, "skipped_steps": 0, "losses": [1.0]}}}
    )


def test_a_wait_is_counted_at_its_place() -> None:
    found: Counter[str] = Counter()
    with copies._noted_waits(found):
        for _ in range(2):
            warnings.warn(f"{copies.SYNCHRONIZING} (function warn_or_error_on_sync)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert found == {"other": 2}


def test_the_documented_table_is_that_of_the_code() -> None:
    """`vae-ds bench gpu` writes this table. Paste DIR/gpu.md after a run on a GPU."""
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    told = page.split("<!-- results -->\n\n")[1].split("\n<!-- end of results -->")[0]
    rows = [line.split("|")[1].strip() for line in told.splitlines() if line.startswith("| ")]
    expected = gpu.markdown(cells.cells(), {}, "no GPU was available")
    assert rows == [line.split("|")[1].strip() for line in expected.splitlines() if line.startswith("| ")]
    if "No result yet." in told:
        assert told == expected
