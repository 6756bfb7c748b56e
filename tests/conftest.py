"""Settings of all tests, made before torch, transformers or deepspeed is imported: threads, no network, own caches."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

LONGEST = (
    *("test_slurm", "test_faults", "test_launchers", "test_trainer"),
    *("test_wheelhouse", "test_multinode", "test_loading", "test_doctor"),
)

# The ranks of a distributed test share the cores of the machine. More threads than cores only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# A worker that is killed while DeepSpeed compiles leaves a lock, which blocks all users of the same directory.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def pytest_configure(config: pytest.Config) -> None:
    """Select DeepSpeed's accelerator, and use a separate cache: a user's cache must not make a test pass."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    if "VAE_DS_CACHE" not in os.environ:
        folder = tempfile.mkdtemp(prefix="vae_ds_cache_")
        os.environ["VAE_DS_CACHE"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU without one. Run the longest files first, so that all workers end at about the same time.

    test_engine is the last of all. It needs an operator that CI builds at the same time, on cores that are idle.
    """
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))
    place = {name: number for number, name in enumerate(LONGEST)} | {"test_engine": len(LONGEST) + 1}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    from support.processes import small_disk_at

    with small_disk_at(tmp_path / "disk", "6m") as place:
        yield place
