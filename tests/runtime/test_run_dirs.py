"""Checks of the directories that commands name."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from vae_ds.errors import CheckpointError, ConfigError
from vae_ds.runtime import run_dirs


def run_at(path: Path, evaluated: bool = False) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").touch()
    if evaluated:
        (path / "eval-test.json").touch()
    return path


def test_runs_are_found_once(tmp_path: Path) -> None:
    a, b = run_at(tmp_path / "runs" / "a"), run_at(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "report").mkdir()
    assert run_dirs.runs_in([b, tmp_path / "runs"]) == [b, a]
    with pytest.raises(CheckpointError, match="neither a run directory"):
        run_dirs.runs_in([a, tmp_path / "runs" / "report"])


def test_a_named_run_must_be_evaluated_and_one_in_a_directory_need_not(tmp_path: Path) -> None:
    a, b = run_at(tmp_path / "runs" / "a", evaluated=True), run_at(tmp_path / "runs" / "b")
    assert run_dirs.evaluated_in([tmp_path / "runs", a], "test") == ([a], [b])
    with pytest.raises(CheckpointError, match=r"eval-test\.json: no such file; write it with"):
        run_dirs.evaluated_in([a, b], "test")
    with pytest.raises(CheckpointError, match="none of the 2 runs was evaluated on the valid split"):
        run_dirs.evaluated_in([tmp_path / "runs"], "valid")


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    run_dirs.check_writable(tmp_path / "new" / "run")
    run_dirs.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_nowhere_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--to"):
        run_dirs.check_writable(tmp_path / "link" / "run", "--to")


@pytest.mark.parametrize(("number", "is_wrong"), [(errno.EROFS, True), (errno.EACCES, True), (errno.ENOSPC, False)])
def test_a_full_disk_is_no_wrong_argument(
    number: int, is_wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryDirectory", fail)
    if is_wrong:
        with pytest.raises(ConfigError, match=os.strerror(number)):
            run_dirs.check_writable(tmp_path / "run")
    else:
        run_dirs.check_writable(tmp_path / "run")
