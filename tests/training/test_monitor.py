"""The records of a run: rows that are on the disk at once, plain text samples, and progress on standard error."""

import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import ROOT
from support.reports import MAIN, OTHER, row
from vae_ds.distributed.ranks import Ranks
from vae_ds.training import Monitor


def rows_of(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def python(code: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables, **options)


def test_rows_past_the_checkpoint_and_a_torn_row_are_cut(tmp_path: Path) -> None:
    first = Monitor(tmp_path, MAIN, tensorboard=False, progress=False)
    for step in (10, 20, 30, 40):
        first.log(row(step))
        first.evaluation(step, "valid", {"rec": 1000.0, "iw_nll": None})
        first.checkpoint(step, size_bytes=1, copy_s=0.05, stall_s=0.1, write_s=0.1)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"phase": "warmup", "step": 60, "re')
    second = Monitor(tmp_path, MAIN, tensorboard=False, progress=False)
    second.resume_from(30)
    second.log(row(35))
    second.close()
    assert rows_of(tmp_path / "metrics.jsonl") == [row(step) for step in (10, 20, 30, 35)]
    evaluations = rows_of(tmp_path / "evaluations.jsonl")
    assert [(entry["step"], entry["split"], entry["iw_nll"]) for entry in evaluations] == [
        (step, "valid", None) for step in (10, 20, 30)
    ]
    assert [entry["step"] for entry in rows_of(tmp_path / "checkpoints.jsonl")] == [10, 20, 30]


def test_a_whole_last_row_without_its_line_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1}\n\x00\x00\n{"step": 2}\n{"step": 3}\n{"step": 2}', encoding="utf-8"
    )
    Monitor(tmp_path, MAIN, tensorboard=False, progress=False).resume_from(2)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_row_is_on_the_disk_when_log_returns_and_holds_strict_json(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, MAIN, tensorboard=False, progress=False)
    tensors = {"rec": torch.tensor(1.5), "kl": np.float32(0.5), "skipped_steps": np.int64(3)}
    monitor.log(row(1) | tensors | {"loss": math.nan, "grad_norm": -math.inf})
    written = rows_of(tmp_path / "metrics.jsonl")[0]
    assert written == row(1, rec=1.5, kl=0.5, skipped_steps=3, loss=None, grad_norm=None)
    with pytest.raises(RuntimeError, match="before anything is logged"):
        monitor.resume_from(0)
    monitor.close()


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n', encoding="utf-8")
    monitor = Monitor(tmp_path, OTHER)
    monitor.resume_from(3)
    monitor.begin_run({"seed": 1})
    monitor.begin_phase("full", 10)
    monitor.log(row(4))
    monitor.advance(10)
    monitor.evaluation(4, "valid", {"rec": 1.0}, [1.0], [("a", "b")], ["c"])
    monitor.checkpoint(4, size_bytes=1, copy_s=0.05, stall_s=0.1, write_s=0.1)
    monitor.end_run()
    monitor.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 9}\n'
    assert capfd.readouterr() == ("", "")


@pytest.mark.timeout(300)
def test_without_tensorboard_none_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from types import SimpleNamespace
from vae_ds.training import Monitor
monitor = Monitor({str(tmp_path)!r}, SimpleNamespace(is_main=True), tensorboard=False, progress=False)
monitor.resume_from(0)
monitor.begin_run({{"seed": 1}})
monitor.log({{"step": 1, "rec": 1.0}})
monitor.evaluation(1, "valid", {{"rec": 1.0}}, [1.0], [("a", "b")], ["c"])
monitor.end_run()
monitor.close()
assert not {{"tensorboard", "rich"}} & set(sys.modules)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*tfevents*"))


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, MAIN, tensorboard=False)
    monitor.begin_phase("full", 1000, 250, "trains 2 of 3 parameters")
    for step in range(251, 1001):
        if step % 10 == 0:
            monitor.log(row(step))
        monitor.advance(1)
    monitor.evaluation(1000, "valid", {"rec": 90.0, "kl": 3.0, "nelbo": 93.0, "iw_nll": None, "verdict": None})
    told = {"rec": 90.0, "verdict": "uses z", "verdict_reason": "as told", "cost": "unknown without a yardstick"}
    monitor.evaluation(1000, "valid", told)
    beside = {"nelbo_above_yardstick": 2.0, "cost": "at most 2.00 nats per sentence above the yardstick (nelbo)"}
    monitor.evaluation(1000, "valid", told | beside)
    monitor.close()
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "full: 250/1000 steps"
    assert lines[1] == "full: trains 2 of 3 parameters"
    assert lines[2] == "full: 300/1000 steps (30%)  rec -200  kl 2.5  beta 0.1  12,346 tokens/s  MFU 43%  0:00:00 left"
    assert lines[-4].startswith("full: 1000/1000 steps (100%)")
    assert not lines[-4].endswith("left")
    assert lines[-3] == "valid at step 1000: nelbo 93  rec 90  kl 3"
    assert lines[-2] == "valid at step 1000: rec 90  uses z"
    assert lines[-1] == f"valid at step 1000: rec 90  uses z, {beside['cost']}"
    assert len(lines) == 13
    assert "\x1b" not in err
    assert "\r" not in err


@pytest.mark.timeout(300)
def test_a_bar_on_a_terminal_and_standard_output_untouched(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from support.reports import MAIN, row
from vae_ds.training import Monitor
monitor = Monitor({str(tmp_path)!r}, MAIN, tensorboard=False)
for phase in ("warmup", "full"):
    monitor.begin_phase(phase, 4, 1)
    for step in (2, 3, 4):
        monitor.log(row(step))
        monitor.advance(1)
    print("to standard output")
monitor.evaluation(4, "valid", {{"nelbo": 93.0}})
monitor.close()
"""
    ours, theirs = pty.openpty()
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, env=variables)
    os.close(theirs)
    shown = b""
    try:
        while chunk := _read(ours):
            shown += chunk
        assert process.stdout
        assert process.stdout.read() == b"to standard output\n" * 2
        assert process.wait(timeout=60) == 0, shown.decode()
    finally:
        process.kill()
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "\x1b[" in shown.decode()
    assert re.search(r"warmup .*4/4 .*rec 96  kl 2\.5  beta 0\.1  12,346 tokens/s  MFU 43%", text)
    assert re.search(r"full .*4/4", text)
    assert "valid at step 4: nelbo 93" in text


def _read(descriptor: int) -> bytes:
    """What a pseudo terminal shows next; nothing once its last writer is gone, which Linux calls an error."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def test_the_texts_are_kept_as_plain_files(tmp_path: Path) -> None:
    alone = Monitor(tmp_path, Ranks(0, 0, 1, torch.device("cpu")), tensorboard=False, progress=False)
    pairs = [("one | two_three.", "*Three* & <four>."), ("two\nlines", "")]
    alone.evaluation(7, "valid", {"rec": 1.0}, None, pairs, ["It's `five`.", "1. six"])
    alone.evaluation(8, "valid", {"rec": 1.0})
    alone.close()
    (path,) = (tmp_path / "samples").iterdir()
    assert path.name == "valid-step-00000007.txt"
    assert (
        path.read_text(encoding="utf-8")
        == """valid, step 7

RECONSTRUCTIONS

source:         one | two_three.
reconstruction: *Three* & <four>.

source:         two lines
reconstruction:

PRIOR SAMPLES

It's `five`.
1. six
"""
    )
