"""Offloading to NVMe: checks of the directory for swap files, the swap directories themselves, and their removal.

DeepSpeed's I/O ignores errors: if the kernel rejects an operation, the file or buffer stays unchanged. This module
therefore tests for possible errors, or excludes them, before DeepSpeed starts. `phase_engine` passes in DeepSpeed's
objects.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vae_ds import distributed
from vae_ds.distributed import Ranks
from vae_ds.errors import ConfigError

AUTO = "auto"
VARIABLE = "VAE_DS_NVME"
PREFIX = "vae_ds-swap-"
# DeepSpeed rounds sizes of reads and writes up to this. It keeps partitions below 1 MiB in host memory.
BLOCK_BYTES = 1024
# A swap directory is locked right after its creation. A younger directory may not be locked yet.
YOUNG_S = 30.0

MISALIGNED = "else DeepSpeed reads to addresses that direct I/O may reject, without an error"
# For each section with device nvme: required values of dotted settings of `zero_optimization`, with the reason.
RULES: dict[str, dict[str, tuple[Any, str]]] = {
    "offload_optimizer": {
        "sub_group_size": (1, f"one group for each parameter; {MISALIGNED}"),
        "offload_optimizer.fast_init": (False, MISALIGNED),
    },
    "offload_param": {
        "offload_param.max_in_cpu": (0, MISALIGNED),
        "stage3_prefetch_bucket_size": (0, "DeepSpeed's prefetching requests a weight twice and fails"),
        "stage3_max_reuse_distance": (0, "a weight that waits for its next use occupies one of few buffers"),
    },
}


def sections(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The offload sections of a ds_config with device nvme, by name."""
    zero = tree.get("zero_optimization")
    found = {name: zero.get(name) for name in RULES} if isinstance(zero, dict) else {}
    return {name: one for name, one in found.items() if isinstance(one, dict) and one.get("device") == "nvme"}


def settle(tree: dict[str, Any], source: str) -> None:
    """Fill in the path and the settings that NVMe needs, if they are "auto" or missing, and test the path.

    Raises ConfigError with the key if the path does not exist, is not writable or does not support direct I/O, if the
    stage is not 3, or if a setting has a value that DeepSpeed does not work with.
    """
    for name, section in sections(tree).items():
        zero, key = tree["zero_optimization"], f"{source}: `zero_optimization.{name}"
        if zero.get("stage") != 3:
            raise ConfigError(f"{key}.device`: nvme needs stage 3; found stage {zero.get('stage')}; or use cpu")
        for dotted, (value, reason) in RULES[name].items():
            node = zero if "." not in dotted else section
            last = dotted.split(".")[-1]
            if node.get(last, AUTO) not in (AUTO, value):
                raise ConfigError(
                    f"{source}: `zero_optimization.{dotted}` must be {str(value).lower()} with nvme ({reason}); "
                    f'found {node[last]!r}; write "auto" or remove the key'
                )
            node[last] = value
        stated = section.get("nvme_path")
        where, advice = f"{key}.nvme_path`", f'write "auto" there, and set {VARIABLE} to a folder on this node\'s NVMe'
        if stated in (None, AUTO):
            variable = next((one for one in (VARIABLE, "TMPDIR") if os.environ.get(one)), None)
            stated = os.environ[variable] if variable else "/tmp"
            where, advice = f"${variable}" if variable else where, advice.partition("and ")[2]
        if (fault := _fault_of(Path(str(stated)))) is not None:
            raise ConfigError(f"{where}: {stated}: {fault}; {advice}")
        section["nvme_path"] = str(Path(str(stated)).absolute())


def owned(tree: Mapping[str, Any], parameters: Iterable[nn.Parameter] = (), world: int = 1) -> dict[str, int]:
    """Settings that depend on the model, by dotted key: the buffer size in elements, that of the largest partition.

    Raises ConfigError if the file sets a smaller size.
    """
    section = sections(tree).get("offload_param")
    if section is None:
        return {}
    largest = max([1, *(_share(p, world) for p in parameters)])
    key, stated = "zero_optimization.offload_param.buffer_size", section.get("buffer_size", AUTO)
    if stated == AUTO:
        return {key: largest}
    if isinstance(stated, int | float) and stated < largest:
        raise ConfigError(f'`{key}`: found {stated}, but a parameter has {largest} elements per rank; write "auto"')
    return {key: stated}


def claim(tree: dict[str, Any], parameters: Iterable[nn.Parameter], ranks: Ranks, element_bytes: int) -> "SwapFolders":
    """Create this rank's own directories for swap files, and set their paths in `tree`. A collective.

    `element_bytes` is the size of a weight in the forward pass. Raises ConfigError on every rank if one rank does not
    have enough disk space, or may not lock enough memory.
    """
    found = sections(tree)
    if not found:
        return SwapFolders(tree)
    for parent in {section["nvme_path"] for section in found.values()}:
        _sweep(Path(parent))
    # All ranks sweep before any rank measures the free space, and all measure it before any rank writes.
    hosts = distributed.gather_objects(socket.gethostname())
    needs = _needs(found, list(parameters), ranks.world, element_bytes)
    fault = _shortage(found, needs, hosts.count(socket.gethostname()))
    folders = None
    if fault is None:
        try:
            folders = SwapFolders(tree)
        except OSError as error:
            fault = f"{error.filename}: not writable ({error.strerror})"
    faults = [one for one in distributed.gather_objects(fault) if one is not None]
    if folders is None or faults:
        if folders is not None:
            folders.close()
        raise ConfigError(faults[0])
    return folders


class SwapFolders:
    """This rank's own directories for swap files, inside the paths of a ds_config. Sets their paths in the ds_config.

    All runs of DeepSpeed on a machine use the same file names below a path. Each directory is locked as long as its
    process runs, so an unlocked directory was left behind by a killed rank.
    """

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._held: list[tuple[Path, int]] = []
        made: dict[str, str] = {}
        for section in sections(tree).values():
            parent = section["nvme_path"]
            if parent not in made:
                made[parent] = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
                handle = os.open(made[parent], os.O_RDONLY)
                self._held.append((Path(made[parent]), handle))
                with contextlib.suppress(OSError):  # a file system without locks: `_sweep` deletes nothing there either
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            section["nvme_path"] = made[parent]

    def close(self) -> None:
        """Delete the directories. A second call does nothing."""
        while self._held:
            path, handle = self._held.pop()
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)


def quiet(wrapper: Any, parameters: Iterable[Any]) -> list[Any]:
    """Wait until all I/O is done. Returns the argument for `free`. `wrapper` is DeepSpeed's optimizer."""
    if (swapper := getattr(wrapper, "optimizer_swapper", None)) is not None:
        swapper.flush_gradients()
    swappers = list({found for p in parameters if (found := getattr(p, "nvme_swapper", None)) is not None})
    for one in swappers:
        one.synchronize_reads()
        one.synchronize_writes()
    return swappers


def free(swappers: Iterable[Any]) -> None:
    """Free the memory that DeepSpeed keeps locked until the process ends. No weight may be used afterwards."""
    for one in swappers:
        for buffer in (one.buffers, one.partitioned_swap_buffer):
            if buffer is not None:
                one.aio_read_handle.free_cpu_locked_tensor(buffer)


@dataclass(frozen=True)
class _Needs:
    """Bytes that one rank needs: the size of its files, by section, and of its permanently locked memory."""

    files: dict[str, int]
    locked: int


def _needs(
    found: Mapping[str, dict[str, Any]], parameters: Sequence[nn.Parameter], world: int, element_bytes: int
) -> _Needs:
    largest = max(parameters, key=lambda p: p.numel())
    files, locked = {}, 0
    if "offload_optimizer" in found:
        # The master, two moments and the gradient, in float32.
        files["offload_optimizer"] = sum(16 * _share(p, world) for p in parameters if p.requires_grad)
        locked += found["offload_optimizer"].get("buffer_count", 4) * 4 * _share(largest, world)
    if "offload_param" in found:
        files["offload_param"] = sum(element_bytes * _share(p, world) for p in parameters)
        # The buffers, and one buffer of a whole parameter that writes the updated weights.
        buffers = found["offload_param"].get("buffer_count", 5) * found["offload_param"]["buffer_size"]
        locked += element_bytes * (buffers + largest.numel())
    return _Needs(files, locked)


def _shortage(found: Mapping[str, dict[str, Any]], needs: _Needs, local_ranks: int) -> str | None:
    """A message if a drive has too little space or too little memory may be locked, else None."""
    for path in {section["nvme_path"] for section in found.values()}:
        size = local_ranks * sum(needs.files[name] for name, one in found.items() if one["nvme_path"] == path)
        free = shutil.disk_usage(path).free
        if free < size:
            return (
                f"{path}: {free / 1e9:.2f} GB free, but the ranks of this node need {size / 1e9:.2f} GB there; "
                f"set {VARIABLE} to a larger drive, or use more nodes"
            )
    limit = _lock_limit()
    if limit < needs.locked:
        return (
            f"offloading to NVMe locks {needs.locked / 1e6:.1f} MB of memory per rank, but only {limit / 1e6:.1f} MB "
            "may be locked; raise the limit (`ulimit -l unlimited`; docker: --ulimit memlock=-1), or offload to cpu"
        )
    return None


def _share(parameter: nn.Parameter, world: int) -> int:
    """Elements of a rank's partition, padded as DeepSpeed does."""
    return -(-parameter.numel() // world)


def _fault_of(path: Path) -> str | None:
    """Why a directory cannot contain swap files, or None if it can. Writes one block there as a test."""
    if not path.is_dir():
        return "not a directory" if path.exists() else "no such directory"
    try:
        handle, name = tempfile.mkstemp(prefix=PREFIX, dir=path)
    except OSError as error:
        return f"not writable ({error.strerror})"
    try:
        os.close(handle)
        handle = os.open(name, os.O_WRONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, mmap.PAGESIZE) as page:  # aligned, as direct I/O can require it
                os.write(handle, memoryview(page)[:BLOCK_BYTES])
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return f"its file system does not support direct I/O in blocks of {BLOCK_BYTES} bytes"
        return f"not writable ({error.strerror})"
    finally:
        os.unlink(name)
    return None


def _sweep(parent: Path) -> None:
    """Delete the swap directories of processes that are gone."""
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, a file, in use, or just deleted
            if time.time() - path.stat().st_mtime < YOUNG_S:
                continue
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def _lock_limit() -> float:
    """Bytes that this process may lock, after it raised its limit as far as possible. Infinity without a limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
            soft = hard
    # CAP_IPC_LOCK, bit 14 of the effective capabilities, removes the limit.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    return float("inf") if soft == resource.RLIM_INFINITY or effective >> 14 & 1 else float(soft)
