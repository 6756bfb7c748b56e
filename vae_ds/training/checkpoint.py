"""Portable checkpoints: whole float32 weights and Adam moments, resumable at any world size, stage and precision.

RUN/checkpoints/step-00000123/ holds one safetensors shard per rank (parameter i in shard i mod world, with the keys
`weights/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`) and `manifest.json`: sizes and SHA-256 of the shards, the progress,
and the random generators of each rank. The manifest is the marker. It is written last, and a directory without it is
not a checkpoint.
"""

import copy
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vae_ds import distributed
from vae_ds.distributed import Ranks
from vae_ds.engine import MOMENTS, PhaseState
from vae_ds.errors import CheckpointError

SCHEMA_VERSION = 1
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
    """A complete checkpoint: its directory, the applied steps of the run before it, and its manifest."""

    path: Path
    step: int
    manifest: dict[str, Any]

    def __str__(self) -> str:
        return str(self.path)


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


def describe(state: PhaseState, progress: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The manifest without the entries of the shards; the generators are captured now. A collective."""
    return {
        "schema_version": SCHEMA_VERSION,
        "world": ranks.world,
        "steps": state.steps,
        "scaler": state.scaler,
        "names": list(state.names or state.weights),
        "progress": copy.deepcopy(progress),
        "generators": distributed.gather_objects(distributed.capture()),
    }


def newest(run_dir: Path, *, verify: bool = True) -> Checkpoint | None:
    """The newest checkpoint whose manifest, sizes and (with `verify`) checksums are right; None if there is none.

    A broken one is skipped with a warning.
    """
    for path in _directories(Path(run_dir)):
        try:
            return _open(path, verify)
        except CheckpointError as error:
            _log.warning("%s; using the previous checkpoint", error)
    return None


def resume(
    run_dir: Path, ranks: Ranks, data: dict[str, Any], changed_data: bool = False
) -> tuple[PhaseState, dict[str, Any]] | None:
    """State and progress of the newest checkpoint, as `load` gives them; None if there is none. A collective.

    Rank 0 searches, so that the shards are read only once for their checksums. Raises CheckpointError if the training
    data differ from `data`, unless `changed_data`.
    """
    found = newest(run_dir) if ranks.is_main else None
    path = distributed.broadcast_object(None if found is None else str(found.path))
    if path is None:
        return None
    state, progress = load(found or _open(Path(path), verify=False), ranks)
    check_data(Path(path), progress["data"], data, changed_data)
    return state, progress


def check_data(path: Path, before: dict[str, Any], now: dict[str, Any], changed_data: bool) -> None:
    """Raise CheckpointError if the facts of the training data differ from those of a checkpoint, unless allowed."""
    if before != now and not changed_data:
        raise CheckpointError(
            f"{path}: the training text has changed since this checkpoint; use another --run-dir, or --changed-data to "
            "resume on the changed text"
        )


def load(checkpoint: Checkpoint, ranks: Ranks | None = None) -> tuple[PhaseState, dict[str, Any]]:
    """The whole state and the progress, at any world size.

    With `ranks` of the same world size, the state has this rank's generators. PhaseEngine.load restores them after the
    engine is built, since building draws random numbers.
    Raises CheckpointError if a shard cannot be read or a tensor is missing.
    """
    manifest = checkpoint.manifest
    kept = manifest["generators"] if ranks is not None and ranks.world == manifest["world"] else None
    state = PhaseState(
        weights={},
        moments={key: {} for key in MOMENTS},
        steps=int(manifest["steps"]),
        scaler=manifest["scaler"],
        names=tuple(manifest["names"]),
        generators=kept[ranks.rank] if kept is not None and ranks is not None else None,
    )
    tensors: dict[str, torch.Tensor] = {}
    for shard in manifest["shards"]:
        tensors.update(_read_shard(checkpoint.path / shard["file"]))
    for name in state.names:
        if f"weights/{name}" not in tensors:
            raise CheckpointError(f"{checkpoint}: the weight `{name}` is missing")
        state.weights[name] = tensors[f"weights/{name}"]
        for key in MOMENTS:
            if f"{key}/{name}" in tensors:
                state.moments[key][name] = tensors[f"{key}/{name}"]
    return state, manifest["progress"]


def prune(run_dir: Path, keep: int, ranks: Ranks, best: str | None = None) -> None:
    """Delete all checkpoints but the newest `keep` complete ones and the best one. Rank 0 deletes.

    `best` is a metric of BETTER; it rates the checkpoints whose progress["valid"] has it. A broken checkpoint is
    deleted only if a complete one is newer.
    """
    if not ranks.is_main:
        return
    found = [(path, _whole(path)) for path in _directories(Path(run_dir))]
    whole = [one for _, one in found if one is not None]
    kept = {one.path for one in whole[: max(1, keep)]}
    scores = {one.path: one.manifest["progress"].get("valid", {}).get(best) for one in whole}
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


def write_shard(folder: Path, state: PhaseState, ranks: Ranks) -> dict[str, Any]:
    """Write this rank's share of the tensors. Returns the manifest's entry."""
    mine = (state.names or tuple(state.weights))[ranks.rank :: ranks.world]
    tensors = {f"weights/{name}": state.weights[name] for name in mine}
    for key in MOMENTS:
        tensors.update({f"{key}/{name}": state.moments[key][name] for name in mine if name in state.moments[key]})
    path = folder / f"shard-{ranks.rank:05d}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    _sync(path)
    return {"file": path.name, "size": path.stat().st_size, "sha256": _sha256(path)}


def publish(writing: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Rename the directory, then write the marker, which makes the checkpoint valid. Call it on rank 0 alone."""
    replaced = None
    if final.exists():
        replaced = final.with_name(f"{LEAVING}{final.name}")
        os.replace(final, replaced)
    os.replace(writing, final)
    _sync(final.parent)
    unfinished = final / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    _sync(unfinished)
    os.replace(unfinished, final / MANIFEST)
    _sync(final)
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


def _open(path: Path, verify: bool) -> Checkpoint:
    """Read the manifest and check the shards against it. Raises CheckpointError that says what is wrong."""
    marker = path / MANIFEST
    try:
        manifest = json.loads(marker.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: incomplete, {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{marker}: unreadable: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{marker}: schema version {found!r}; this vae_ds reads {SCHEMA_VERSION}")
    if not isinstance(manifest.get("shards"), list):
        raise CheckpointError(f"{marker}: it lists no shards")
    for shard in manifest["shards"]:
        file = path / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["size"]:
            raise CheckpointError(f"{file}: {'missing' if size is None else f'{size} bytes'}, not {shard['size']}")
        if verify and _sha256(file) != shard["sha256"]:
            raise CheckpointError(f"{file}: its checksum differs from the manifest's")
    match = NAME.fullmatch(path.name)
    return Checkpoint(path, int(match[1]) if match else 0, manifest)


def _whole(path: Path) -> Checkpoint | None:
    try:
        return _open(path, verify=False)
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


def _read_shard(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk before anything refers to it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
