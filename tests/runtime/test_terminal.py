"""A process whose reader is gone goes on, and its output continues in a file."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

pytestmark = pytest.mark.timeout(120)

CODE = """
import os, sys, time
from pathlib import Path
from vae_ds.runtime import outlive_terminal
outlive_terminal(Path({folder!r}))
print("first", flush=True)
sys.stdin.readline()
for number in range(200):
    print("line", number, "x" * 200)
    print("error", number, file=sys.stderr)
sys.stdout.flush()
os.write(1, b"from C\\n")
assert not sys.stderr.isatty()
Path({folder!r}, "end").touch()
"""


def start(folder: Path, **streams: object) -> "subprocess.Popen[bytes]":
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE.format(folder=str(folder))]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, **streams)  # type: ignore[call-overload,no-any-return]


def check_end(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    assert (folder / "end").exists()
    text = (folder / "terminal.log").read_text(encoding="utf-8")
    assert "line 199 " in text
    assert "error 199" in text
    assert "from C" in text


def test_a_closed_pipe_does_not_end_a_process(tmp_path: Path) -> None:
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    check_end(process, tmp_path)


def test_a_terminal_that_is_gone_does_not_end_a_process(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert b"first" in os.read(ours, 100)
    os.close(ours)
    check_end(process, tmp_path)


def test_where_no_file_can_be_made_the_output_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = (
        "import sys\nfrom pathlib import Path\nfrom vae_ds.runtime import outlive_terminal\n"
        f"outlive_terminal(Path({str(tmp_path / 'file')!r}))\n"
        "sys.stdin.readline()\nprint('x', flush=True)\nprint('y', flush=True)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.communicate(b"\n", timeout=30)
    assert process.returncode == 0
