"""DeepSpeed itself: its import, and what it can build on this machine."""

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch


def deepspeed_library() -> ModuleType:
    """Import DeepSpeed (takes seconds), silence its log, and disable the operator that it compiles on first use."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by names that newer releases of torch deprecate, once per parameter.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # DeepSpeed would import MLflow for its autotuner, which nobody starts here: almost half of the time of this import.
    with _hidden("mlflow"):
        import deepspeed
        import deepspeed.ops

    # Gloo does not need this operator, and a killed build leaves a lock on which every later run hangs. Set this before
    # the first access, which would start compilers to find out what can be built.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    library: ModuleType = deepspeed
    return library


def builds_async_io() -> bool:
    """Whether DeepSpeed's operator for NVMe is built or can be built here. Compiles a test program against libaio."""
    deepspeed_library()
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if shutil.which("ninja", path=own) and own not in path.split(os.pathsep):
        # Use the environment's ninja even if the environment is not active: another ninja would rebuild everything.
        os.environ["PATH"] = f"{own}{os.pathsep}{path}"
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import CUDA_HOME

    if installed_ops.get("async_io"):
        return True
    if torch.cuda.is_available() and torch.version.cuda and CUDA_HOME is None:
        return False
    return shutil.which("ninja") is not None and bool(AsyncIOBuilder().is_compatible(verbose=False))


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Let `import module` fail, unless the module is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
