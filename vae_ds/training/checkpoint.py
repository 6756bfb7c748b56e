"""Portable checkpoints: float32 weights and Adam moments in slices, resumable at any world size, stage and precision.

RUN/checkpoints/step-00000123/ holds one shard per rank, with the slices that the rank owns (shards.py), and
`manifest.json`: where the slices belong, sizes and SHA-256 of the shards, the progress, and the random generators of
each rank. The manifest is the marker. It is written last, and a directory without it is not a checkpoint.
"""

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_ds import distributed
from vae_ds.distributed import Ranks
from vae_ds.engine import Part
from vae_ds.errors import CheckpointError
from vae_ds.training import shards
from vae_ds.training.shards import Layout, Stored

SCHEMA_VERSION = 3
READABLE = (1, 2, 3)
MANIFEST = "manifest.json"
FOLDER = "checkpoints"
NAME = re.compile(r"step-(\d{8,})")
# Metrics of a validation by which the best checkpoint can be kept: 1 if higher is better, -1 if lower is.
BETTER = {"nelbo": -1, "rec": -1, "mi": 1, "z_gain": 1}
# Prefixes of directories that are being written or deleted; their contents are not valid.
WRITING, LEAVING = ".writing-", ".leaving-"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its directory, the applied steps of the run before it, its manifest and its layout."""

    path: Path
    step: int
    manifest: dict[str, Any]
    layout: Layout

    def __str__(self) -> str:
        return str(self.path)


class NewerSchemaError(CheckpointError):
    """A checkpoint of a newer vae_ds. No older checkpoint is used instead: the run would lose steps unnoticed."""


def prepare(run_dir: Path, step: int, ranks: Ranks) -> tuple[Path, Path]:
    """The directory to write a checkpoint of `step` into, and its final name. A collective."""
    root = Path(run_dir) / FOLDER
    final = root / name_of(step)
    writing = root / f"{WRITING}{final.name}"
    together(lambda: _clear(root, writing) if ranks.is_main else None, "prepare")
    return writing, final


def name_of(step: int) -> str:
    """The directory name of the checkpoint after `step` applied steps of the run."""
    return f"step-{step:08d}"


def describe(part: Part, progress: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The manifest without the entries of the shards; the generators are captured now. A collective."""
    return {
        "schema_version": SCHEMA_VERSION,
        "world": ranks.world,
        "steps": part.steps,
        "scaler": part.scaler,
        "shapes": part.shapes,
        "frozen": sorted(part.frozen),
        "left_out": part.left_out,
        "progress": copy.deepcopy(progress),
        "generators": distributed.gather_objects(distributed.capture()),
    }


def newest(run_dir: Path, *, verify: bool = True) -> Checkpoint | None:
    """The newest checkpoint whose manifest, sizes and (with `verify`) checksums are right; None if there is none.

    A broken one is skipped with a warning. Raises CheckpointError if one is of a newer vae_ds.
    """
    for path in _directories(Path(run_dir)):
        try:
            found = _open(path)
            if verify:
                shards.check_sums(path, found.manifest["shards"])
            return found
        except CheckpointError as error:
            _skip(error)
    return None


def resume(
    run_dir: Path, ranks: Ranks, data: dict[str, Any], changed_data: bool = False
) -> tuple[Stored, dict[str, Any]] | None:
    """State and progress of the newest checkpoint, as `load` gives them; None if there is none. A collective.

    Each rank verifies the checksums of its share of the shards. A checkpoint that one rank finds broken is broken for
    all. Raises CheckpointError if the training data differ from `data`, unless `changed_data`, or if the checkpoint is
    of a newer vae_ds.
    """
    names = [path.name for path in _directories(Path(run_dir))] if ranks.is_main else []
    for name in distributed.broadcast_object(names):
        try:
            found = _open_together(Path(run_dir) / FOLDER / name, ranks, verify=True)
        except CheckpointError as error:
            _skip(error, tell=ranks.is_main)
            continue
        check_data(found.path, found.manifest["progress"]["data"], data, changed_data)
        return load(found, ranks)
    return None


def stored_at(run_dir: Path, step: int, ranks: Ranks) -> Stored | None:
    """The state in the checkpoint that this run has just written at `step`, unverified. A collective.

    None, with a warning, if one rank cannot find its files, for example because the nodes share no file system.
    """
    try:
        return load(_open_together(Path(run_dir) / FOLDER / name_of(step), ranks, verify=False))[0]
    except CheckpointError as error:
        if ranks.is_main:
            _log.warning("%s; the next phase starts from the weights in memory", error)
        return None


def check_data(path: Path, before: dict[str, Any], now: dict[str, Any], changed_data: bool) -> None:
    """Raise CheckpointError if the facts of the training data differ from those of a checkpoint, unless allowed."""
    if before != now and not changed_data:
        raise CheckpointError(
            f"{path}: the training text has changed since this checkpoint; use another --run-dir, or --changed-data to "
            "resume on the changed text"
        )


def load(checkpoint: Checkpoint, ranks: Ranks | None = None) -> tuple[Stored, dict[str, Any]]:
    """The state, which is read when it is used, and the progress, at any world size.

    With `ranks` of the same world size, the state has this rank's generators. PhaseEngine.load restores them after the
    engine is built, since building draws random numbers.
    """
    manifest = checkpoint.manifest
    kept = manifest["generators"] if ranks is not None and ranks.world == manifest["world"] else None
    generators = kept[ranks.rank] if kept is not None and ranks is not None else None
    stored = Stored(checkpoint.path, checkpoint.layout, int(manifest["steps"]), manifest["scaler"], generators)
    return stored, manifest["progress"]


def prune(run_dir: Path, keep: int, ranks: Ranks, best: str | None = None) -> None:
    """Delete all checkpoints but the newest `keep` complete ones and the best one. Rank 0 deletes.

    Call it while no rank reads a `Stored`: a network file system may not keep a deleted file for its readers.
    `best` is a metric of BETTER; it rates the checkpoints whose progress["valid"] has it. A broken checkpoint is
    deleted only if a complete one is newer.
    """
    if not ranks.is_main:
        return
    found = [(path, _whole(path)) for path in _directories(Path(run_dir))]
    whole = [(path, one) for path, one in found if one is not None]
    kept = {path for path, _ in whole[: max(1, keep)]}
    scores = {path: one["progress"].get("valid", {}).get(best) for path, one in whole}
    rated = [path for path, score in scores.items() if score is not None]
    if best is not None and rated:
        kept.add(max(rated, key=lambda path: BETTER[best] * scores[path]))
    first_whole = next((place for place, (_, one) in enumerate(found) if one is not None), len(found))
    for path, _ in found[first_whole:]:
        if path not in kept:
            _remove(path)


def together(work: Callable[[], Any], verb: str) -> list[Any]:
    """Run `work` on this rank and gather the values. If one rank fails, all raise: none waits for it. A collective."""
    value, fault = None, None
    try:
        value = work()
    except Exception as error:  # gathered below: the other ranks wait for it
        fault = f"{type(error).__name__}: {error}"
    answers = distributed.gather_objects((value, fault))
    for rank, (_, told) in enumerate(answers):
        if told is not None:
            raise CheckpointError(f"rank {rank} could not {verb} the checkpoint: {told}; the previous checkpoint stays")
    return [found for found, _ in answers]


def _clear(root: Path, writing: Path) -> None:
    """Remove leftovers of an interrupted save or prune, and make the directory to write into."""
    root.mkdir(parents=True, exist_ok=True)
    for path in root.iterdir():
        if path.name.startswith((WRITING, LEAVING)):
            shutil.rmtree(path, ignore_errors=True)
    writing.mkdir()


def publish(writing: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Rename the directory, then write the marker, which makes the checkpoint valid. Call it on rank 0 alone."""
    replaced = None
    if final.exists():
        replaced = final.with_name(f"{LEAVING}{final.name}")
        os.replace(final, replaced)
    os.replace(writing, final)
    shards.sync(final.parent)
    unfinished = final / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    shards.sync(unfinished)
    os.replace(unfinished, final / MANIFEST)
    shards.sync(final)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _directories(run_dir: Path) -> Iterator[Path]:
    """Directories that are named like a checkpoint, newest first."""
    root = run_dir / FOLDER
    if not root.is_dir():
        return
    found = [(int(match[1]), path) for path in root.iterdir() if (match := NAME.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        yield path


def _open(path: Path) -> Checkpoint:
    """Read the manifest and check it, also against the sizes. Raises CheckpointError that says what is wrong."""
    manifest = _read_manifest(path)
    match = NAME.fullmatch(path.name)
    return Checkpoint(path, int(match[1]) if match else 0, manifest, shards.read_layout(path, manifest))


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose shards are there with their sizes. Raises CheckpointError."""
    marker = path / MANIFEST
    try:
        manifest = json.loads(marker.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: incomplete, {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{marker}: unreadable: {error}") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"{marker}: schema version {version} is of a newer vae_ds; this one reads up to {SCHEMA_VERSION}; use the "
            "newer vae_ds, or another --run-dir"
        )
    if version not in READABLE:
        raise CheckpointError(
            f"{marker}: schema version {version!r}; this vae_ds reads {READABLE[0]} to {READABLE[-1]}"
        )
    if not isinstance(manifest.get("shards"), list):
        raise CheckpointError(f"{marker}: it lists no shards")
    shards.check_sizes(path, manifest)
    return dict(manifest)


def _open_together(path: Path, ranks: Ranks, verify: bool) -> Checkpoint:
    """Open a checkpoint by the manifest that rank 0 reads. Every rank must find the files. A collective.

    With `verify`, each rank verifies the checksums of its share of them. Raises the same CheckpointError on every rank.
    """
    found: Checkpoint | CheckpointError | None = None
    if ranks.is_main:
        try:
            found = _open(path)
        except CheckpointError as error:
            found = error
    found = distributed.broadcast_object(found)
    if not isinstance(found, Checkpoint):
        assert found is not None
        raise found
    fault = None
    try:
        shards.check_sizes(path, found.manifest)
        if verify:
            shards.check_sums(path, found.manifest["shards"][ranks.rank :: ranks.world])
    except CheckpointError as error:
        fault = error
    for told in distributed.gather_objects(fault):
        if told is not None:
            raise told
    return found


def _skip(error: CheckpointError, tell: bool = True) -> None:
    """Go on with the checkpoint before a broken one."""
    if isinstance(error, NewerSchemaError):
        raise error
    if tell:
        _log.warning("%s; using the previous checkpoint", error)


def _whole(path: Path) -> dict[str, Any] | None:
    try:
        return _read_manifest(path)
    except CheckpointError:
        return None


def _remove(path: Path) -> None:
    """Delete a checkpoint. It is renamed first: a partly deleted directory must not look like a checkpoint."""
    leaving = path.with_name(f"{LEAVING}{path.name}")
    try:
        os.replace(path, leaving)
        shutil.rmtree(leaving)
    except OSError as error:
        _log.warning("%s: cannot be deleted: %s", path, error)
