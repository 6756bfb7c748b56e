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
# The first compute capability whose hardware supports the type. torch has the same limit for native bf16.
BF16_SINCE, FP16_SINCE = (8, 0), (5, 3)
# If less than this fraction of a GPU's memory is free, another process uses the GPU.
LEAST_FREE = 0.5
PROBE_SIZE = 64


def versions() -> list[Check]:
    """Compare Python and every package with the ranges of setup.py, as recorded by the installation."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    current = platform.python_version()
    try:
        described = importlib.metadata.metadata("vae_ds")
    except importlib.metadata.PackageNotFoundError:
        found = f"{current} at {sys.executable}"
        return [
            Check("python", "ok", found, facts={"python": current}),
            Check("packages", "warn", "vae_ds is not installed, so its requirements are unknown", INSTALL),
        ]
    python = described["Requires-Python"] or ""
    fits = SpecifierSet(python).contains(current, prereleases=True)
    found = f"{current} at {sys.executable}" + ("" if fits else f"; needed: {python}")
    advice = "" if fits else f"create an environment with Python {python}"
    first = Check("python", "ok" if fits else "fail", found, advice, {"python": current})

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
    """Compare the CUDA version that the NVIDIA driver supports with the one that torch is built for."""
    built = torch.version.cuda
    build = f"torch is built for CUDA {built}" if built else "torch is a CPU build"
    version, supported = _driver()
    facts = {"cuda": {"driver": version, "driver_supports": supported, "torch": built}}
    if version is None:
        return Check("driver", "skipped", f"no NVIDIA driver; {build}", facts=facts)
    found = f"{version}, for CUDA up to {supported or 'an unknown version'}; {build}"
    if built is None:
        return Check("driver", "warn", found, "to use GPUs, install a CUDA build of torch", facts)
    # Minor versions of one CUDA major version are compatible.
    if supported and int(supported.split(".")[0]) < int(built.split(".")[0]):
        return Check("driver", "fail", found, "update the driver, or install a torch built for an older CUDA", facts)
    return Check("driver", "ok", found, facts=facts)


def gpus() -> list[Check]:
    """Check each GPU that torch can use: name, memory, compute capability, 16-bit types, and a matrix product."""
    if torch.cuda.is_available():
        return [_gpu(index) for index in range(torch.cuda.device_count())]
    if torch.version.cuda is None or _driver()[0] is None:
        return [Check("gpus", "skipped", "no GPU that torch can use: runs use the CPU")]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return [Check("gpus", "skipped", "hidden by CUDA_VISIBLE_DEVICES: runs use the CPU")]
    try:
        torch.cuda.init()
        reason = "torch gives no reason"
    except (RuntimeError, AssertionError) as error:
        reason = _first_line(error)
    advice = "see `nvidia-smi`; check the driver, and the --gpus option of the job or the container"
    return [Check("gpus", "fail", f"a driver is installed, but torch finds no GPU: {reason}", advice)]


def collectives() -> Check:
    """The library with which ranks exchange tensors: NCCL on GPUs, otherwise gloo."""
    on_gpu = torch.cuda.is_available()
    name = "NCCL" if on_gpu else "gloo"
    if not dist.is_available() or not (dist.is_nccl_available() if on_gpu else dist.is_gloo_available()):
        return Check("collectives", "fail", f"torch is built without {name}", "install another build of torch")
    if on_gpu:
        name += " " + ".".join(str(part) for part in torch.cuda.nccl.version())
    return Check("collectives", "ok", name, facts={"collectives": name})


def deepspeed() -> list[Check]:
    """Whether DeepSpeed can be imported, and whether async_io can be built.

    async_io is the only DeepSpeed operator that the configurations of vae_ds may build.
    """
    from vae_ds import engine

    try:
        builds = engine.builds_async_io()
    except Exception as error:  # any error is a result of this check
        found = f"{type(error).__name__}: {_first_line(error)}"
        return [Check("deepspeed", "fail", f"cannot be imported: {found}", INSTALL)]
    version, facts = _version("deepspeed"), {"async_io": builds}
    imported = Check("deepspeed", "ok", f"{version} can be imported", facts=facts)
    if builds:
        return [imported, Check("operator: async_io", "ok", "can be built: offloading to NVMe is possible")]
    found = "cannot be built; only offloading to NVMe needs it"
    advice = "to offload to NVMe, install libaio with its header (libaio-dev or libaio-devel) and a compiler"
    return [imported, Check("operator: async_io", "skipped", found, advice)]


def compiler() -> Check:
    """The C++ compiler and ninja, with which torch builds DeepSpeed's operators on first use."""
    # CXX may contain arguments, or a compiler cache in front of the compiler.
    programs = {"compiler": shlex.split(os.environ.get("CXX", "c++")), "ninja": ["ninja"]}
    outputs = {name: output_of(*words, "--version") for name, words in programs.items()}
    missing = [" ".join(programs[name]) for name, (code, _) in outputs.items() if code]
    if missing:
        advice = "to offload to NVMe, install g++ and ninja, and add the environment's bin directory to the PATH"
        return Check("compiler", "warn", f"the PATH has no working {' and no '.join(missing)}", advice)
    return Check("compiler", "ok", f"{outputs['compiler'][1].split(';')[0]}; ninja {outputs['ninja'][1]}")


def built_operators() -> Check:
    """The directory of built operators: whether it is writable, and whether a killed build has left a lock."""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(root or cpp_extension.get_default_build_root())
    # The default root has one more level, a directory for each Python and CUDA version.
    built = list(folder.glob("*" if root else "*/*"))
    holders = {one / "lock": list(_holders(one / "lock")) for one in built if (one / "lock").exists()}
    stale = [str(lock) for lock, processes in holders.items() if not processes]
    if stale:
        found = f"a killed build has left a lock, and every later run waits for it forever: {stale[0]}"
        advice = f"if no other machine builds there now, delete {' and '.join(stale)}"
        return Check("built operators", "fail", found, advice)
    space = disk("built operators", folder, "set TORCH_EXTENSIONS_DIR to another directory", 0)
    if space.state != "ok":
        return Check("built operators", "warn", space.found, space.advice)
    ready = sorted(one.name for one in built if list(one.glob("*.so")))
    parts = [f"{folder}: {', '.join(ready) or 'none yet'}"]
    parts += [f"process {processes[0]} builds {lock.parent.name}" for lock, processes in holders.items()]
    return Check("built operators", "ok", "; ".join(parts), facts={"built_operators": ready})


def _gpu(index: int) -> Check:
    title, name = f"gpu {index}", "unknown"
    try:
        name = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        square = torch.ones(PROBE_SIZE, PROBE_SIZE, device=f"cuda:{index}")
        correct = float((square @ square).sum()) == PROBE_SIZE**3
    except RuntimeError as error:
        advice = "see `nvidia-smi`; install a torch built for this GPU, or select another GPU with CUDA_VISIBLE_DEVICES"
        return Check(title, "fail", f"{name}: {_first_line(error)}", advice)
    capability = torch.cuda.get_device_capability(index)
    kinds = {"bf16": capability >= BF16_SINCE, "fp16": capability >= FP16_SINCE}
    found = f"{name}, {free / GB:.1f} of {total / GB:.1f} GB free, compute capability {capability[0]}.{capability[1]}, "
    found += ", ".join(f"native {kind} {'yes' if has else 'no'}" for kind, has in kinds.items())
    numbers = {"name": name, "free_gb": free / GB, "all_gb": total / GB, "capability": capability}
    facts = {"gpus": {str(index): numbers | kinds}}
    if not correct:
        return Check(
            title, "fail", f"{found}; a matrix product is wrong", "exclude this GPU with CUDA_VISIBLE_DEVICES", facts
        )
    if free < LEAST_FREE * total:
        return Check(title, "warn", found, "another process uses the rest; `nvidia-smi` shows it", facts)
    if not kinds["bf16"]:
        advice = "bf16 is only emulated, so `precision: auto` is fp32; precision=fp16 is possible too (ZeRO 1 to 3)"
        return Check(title, "warn", found, advice, facts)
    return Check(title, "ok", found, facts=facts)


def _driver() -> tuple[str | None, str | None]:
    """The version of the driver and the newest CUDA version that it supports; None where missing or unknown."""
    _, output = output_of("nvidia-smi") if shutil.which("nvidia-smi") else (0, "")
    version = re.search(r"Driver Version: *([\d.]+)", output)
    supported = re.search(r"CUDA Version: *([\d.]+)", output)
    if version is not None:
        return version[1], supported[1] if supported else None
    try:
        kernel = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None, None
    # The first number with dots is the version of the kernel module.
    found = re.search(r"\b\d+\.\d+(?:\.\d+)*\b", kernel)
    return found[0] if found else "of an unknown version", None


def _holders(lock: Path) -> Iterator[int]:
    """Processes of this machine that have the lock open. torch keeps it open during a build."""
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
