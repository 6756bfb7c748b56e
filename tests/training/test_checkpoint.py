"""Checkpoints: resumed across stages and world sizes by real processes, and what holds when files break."""

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import checkpoint_cases, checkpoint_endless
from support.launch import Finished, clean_environment, launch
from vae_ds.config.settings import CheckpointConfig
from vae_ds.distributed import randomness as generators
from vae_ds.distributed.ranks import Ranks
from vae_ds.engine.slices import MOMENTS, Part, PhaseState
from vae_ds.errors import CheckpointError, StorageError
from vae_ds.training import checkpoint, shards
from vae_ds.training.saver import Saver

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
NOWHERE = Path("unused")
WORLDS = (3, 2, 1)
# Ten seconds on two free cores; on shared ones ten times that.
pytestmark = pytest.mark.timeout(600)


class Session:
    """Three ranks train and save, two ranks do and resume both, one rank resumes both."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "runs"
        self.reports: dict[int, Finished] = {}
        self.answers: dict[str, list[str]] = {}
        for world in WORLDS:
            (self.run_dir / f"of{world}").mkdir(parents=True)
            results = folder / f"world{world}"
            self.reports[world] = launch(
                [Path(checkpoint_cases.__file__), results, self.run_dir, str(world)],
                processes=world,
                timeout_s=280,
                check=False,
            )
            for rank in range(world):
                path = results / f"rank{rank}.json"
                for case, answer in (json.loads(path.read_text()) if path.is_file() else {}).items():
                    self.answers.setdefault(case, []).append(answer)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize(
    ("case", "world"), [(case, world) for world in WORLDS for case in checkpoint_cases.cases(NOWHERE, world)]
)
def test_case_on_real_ranks(session: Session, case: str, world: int) -> None:
    answers = session.answers.get(case, [])
    report = session.reports[world].report()
    assert answers == ["ok"] * world, "\n".join(answers) or f"not reached\n{report}"
    assert session.reports[world].codes == [0] * world, report


def test_a_checkpoint_is_shards_of_safetensors_and_plain_json(session: Session) -> None:
    found = checkpoint.newest(session.run_dir / "of2")
    assert found is not None
    assert sorted(path.name for path in found.path.iterdir()) == [
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    state, _ = checkpoint.load(found)
    assert list(state.weights) == [name for name, _ in checkpoint_cases.network(2).named_parameters()]
    assert state.generators is None


def state_of(value: float) -> PhaseState:
    weights = {"a": torch.full((3, 2), float(value)), "b": torch.tensor(float(value)), "frozen": torch.zeros(2)}
    moments = {key: {name: torch.full_like(weights[name], value / 2) for name in ("a", "b")} for key in MOMENTS}
    return PhaseState(weights, moments, steps=int(value))


def part_of(value: float) -> Part:
    return checkpoint_cases.part_of(state_of(value), ALONE)


def write(run_dir: Path, *steps: int) -> list[Path]:
    return [
        checkpoint_cases.save(run_dir, lambda step=step: part_of(step), {"global_step": step}, ALONE)  # type: ignore[misc]
        for step in steps
    ]


def steps_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    write(tmp_path, 7)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 7
    state, progress = checkpoint.load(found, ALONE)
    expected = state_of(7)
    assert progress == {"global_step": 7}
    assert state.steps == 7
    assert state.weights.keys() == expected.weights.keys()
    assert all(torch.equal(state.weights[name], value) for name, value in expected.weights.items())
    for key in MOMENTS:
        assert state.moments[key].keys() == {"a", "b"}
        assert all(torch.equal(state.moments[key][name], value) for name, value in expected.moments[key].items())


def test_no_directory_and_no_checkpoint_are_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint.newest(tmp_path) is None


def no_marker(path: Path) -> None:
    (path / checkpoint.MANIFEST).unlink()


def garbled_marker(path: Path) -> None:
    (path / checkpoint.MANIFEST).write_text('{"schema_version": 2, "shar')


def other_schema(path: Path) -> None:
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"schema_version": 0}))


def no_shards_named(path: Path) -> None:
    (path / checkpoint.MANIFEST).write_text('{"schema_version": 2}')


def cut_shard(path: Path) -> None:
    shard = path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def missing_shard(path: Path) -> None:
    (path / "shard-00000.safetensors").unlink()


def flipped_bit(path: Path) -> None:
    shard = path / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def changed_slices(change: Callable[[list[list[int]]], object]) -> Callable[[Path], None]:
    """Change the slices [number of the name, offset, length] that the manifest lists. `a` is 0 and has 6 elements."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / checkpoint.MANIFEST).read_text())
        change(manifest["shards"][0]["slices"])
        (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))

    return damage


def first_of(slices: list[list[int]], number: int) -> list[int]:
    return next(one for one in slices if one[0] == number)


BREAKS = [
    (no_marker, "incomplete, manifest.json is missing"),
    (garbled_marker, "unreadable"),
    (other_schema, "schema version 0; this vae_ds reads 1 to 3"),
    (no_shards_named, "lists no shards"),
    (cut_shard, "bytes, not"),
    (missing_shard, "missing, not"),
    (flipped_bit, "checksum"),
    (changed_slices(lambda slices: slices.remove(first_of(slices, 0))), "`a` has 6 elements, but the shards have 0"),
    (changed_slices(lambda slices: slices.append([0, 0, 6])), "elements 0 to 5 of `a` are stored twice"),
    (changed_slices(lambda slices: slices.append([0, 8, 1])), "elements 6 to 7 of `a` are missing"),
    (changed_slices(lambda slices: slices.append([0, 6, 1])), "`a` has 6 elements, but the shards have 7"),
    (changed_slices(lambda slices: slices.append([9, 0, 1])), "its manifest is broken: IndexError"),
]


@pytest.mark.parametrize(("damage", "told"), BREAKS, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object, told: str
) -> None:
    _, newest = write(tmp_path, 1, 2)
    damage(newest)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert told in caplog.text
    assert str(newest) in caplog.text


def test_a_checkpoint_of_a_newer_version_is_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    """An older vae_ds would train again what the newer one has trained, and delete its checkpoints."""
    _, newer = write(tmp_path, 1, 2)
    manifest = json.loads((newer / checkpoint.MANIFEST).read_text())
    (newer / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"schema_version": 4}))
    told = r"schema version 4 is of a newer vae_ds; this one reads up to 3; use the newer vae_ds, or another --run-dir$"
    for find in (lambda: checkpoint.newest(tmp_path), lambda: checkpoint.resume(tmp_path, ALONE, {})):
        with pytest.raises(CheckpointError, match=told):
            find()


def test_a_slice_that_the_shard_does_not_have_is_a_clear_error(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    changed_slices(lambda slices: first_of(slices, 0).__setitem__(2, 4) or slices.append([0, 4, 2]))(path)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    with pytest.raises(CheckpointError, match=r"weights/a has 6 elements of torch\.float32; the manifest says 4"):
        dict(checkpoint.load(found)[0].weights)


def test_a_checkpoint_is_read_from_the_page_cache(tmp_path: Path) -> None:
    """What one rank reads is not in its own memory: all ranks of a node share it."""
    size = 16 * 2**20
    state = PhaseState({"a": torch.ones(size), "b": torch.ones(size)}, {key: {} for key in MOMENTS})
    checkpoint_cases.save(tmp_path, partial(checkpoint_cases.part_of, state, ALONE), {"global_step": 1}, ALONE)
    del state
    found = checkpoint.newest(tmp_path)
    assert found is not None
    before = own_memory()
    stored, _ = checkpoint.load(found)
    total, few = 0.0, torch.zeros(4)
    for name, value in stored.weights.items():
        total += float(value.sum())
        stored.copy_to(few, name, "weights", size - 4)
    assert total == 2 * size
    assert few.tolist() == [1.0] * 4
    assert own_memory() - before < 4 * size / 4
    mapped = Path("/proc/self/maps")
    assert str(found.path) in mapped.read_text()
    del value
    stored.close()
    assert str(found.path) not in mapped.read_text()


def own_memory() -> int:
    """The bytes of this process that are no pages of files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def test_only_broken_ones_are_none(tmp_path: Path) -> None:
    no_marker(*write(tmp_path, 1))
    assert checkpoint.newest(tmp_path) is None


def test_steps_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    write(tmp_path, 123_456_789, 99_999_999)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 123_456_789


def test_a_shard_that_breaks_after_the_search_is_a_clear_error(tmp_path: Path) -> None:
    write(tmp_path, 1)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    cut_shard(found.path)
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors: unreadable"):
        dict(checkpoint.load(found)[0].weights)


def test_prune_keeps_the_newest_and_removes_older_broken_ones(tmp_path: Path) -> None:
    paths = write(tmp_path, 1, 2, 3, 4)
    no_marker(paths[1])
    checkpoint.prune(tmp_path, 2, ALONE)
    assert steps_of(tmp_path) == ["step-00000003", "step-00000004"]


def test_prune_deletes_nothing_that_no_whole_one_replaces(tmp_path: Path) -> None:
    paths = write(tmp_path, 1, 2, 3)
    no_marker(paths[2])
    checkpoint.prune(tmp_path, 1, ALONE)
    assert steps_of(tmp_path) == ["step-00000002", "step-00000003"]
    for path in paths[1:2]:
        cut_shard(path)
    checkpoint.prune(tmp_path, 1, ALONE)
    assert steps_of(tmp_path) == ["step-00000002", "step-00000003"]


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    for step, nelbo in ((1, 9.0), (2, 5.0), (3, 7.0), (4, None), (5, 8.0)):
        valid = {} if nelbo is None else {"nelbo": nelbo, "z_gain": nelbo}
        checkpoint_cases.save(tmp_path, lambda step=step: part_of(step), {"global_step": step, "valid": valid}, ALONE)
    checkpoint.prune(tmp_path, 1, ALONE, "nelbo")
    assert steps_of(tmp_path) == ["step-00000002", "step-00000005"]
    checkpoint.prune(tmp_path, 1, ALONE, "z_gain")
    assert steps_of(tmp_path) == ["step-00000005"]


class Told:
    """A monitor that remembers what it was told of checkpoints."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def checkpoint(self, step: int, **values: float) -> None:
        self.rows.append({"step": step, **values})


def test_the_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that takes its time: `begin` returns at once, the marker comes with `finish`, not before."""
    slow, write_shard = threading.Event(), shards.write

    def write_when_told(*arguments: Any) -> dict[str, Any]:
        assert slow.wait(60)
        return write_shard(*arguments)

    monkeypatch.setattr(shards, "write", write_when_told)
    told = Told()
    saver = Saver(tmp_path, ALONE, CheckpointConfig(keep=1), told)  # type: ignore[arg-type]
    progress = {"global_step": 1, "window": {"steps": 1}}
    saver.begin(lambda: part_of(1), progress)
    progress["window"] = {}
    assert saver.requests(stop=False) == [0, 0, 0]
    assert checkpoint.newest(tmp_path) is None
    slow.set()
    deadline = time.monotonic() + 60
    while not saver.agreed(saver.requests(stop=False)).written:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert checkpoint.newest(tmp_path) is None
    saver.finish()
    saver.finish()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.manifest["progress"]["window"] == {"steps": 1}, "progress is that of the step it was begun at"
    (row,) = told.rows
    assert row["step"] == 1
    assert row["size_bytes"] == sum(path.stat().st_size for path in found.path.glob("*.safetensors"))
    assert row["write_s"] > 0
    assert row["stall_s"] > 0


def test_a_checkpoint_that_cannot_be_written_is_a_warning_unless_it_must_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(tmp_path, ALONE, CheckpointConfig(keep=1))
    saver.begin(lambda: part_of(1), {"global_step": 1})
    saver.finish(must=True)

    def full(*_: Any) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "write", full)
    saver.begin(lambda: part_of(2), {"global_step": 2})
    with caplog.at_level(logging.WARNING):
        saver.finish()
    assert "No space left on device; the previous checkpoint stays" in caplog.text
    saver.begin(lambda: part_of(3), {"global_step": 3})
    with pytest.raises(StorageError, match="No space left"):
        saver.finish(must=True)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_a_checkpoint_is_due_by_the_clock_of_rank_0_alone(tmp_path: Path) -> None:
    settings = CheckpointConfig(every_minutes=1e-9)
    saver = Saver(tmp_path, ALONE, settings)
    time.sleep(0.01)
    assert saver.agreed(saver.requests(stop=True)) == (True, True, False)
    other = Saver(tmp_path, Ranks(1, 1, 2, torch.device("cpu")), settings)
    time.sleep(0.01)
    assert other.requests(stop=False) == [0, 0, 0]
    assert Saver(tmp_path, ALONE, CheckpointConfig()).requests(stop=False) == [0, 0, 0]


def test_only_rank_0_prunes(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    checkpoint.prune(tmp_path, 1, Ranks(1, 1, 2, torch.device("cpu")))
    assert len(steps_of(tmp_path)) == 3


def test_saving_a_step_again_replaces_the_broken_one(tmp_path: Path) -> None:
    flipped_bit(*write(tmp_path, 5))
    write(tmp_path, 5)
    assert steps_of(tmp_path) == ["step-00000005"]
    assert checkpoint.newest(tmp_path) is not None


def test_what_an_interrupted_save_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (".writing-step-00000002", ".leaving-step-00000000"):
        left = tmp_path / "checkpoints" / name
        left.mkdir()
        (left / "shard-00000.safetensors").write_bytes(b"half")
    write(tmp_path, 2)
    assert steps_of(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_run_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the directory should be")
    with pytest.raises(StorageError, match="rank 0 could not prepare the checkpoint"):
        write(tmp_path, 1)


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for attempt in range(2):
        run_dir = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, checkpoint_endless.__file__, str(run_dir)],
            env=clean_environment(tmp_path),
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 60
            while not (run_dir / "checkpoints" / "step-00000002" / checkpoint.MANIFEST).is_file():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(random.Random(attempt).uniform(0, 0.2))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = checkpoint.newest(run_dir)
        assert found is not None
        assert found.step >= 2
        state, _ = checkpoint.load(found)
        assert state.steps == found.step
        assert all(bool((value == found.step).all()) for value in state.weights.values())
        write(run_dir, found.step + 1)
        assert not [name for name in steps_of(run_dir) if name.startswith(".")]


def test_generators_go_on_where_they_were_through_json() -> None:
    def draw() -> tuple[float, float, float, float, float]:
        return random.random(), random.gauss(), np.random.normal(), float(torch.rand(1)), float(torch.randn(1))

    draw()
    plain = json.loads(json.dumps(generators.capture()))
    expected = [draw() for _ in range(3)]
    draw()
    generators.restore(plain)
    assert [draw() for _ in range(3)] == expected
