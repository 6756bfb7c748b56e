"""The installed files to read documentation from: those of the standard library and of this package's dependencies.

Nothing is imported. Files of distributions are found by their metadata, the standard library by `sysconfig`.
"""

import importlib.metadata
import platform
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

# The packages to start from; their requirements (pandas, sympy, networkx, ...) are followed. Do not extend this list
# when vae_ds gets another dependency: that would change the text, and every number measured on it.
DECLARED = (
    "torch", "transformers", "deepspeed", "datasets", "numpy", "tensorboard", "sentencepiece", "safetensors",
    "pydantic", "PyYAML", "rich", "tqdm",
)  # fmt: skip

# Tests contain little English, and vendored copies repeat other packages.
_LEFT_OUT = re.compile(
    r"(?:^|/)(?:tests?|testing|idle_test|_vendor|vendored?|_vendored_packages|third_party|externals"
    r"|site-packages|lib2to3|__pycache__|node_modules)/|(?:^|/)(?:test_[^/]*|[^/]*_test|conftest)\.py$"
)
HEADERS = frozenset({".h", ".hpp", ".cuh"})
SUFFIXES = frozenset({".py", ".pyi", ".rst", ".md"}) | HEADERS


@dataclass(frozen=True)
class Source:
    """A package: its name, its version, and its sorted files with text."""

    name: str
    version: str
    files: tuple[Path, ...]


def installed_sources() -> list[Source]:
    """The standard library and each installed dependency, sorted by name, without their tests."""
    return [_standard_library(), *(_distribution(name) for name in sorted(distributions()))]


def versions() -> dict[str, str]:
    """Version of each package. The extracted text depends on these versions; reading them lists no files."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in distributions()}


def distributions(roots: tuple[str, ...] = DECLARED) -> list[str]:
    """Sorted, normalised names of the installed distributions among `roots` and all of their requirements."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += _needed(requires)
    return sorted(found)


def _needed(requires: list[str]) -> list[str]:
    names = []
    for text in requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            names.append(requirement.name)
    return names


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _distribution(name: str) -> Source:
    found = importlib.metadata.distribution(name)
    inside = [entry for entry in found.files or [] if _wanted(entry.as_posix())]
    files = sorted(Path(str(found.locate_file(entry))) for entry in inside)
    metadata = [Path(str(found.locate_file(entry))) for entry in found.files or [] if entry.name == "METADATA"]
    return Source(name, found.version, tuple(files + metadata))


def _standard_library() -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if _wanted(path.relative_to(root).as_posix()))
    return Source("python", platform.python_version(), tuple(files))


def _wanted(path: str) -> bool:
    return Path(path).suffix in SUFFIXES and ".." not in path and not _LEFT_OUT.search(path)
