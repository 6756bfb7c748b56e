"""Checks of what is installed: Python, packages, driver, GPUs, collectives, DeepSpeed, compiler, built operators."""

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from vae_ds.cluster.checks import GB, Check, disk, output_of

INSTALL = "pip install -c launchers/constraints.txt -e . in a checkout of vae_ds"
SHOWN = ("vae_ds", "torch", "transformers", "deepspeed", "datasets")
# Compute capability from which a GPU has the arithmetic itself.
BF16_SINCE, FP16_SINCE = (8, 0), (5, 3)
# Nearly all of a GPU's memory is free where nobody else uses it.
LEAST_FREE = 0.5
PROBE_SIZE = 64


def versions() -> list[Check]:
    """Python and every package, against the ranges of setup.py as the installation recorded them."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    running = platform.python_version()
    try:
        described = importlib.metadata.metadata("vae_ds")
    except importlib.metadata.PackageNotFoundError:
        found = f"{running} at {sys.executable}"
        return [
            Check("python", "ok", found, facts={"python": running}),
            Check("packages", "warn", "vae_ds itself is not installed, so what it needs is unknown", INSTALL),
        ]
    python = described["Requires-Python"] or ""
    fits = SpecifierSet(python).contains(running, prereleases=True)
    found = f"{running} at {sys.executable}" + ("" if fits else f"; needed is {python}")
    advice = "" if fits else f"make an environment with Python {python}"
    first = Check("python", "ok" if fits else "fail", found, advice, {"python": running})

    needed = [Requirement(line) for line in importlib.metadata.requires("vae_ds") or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    known = {"vae_ds": described["Version"]} | {one.name: _version(one.name) for one in needed}
    wrong = [
        f"{one.name} {known[one.name] or 'is missing'} (needed: {one.specifier or 'any'})"
        for one in needed
        if known[one.name] is None or not one.specifier.contains(str(known[one.name]), prereleases=True)
    ]
    facts = {"packages": known}
    if wrong:
        return [first, Check("packages", "fail", "; ".join(wrong), INSTALL, facts)]
    shown = ", ".join(f"{name} {known[name]}" for name in SHOWN if name in known)
    return [first, Check("packages", "ok", f"{shown}; all {len(needed)} in their ranges", facts=facts)]


def driver() -> Check:
    """The NVIDIA driver, against the CUDA version that torch is built for."""
    built = torch.version.cuda
    builds = f"torch is built for CUDA {built}" if built else "torch is a CPU build"
    version, supported = _driver()
    facts = {"cuda": {"driver": version, "driver_supports": supported, "torch": built}}
    if version is None:
        return Check("driver", "skipped", f"no NVIDIA driver; {builds}", facts=facts)
    found = f"{version}, for CUDA up to {supported or 'an unknown version'}; {builds}"
    if built is None:
        return Check("driver", "warn", found, "for runs on GPUs install a CUDA build of torch", facts)
    # Releases of one major version understand each other.
    if supported and int(supported.split(".")[0]) < int(built.split(".")[0]):
        return Check("driver", "fail", found, "update the driver, or install a torch built for an older CUDA", facts)
    return Check("driver", "ok", found, facts=facts)


def gpus() -> list[Check]:
    """Each GPU that torch sees: name, memory, compute capability, 16-bit types, and a product that it computes."""
    if torch.cuda.is_available():
        return [_gpu(index) for index in range(torch.cuda.device_count())]
    if torch.version.cuda is None or _driver()[0] is None:
        return [Check("gpus", "skipped", "none that torch can use: runs go to the CPU")]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return [Check("gpus", "skipped", "hidden by CUDA_VISIBLE_DEVICES: runs go to the CPU")]
    try:
        torch.cuda.init()
        reason = "torch gives no reason"
    except (RuntimeError, AssertionError) as error:
        reason = _first_line(error)
    advice = "see `nvidia-smi`; the driver, the job's --gpus or the container's --gpus may lack"
    return [Check("gpus", "fail", f"there is a driver, but torch has no GPU: {reason}", advice)]


def collectives() -> Check:
    """The library by which ranks exchange tensors: NCCL for GPUs, else gloo."""
    on_gpu = torch.cuda.is_available()
    name = "NCCL" if on_gpu else "gloo"
    if not dist.is_available() or not (dist.is_nccl_available() if on_gpu else dist.is_gloo_available()):
        return Check("collectives", "fail", f"torch is built without {name}", "install another build of torch")
    if on_gpu:
        name += " " + ".".join(str(part) for part in torch.cuda.nccl.version())
    return Check("collectives", "ok", name, facts={"collectives": name})


def deepspeed() -> list[Check]:
    """Whether DeepSpeed can be imported, and its one operator that our configurations may build."""
    from vae_ds import engine

    try:
        builds = engine.builds_async_io()
    except Exception as error:  # an installation can break in many ways, and each is the answer here
        found = f"{type(error).__name__}: {_first_line(error)}"
        return [Check("deepspeed", "fail", f"cannot be imported: {found}", INSTALL)]
    version, facts = _version("deepspeed"), {"async_io": builds}
    imported = Check("deepspeed", "ok", f"{version} can be imported", facts=facts)
    if builds:
        return [imported, Check("operator: async_io", "ok", "can be built: offloading to NVMe is possible")]
    found = "cannot be built; only offloading to NVMe needs it"
    advice = "for that install libaio with its header (libaio-dev or libaio-devel) and a compiler"
    return [imported, Check("operator: async_io", "skipped", found, advice)]


def compiler() -> Check:
    """A C++ compiler and ninja, by which torch builds DeepSpeed's operators on first use."""
    # CXX may hold arguments, or a compiler cache in front.
    programs = {"compiler": shlex.split(os.environ.get("CXX", "c++")), "ninja": ["ninja"]}
    told = {name: output_of(*words, "--version") for name, words in programs.items()}
    missing = [" ".join(programs[name]) for name, (code, _) in told.items() if code]
    if missing:
        advice = "for offloading to NVMe install g++ and ninja, and put the environment's bin on the PATH"
        return Check("compiler", "warn", f"on the PATH there is no working {' and no '.join(missing)}", advice)
    return Check("compiler", "ok", f"{told['compiler'][1].split(';')[0]}; ninja {told['ninja'][1]}")


def built_operators() -> Check:
    """The folder of built operators: can it be written, and is there a lock that a killed build has left?"""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(root or cpp_extension.get_default_build_root())
    # By default a folder for each Python and CUDA version stands between.
    built = list(folder.glob("*" if root else "*/*"))
    holders = {one / "lock": list(_holders(one / "lock")) for one in built if (one / "lock").exists()}
    stale = [str(lock) for lock, processes in holders.items() if not processes]
    if stale:
        found = f"a build has left a lock, on which every later run waits for ever: {stale[0]}"
        advice = f"unless another machine builds there now, delete {' and '.join(stale)}"
        return Check("built operators", "fail", found, advice)
    space = disk("built operators", folder, "set TORCH_EXTENSIONS_DIR to another folder", 0)
    if space.state != "ok":
        return Check("built operators", "warn", space.found, space.advice)
    ready = sorted(one.name for one in built if list(one.glob("*.so")))
    told = [f"{folder}: {', '.join(ready) or 'none yet'}"]
    told += [f"process {processes[0]} builds {lock.parent.name}" for lock, processes in holders.items()]
    return Check("built operators", "ok", "; ".join(told), facts={"built_operators": ready})


def _gpu(index: int) -> Check:
    title, name = f"gpu {index}", "unknown"
    try:
        name = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        square = torch.ones(PROBE_SIZE, PROBE_SIZE, device=f"cuda:{index}")
        correct = float((square @ square).sum()) == PROBE_SIZE**3
    except RuntimeError as error:
        advice = "see `nvidia-smi`; a torch built for this GPU, or another GPU by CUDA_VISIBLE_DEVICES"
        return Check(title, "fail", f"{name}: {_first_line(error)}", advice)
    capability = torch.cuda.get_device_capability(index)
    kinds = {"bf16": capability >= BF16_SINCE, "fp16": capability >= FP16_SINCE}
    found = f"{name}, {free / GB:.1f} of {total / GB:.1f} GB free, compute capability {capability[0]}.{capability[1]}, "
    found += ", ".join(f"{kind} {'yes' if has else 'no'}" for kind, has in kinds.items())
    numbers = {"name": name, "free_gb": free / GB, "all_gb": total / GB, "capability": capability}
    facts = {"gpus": {str(index): numbers | kinds}}
    if not correct:
        return Check(title, "fail", f"{found}; computes wrongly", "leave it out by CUDA_VISIBLE_DEVICES", facts)
    if free < LEAST_FREE * total:
        return Check(title, "warn", found, "another process holds the rest; `nvidia-smi` names it", facts)
    if not kinds["bf16"]:
        return Check(title, "warn", found, "set precision to fp16 or fp32: bf16 is only emulated", facts)
    return Check(title, "ok", found, facts=facts)


def _driver() -> tuple[str | None, str | None]:
    """The driver's version, and the newest CUDA version that it supports; None where there is none or it is unknown."""
    _, told = output_of("nvidia-smi") if shutil.which("nvidia-smi") else (0, "")
    version = re.search(r"Driver Version: *([\d.]+)", told)
    supported = re.search(r"CUDA Version: *([\d.]+)", told)
    if version is not None:
        return version[1], supported[1] if supported else None
    try:
        kernel = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None, None
    # The first number with dots is the module's own.
    found = re.search(r"\b\d+\.\d+(?:\.\d+)*\b", kernel)
    return found[0] if found else "of an unknown version", None


def _holders(lock: Path) -> Iterator[int]:
    """Processes of this machine that have a file open: torch keeps its lock open while it builds."""
    for process in psutil.process_iter():
        try:
            if any(one.path == str(lock.resolve()) for one in process.open_files()):
                yield process.pid
        except (psutil.Error, OSError):
            continue


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
