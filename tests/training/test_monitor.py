"""What a run records: rows that survive a crash, curves that TensorBoard shows, a status that is always whole."""

import html
import json
import math
import os
import pty
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import ROOT
from support.reports import MAIN, OTHER, row
from vae_ds.distributed.ranks import Ranks
from vae_ds.training import Monitor

SOURCE = "a | b <b>bold</b> *star* [link](x) `code` &amp; \\ _under_"

CRASHES = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from support.reports import MAIN, row
from vae_ds.training import Monitor
monitor = Monitor({run_dir!r}, MAIN, progress=False)
monitor.begin_phase("warmup", 50, 0)
for step in (10, 20, 30, 40, 50):
    monitor.log(row(step, rec=1000.0 + step))
    if step == 20 or step == 40:
        monitor.evaluation(step, "valid", {{"rec": 1000.0 + step}}, [9.0], [("cut" if step > 30 else "kept", "x")])
with open({run_dir!r} + "/metrics.jsonl", "a") as file:
    file.write('{{"phase": "warmup", "step": 60, "re')
os._exit(1)
"""


def rows_of(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def python(code: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables, **options)


class Board:
    """A running TensorBoard and its answers."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, plugin: str, endpoint: str, **query: str) -> Any:
        address = f"{self.url}/data/plugin/{plugin}/{endpoint}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return json.load(answer)

    def scalars(self, tag: str) -> dict[int, Any]:
        points = self.get("scalars", "scalars", run=".", tag=tag)
        assert len({step for _, step, _ in points}) == len(points), f"{tag} has two points at one step: {points}"
        return {step: value for _, step, value in points}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that crashed at step 50 and was resumed from the checkpoint of step 30, up to step 70."""
    run_dir = tmp_path_factory.mktemp("runs") / "resumed"
    code = CRASHES.format(root=str(ROOT), tests=str(ROOT / "tests"), run_dir=str(run_dir))
    crashed = python(code)
    assert crashed.returncode == 1, crashed.stderr
    # TensorBoard orders a run's event files by the second of their making.
    time.sleep(1.1)
    monitor = Monitor(run_dir, MAIN, progress=False)
    monitor.resume_from(30)
    monitor.begin_phase("full", 100, 0)
    for step in (35, 45, 55, 65):
        monitor.log(row(step, grad_norm=math.inf if step == 45 else 4.0))
    metrics = {"rec": 90.0, "kl": 3.0, "nelbo": 93.0, "mi": 2.0, "mi_ceiling": 7.6, "au": 2, "z_gain": 4.0, "ppl": 20.0}
    metrics |= {"verdict": "unused KL", "verdict_reason": "KL is 3.00 nats but <b>little</b> is read"}
    pairs = [(SOURCE, "<script>alert(1)</script>"), ("two\nlines", "")]
    extent = {"sentences": 2000, "iw_nll": None, "iw_samples": None}
    monitor.evaluation(70, "valid", metrics | extent, [1.0, 2.0, math.nan, 0.0], pairs, ["a prior sample"])
    monitor.close()
    monitor.close()
    return run_dir


@pytest.fixture(scope="module", params=["--load_fast=false", "--load_fast=auto"])
def board(request: pytest.FixtureRequest, resumed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """The real server over the resumed run, with either of its loaders; `auto` is what users get."""
    said = tmp_path_factory.mktemp("tensorboard") / "said"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(resumed / "tensorboard"), "--port", "0"]
    options = ["--host", "127.0.0.1", request.param, "--reload_interval=1"]
    with said.open("w") as file:
        server = subprocess.Popen([*command, *options], stdout=file, stderr=file, cwd=said.parent)
    try:
        yield wait_for_board(server, said)
    finally:
        server.kill()
        server.wait(timeout=10)


def wait_for_board(server: "subprocess.Popen[bytes]", said: Path) -> Board:
    """The server once it has loaded the run."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and server.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", said.read_text())
        try:
            if found and "valid/prior_samples/text_summary" in str(Board(found[0]).get("text", "tags")):
                return Board(found[0])
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"TensorBoard shows no run: {said.read_text()}")


@pytest.mark.timeout(120)
def test_a_resumed_run_continues_its_curves_without_the_cut_points(board: Board) -> None:
    expected = {10: 1010.0, 20: 1020.0, 30: 1030.0, 35: 65.0, 45: 55.0, 55: 45.0, 65: 35.0}
    assert board.scalars("train/rec") == pytest.approx(expected)
    assert board.scalars("train/nelbo") == pytest.approx({step: value + 2.5 for step, value in expected.items()})
    assert board.scalars("valid/rec") == pytest.approx({20: 1020.0, 70: 90.0})


@pytest.mark.timeout(120)
def test_every_curve_is_there_under_its_name(board: Board) -> None:
    tags = set(board.get("scalars", "tags")["."])
    train = "rec kl kl_weighted beta nelbo loss lr grad_norm tokens_per_s padding skipped_steps epoch"
    valid = "rec kl nelbo mi mi_ceiling au z_gain ppl"
    assert tags == {f"train/{key}" for key in train.split()} | {f"valid/{key}" for key in valid.split()}
    assert board.scalars("train/kl")[55] == pytest.approx(2.5)
    assert board.scalars("train/kl_weighted")[55] == pytest.approx(0.25)
    assert board.scalars("train/grad_norm")[45] == "Infinity"


@pytest.mark.timeout(120)
def test_the_histogram_of_units_and_the_texts_are_there(board: Board) -> None:
    points = board.get("histograms", "histograms", run=".", tag="valid/kl_per_dim")
    assert [step for _, step, _ in points] == [20, 70]
    assert sum(count for _, _, count in points[1][2]) == pytest.approx(3)

    texts = board.get("text", "text", run=".", tag="valid/reconstructions/text_summary")
    assert [entry["step"] for entry in texts] == [20, 70]
    page = texts[1]["text"]
    assert not re.findall(r"<(?!/?(?:table|thead|tbody|tr|th|td)>)", page)
    cells = [html.unescape(cell) for cell in re.findall(r"<td>([^<]*)</td>", page)]
    assert cells == [SOURCE, "<script>alert(1)</script>", "two lines", ""]
    (verdict,) = board.get("text", "text", run=".", tag="valid/verdict/text_summary")
    assert verdict["step"] == 70
    assert "<strong>unused KL</strong>" in verdict["text"]
    assert "KL is 3.00 nats but <b>little</b> is read" in html.unescape(verdict["text"])
    assert "a prior sample" in board.get("text", "text", run=".", tag="valid/prior_samples/text_summary")[0]["text"]


@pytest.mark.timeout(60)
def test_a_reader_that_saw_the_cut_points_drops_them_at_the_first_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    first = Monitor(tmp_path, MAIN, progress=False)
    for step in (10, 20, 30):
        first.log(row(step))
    first.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in reader.Tensors("train/rec")] == [10, 20, 30]
    time.sleep(1.1)
    second = Monitor(tmp_path, MAIN, progress=False)
    second.resume_from(10)
    second.log(row(40))
    second.close()
    assert [point.step for point in reader.Reload().Tensors("train/rec")] == [10, 40]


@pytest.mark.timeout(60)
def test_rows_past_the_checkpoint_and_a_torn_row_are_cut(resumed: Path) -> None:
    rows = rows_of(resumed / "metrics.jsonl")
    assert [entry["step"] for entry in rows] == [10, 20, 30, 35, 45, 55, 65]
    assert rows[4]["grad_norm"] is None
    assert rows[3] == row(35)
    evaluations = rows_of(resumed / "evaluations.jsonl")
    assert [(entry["step"], entry["split"]) for entry in evaluations] == [(20, "valid"), (70, "valid")]
    assert evaluations[1]["iw_nll"] is None


def test_a_whole_last_row_without_its_line_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1}\n\x00\x00\n{"step": 2}\n{"step": 3}\n{"step": 2}', encoding="utf-8"
    )
    Monitor(tmp_path, MAIN, tensorboard=False, progress=False).resume_from(2)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_starts_over_forgets_all_of_it(tmp_path: Path) -> None:
    first = Monitor(tmp_path, MAIN, progress=False)
    first.evaluation(0, "valid", {"rec": 1.0})
    first.log(row(1))
    first.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    with events.open("ab") as file:
        file.write(b"\x40\0\0\0\0\0\0\0torn")
    before = events.stat().st_size
    Monitor(tmp_path, MAIN, progress=False).resume_from(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "evaluations.jsonl").read_bytes() == b""
    assert list((tmp_path / "tensorboard").iterdir()) == [events]
    assert 0 < events.stat().st_size < before
    assert b"train/" not in events.read_bytes()
    assert b"torn" not in events.read_bytes()


def test_a_row_is_on_the_disk_when_log_returns_and_holds_strict_json(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, MAIN, tensorboard=False, progress=False)
    tensors = {"rec": torch.tensor(1.5), "kl": np.float32(0.5), "skipped_steps": np.int64(3)}
    monitor.log(row(1) | tensors | {"loss": math.nan, "grad_norm": -math.inf})
    written = rows_of(tmp_path / "metrics.jsonl")[0]
    assert written == row(1, rec=1.5, kl=0.5, skipped_steps=3, loss=None, grad_norm=None)
    with pytest.raises(RuntimeError, match="before the first row"):
        monitor.resume_from(0)
    monitor.close()


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n', encoding="utf-8")
    monitor = Monitor(tmp_path, OTHER)
    monitor.resume_from(3)
    monitor.begin_phase("full", 10)
    monitor.log(row(4))
    monitor.advance(10)
    monitor.evaluation(4, "valid", {"rec": 1.0}, [1.0], [("a", "b")], ["c"])
    monitor.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 9}\n'
    assert capfd.readouterr() == ("", "")


@pytest.mark.timeout(60)
def test_without_tensorboard_none_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from types import SimpleNamespace
from vae_ds.training import Monitor
monitor = Monitor({str(tmp_path)!r}, SimpleNamespace(is_main=True), tensorboard=False, progress=False)
monitor.log({{"step": 1, "rec": 1.0}})
monitor.evaluation(1, "valid", {{"rec": 1.0}}, [1.0], [("a", "b")], ["c"])
monitor.close()
assert not {{"tensorboard", "rich"}} & set(sys.modules)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "tensorboard").exists()


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, MAIN, tensorboard=False)
    monitor.begin_phase("full", 1000, 250)
    for step in range(251, 1001):
        if step % 10 == 0:
            monitor.log(row(step))
        monitor.advance(1)
    monitor.evaluation(1000, "valid", {"rec": 90.0, "kl": 3.0, "nelbo": 93.0, "iw_nll": None, "verdict": None})
    monitor.evaluation(1000, "valid", {"rec": 90.0, "verdict": "healthy", "verdict_reason": "as told"})
    monitor.close()
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "full: 250/1000 steps"
    assert lines[1] == "full: 300/1000 steps (30%)  rec -200  kl 2.5  beta 0.1  12,346 tokens/s"
    assert lines[-3].startswith("full: 1000/1000 steps (100%)")
    assert lines[-2] == "valid at step 1000: nelbo 93  rec 90  kl 3"
    assert lines[-1] == "valid at step 1000: rec 90  healthy"
    assert len(lines) == 11
    assert "\x1b" not in err
    assert "\r" not in err


@pytest.mark.timeout(60)
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
        assert process.wait(timeout=30) == 0, shown.decode()
    finally:
        process.kill()
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "\x1b[" in shown.decode()
    assert re.search(r"warmup .*4/4 .*rec 96  kl 2\.5  beta 0\.1  12,346 tokens/s", text)
    assert re.search(r"full .*4/4", text)
    assert "valid at step 4: nelbo 93" in text


def _read(descriptor: int) -> bytes:
    """What a pseudo terminal shows next; nothing once its last writer is gone, which Linux calls an error."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def test_the_texts_are_kept_as_files(tmp_path: Path) -> None:
    alone = Monitor(tmp_path, Ranks(0, 0, 1, torch.device("cpu")), tensorboard=False, progress=False)
    alone.evaluation(7, "valid", {"rec": 1.0}, None, [("one | two", "three")], ["four"])
    alone.close()
    text = (tmp_path / "samples" / "valid-step-00000007.md").read_text(encoding="utf-8")
    assert "## reconstructions" in text
    assert "three" in text
    assert "| four |" in text
