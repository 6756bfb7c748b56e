"""Checkpoints are written beside the training: a step waits for the copy to host memory, not for the disk.

A thread of each rank writes the rank's shard while the next steps run. The marker is written after every rank has
reported, in the reduction that each step makes anyway, that its shard is on the disk.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from vae_ds import distributed
from vae_ds.config import CheckpointConfig
from vae_ds.distributed import Ranks
from vae_ds.engine import Part
from vae_ds.errors import CheckpointError, StorageError
from vae_ds.training import checkpoint, shards
from vae_ds.training.monitor import Monitor
from vae_ds.training.shards import Stored

_log = logging.getLogger(__name__)


class Requests(NamedTuple):
    """What the ranks agreed on at a step: to stop, to save now, and that all shards of a checkpoint are written."""

    stop: bool
    save: bool
    written: bool


class Saver:
    """Writes a run's checkpoints, one at a time. A rank holds at most one copy of its part of the state.

    A checkpoint that cannot be written (a full disk) is a warning, and the training continues. With `must`, at a stop
    and at the end of a run, it is an error.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, settings: CheckpointConfig, monitor: Monitor | None = None) -> None:
        """`monitor` records each published checkpoint; `newest` is its name. The caller decides when to save."""
        self._run_dir, self._ranks, self._settings, self._monitor = Path(run_dir), ranks, settings, monitor
        self._writer: _Writer | None = None
        self._final = Path()
        self.newest: str | None = None
        self._manifest: dict[str, Any] = {}
        self._began_s = time.monotonic()
        self._copy_s = 0.0

    def requests(self, stop: bool) -> list[float]:
        """This rank's requests as numbers. Their sums over the ranks go to `agreed`."""
        minutes = self._settings.every_minutes
        due = minutes is not None and self._ranks.is_main and time.monotonic() - self._began_s > 60 * minutes
        written = self._writer is not None and not self._writer.is_alive()
        return [float(stop), float(due), float(written)]

    def agreed(self, sums: Sequence[float]) -> Requests:
        """What the sums of all ranks' `requests` mean; the same on every rank."""
        return Requests(sums[0] > 0, sums[1] > 0, sums[2] == self._ranks.world)

    def begin(self, part: Callable[[], Part], progress: dict[str, Any], must: bool = False) -> None:
        """Start the checkpoint of progress["global_step"], after the previous one is finished. A collective.

        `part` copies this rank's part of the state to host memory. `progress` is plain JSON data; rank 0's is stored.
        With `must`, raises StorageError on every rank if one rank fails.
        """
        self.finish()
        self._began_s = time.monotonic()
        try:
            writing, self._final = checkpoint.prepare(self._run_dir, int(progress["global_step"]), self._ranks)
        except CheckpointError as error:
            self._failed(error, must)
            return
        copied = part()
        self._manifest = checkpoint.describe(copied, progress, self._ranks)
        self._writer = _Writer(writing, copied, self._ranks)
        self._writer.start()
        self._copy_s = time.monotonic() - self._began_s

    def finish(self, must: bool = False) -> None:
        """Wait for the checkpoint that `begin` started, publish it, and delete older ones. A collective.

        Does nothing if no checkpoint was started. With `must`, raises StorageError on every rank if one rank failed.
        The previous checkpoint stays in that case.
        """
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        began_s = time.monotonic()
        try:
            entries = checkpoint.together(writer.result, "write")
            manifest = self._manifest | {"shards": entries}
            checkpoint.together(lambda: self._publish(writer.folder, manifest), "publish")
        except CheckpointError as error:
            self._failed(error, must)
            return
        checkpoint.prune(self._run_dir, self._settings.keep, self._ranks, self._settings.keep_best)
        self.newest = self._final.name
        if self._monitor is not None:
            self._monitor.checkpoint(
                int(manifest["progress"]["global_step"]),
                size_bytes=sum(shard["size"] for shard in entries),
                copy_s=self._copy_s,
                stall_s=self._copy_s + time.monotonic() - began_s,
                write_s=writer.duration_s,
            )

    def stored(self, step: int) -> Stored | None:
        """The state in the checkpoint of `step`, if it is the newest one and could be written. A collective."""
        if self.newest != checkpoint.name_of(step):
            return None
        return checkpoint.stored_at(self._run_dir, step, self._ranks)

    def _publish(self, writing: Path, manifest: dict[str, Any]) -> None:
        if self._ranks.is_main:
            checkpoint.publish(writing, self._final, manifest)

    def _failed(self, error: CheckpointError, must: bool) -> None:
        if must:
            raise StorageError(str(error)) from None
        if self._ranks.is_main:
            _log.warning("%s", error)


def write_on_main(target: Path, write: Callable[[], object], ranks: Ranks, must: bool) -> bool:
    """Let rank 0 write `target` by `write`. Returns on every rank whether that was possible. A collective.

    A disk that does not take it is a warning. With `must`, raises StorageError on every rank.
    """
    fault = distributed.first_fault(lambda: write() if ranks.is_main else None, OSError, SafetensorError)
    if fault is not None and must:
        raise StorageError(f"{target}: cannot be written ({fault}); run the same command again to write it")
    if fault is not None and ranks.is_main:
        _log.warning("%s: cannot be written (%s); the training continues", target, fault)
    return fault is None


class _Writer(threading.Thread):
    """The thread that writes one rank's shard."""

    def __init__(self, folder: Path, part: Part, ranks: Ranks) -> None:
        super().__init__(name="checkpoint writer", daemon=True)
        self.folder = folder
        self.duration_s = 0.0
        self._work: Callable[[], dict[str, Any]] | None = lambda: shards.write(folder, part, ranks)
        self._entry: dict[str, Any] = {}
        self._fault: Exception | None = None

    def run(self) -> None:
        assert self._work is not None
        began_s = time.monotonic()
        try:
            self._entry = self._work()
        except Exception as error:  # `result` raises it on the main thread, which reports it to the other ranks
            self._fault = error
        # Frees the copy of the part.
        self._work = None
        self.duration_s = time.monotonic() - began_s

    def result(self) -> dict[str, Any]:
        """Wait for the thread. Returns the manifest's entry of this shard; raises what the writing raised."""
        self.join()
        if self._fault is not None:
            raise self._fault
        return self._entry
