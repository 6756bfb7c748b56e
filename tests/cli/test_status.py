"""`vae-ds status`: for people, for programs, for many runs, and while a run goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from support.launch import clean_environment
from vae_ds import cli
from vae_ds.evaluation.verdict import cost
from vae_ds.runtime import records

FACTS: dict[str, Any] = {
    "phase": "full",
    "phase_number": 2,
    "phases": 2,
    "phase_step": 920,
    "phase_steps": 1150,
    "step": 1070,
    "total_steps": 1300,
    "epoch": 1.625,
    "seconds_left": 4225.4,
    "validation": {"step": 1000, "nelbo": 63.951, "rec": 52.3, "kl": 11.6, "mi": 6.1, "au": 32, "verdict": "uses z"},
    "export": {"step": 1000, "nelbo": 63.951, "reason": "model/ is the validation of step 1,000"},
    "checkpoint": "step-00001000",
}
ABOVE = {"nelbo_above_yardstick": 2.0, "nelbo_above_yardstick_se": 0.1}
# Version 0.1: `phase` counts from 0, and `step` counts within the phase.
OLD = {"phase": 1, "step": 1150, "total_steps": 1300}


def code_of(*words: object) -> int:
    try:
        return cli.run([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def write(run: Path, state: str, **facts: Any) -> Path:
    records.write_status(run, state, **facts)
    return run


def test_a_run_is_shown_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("status", write(tmp_path / "run", "running", **FACTS)) == 1
    lines = capsys.readouterr().out.splitlines()
    shown = {words[0]: words[1].strip() for words in (line.strip().split("  ", 1) for line in lines[1:])}
    assert lines[0] == str(tmp_path / "run")
    assert shown["state"] == "running"
    assert shown["phase"] == "full (2 of 2)"
    assert shown["step"] == "1,070 of 1,300 (82%); 920 of 1,150 in the phase"
    assert shown["epoch"] == "1.62"
    assert shown["time left"] == "1:10:25"
    assert shown["validation"].startswith("step 1,000: nelbo 63.95, rec 52.30, kl 11.60, mi 6.10 nats per sentence")
    assert shown["validation"].endswith("32 active units, uses z")
    assert shown["export"] == "model/ is the validation of step 1,000"
    # The verdict's other half has words only beside a yardstick.
    for metrics, end in (
        ({"kl": 11.6}, "uses z"),
        ({"kl": 11.6, **ABOVE}, f"uses z, cost: {cost({'kl': 11.6, **ABOVE})}"),
    ):
        validation = {**FACTS["validation"], "cost": cost(metrics)}
        assert code_of("status", write(tmp_path / "run", "running", **FACTS | {"validation": validation})) == 1
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("validation")]
        assert line.endswith(end)
    assert shown["checkpoint"] == "step-00001000"
    assert shown["updated"].endswith(f"UTC, process {os.getpid()} on {os.uname().nodename}")


def test_a_status_of_version_0_1_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("status", write(tmp_path / "run", "done", **OLD)) == 0
    told = capsys.readouterr().out
    assert "number 2" in told
    assert "1,150 of the phase; the run has 1,300" in told
    assert code_of("status", tmp_path) == 0


def test_json_is_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", "stopped", reason="SIGTERM", **FACTS)
    assert code_of("status", run, "--json") == 75
    assert json.loads(capsys.readouterr().out) == json.loads((run / "status.json").read_text(encoding="utf-8"))


def test_many_runs_have_a_row_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "[a]", "done", **FACTS)
    assert code_of("status", tmp_path) == 0
    write(tmp_path / "study" / "b", "stopped", reason="a long reason " * 20, **FACTS)
    assert code_of("status", tmp_path) == 75
    write(tmp_path / "c", "failed", **OLD)
    capsys.readouterr()
    assert code_of("status", tmp_path) == 1
    told = capsys.readouterr().out
    assert "…" not in told
    assert [line.split()[:2] for line in told.splitlines() if str(tmp_path) in line] == [
        [str(tmp_path / "[a]"), "done"],
        [str(tmp_path / "c"), "failed"],
        [str(tmp_path / "study" / "b"), "stopped"],
    ]
    assert code_of("status", tmp_path / "[a]", tmp_path / "c", "--json") == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["run"], row["state"]) for row in rows] == [
        (str(tmp_path / "[a]"), "done"),
        (str(tmp_path / "c"), "failed"),
    ]


def test_a_broken_file_among_many_runs_hides_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", "done", **FACTS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "status.json").write_text("{", encoding="utf-8")
    assert code_of("status", tmp_path) == 1
    told = capsys.readouterr().out
    assert "unreadable" in told
    assert "63.95" in told
    assert code_of("status", tmp_path / "b") == 2


def test_watching_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each change, not for each look."""
    run = write(tmp_path / "run", "running", **FACTS)

    def go_on() -> None:
        time.sleep(0.5)
        write(run, "running", **FACTS | {"phase_step": 1000, "step": 1150})
        time.sleep(0.5)
        write(run, "done", **FACTS | {"phase_step": 1150, "step": 1300, "seconds_left": None})

    writer = threading.Thread(target=go_on)
    writer.start()
    assert code_of("status", run, "--watch", "--interval", "0.05") == 0
    writer.join()
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix(f"{run}  ").split()[0] for line in lines] == ["running", "running", "done"]
    assert "1:10:25 left" in lines[0]
    assert "1,150 of 1,300" in lines[1]


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "x"])
def test_a_wrong_interval(interval: str, tmp_path: Path) -> None:
    assert code_of("status", write(tmp_path / "run", "running"), "--watch", "--interval", interval) == 2


@pytest.mark.timeout(120)
def test_ctrl_c_ends_the_watching_with_the_code_of_the_state(tmp_path: Path) -> None:
    run = write(tmp_path / "run", "running", **FACTS)
    process = subprocess.Popen(
        [sys.executable, "-m", "vae_ds", "status", str(run), "--watch", "--interval", "0.1"],
        env=clean_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert b"running" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (1, b"")


@pytest.mark.timeout(120)
def test_a_terminal_is_refreshed_in_place(tmp_path: Path) -> None:
    run = write(tmp_path / "run", "stopped", **FACTS)
    command = [sys.executable, "-m", "vae_ds", "status", str(run), "--watch"]
    code = f"import pty, sys; sys.exit(pty.spawn({command!r}) >> 8)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(tmp_path), stdin=subprocess.DEVNULL, capture_output=True
    )
    assert done.returncode == 75
    assert b"full (2 of 2)" in done.stdout
    assert b"\x1b[" in done.stdout
