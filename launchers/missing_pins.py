"""Print the pins that an existing environment still needs: `missing_pins.py REPOSITORY`.

Installed packages within the ranges of setup.py keep their versions, so their pins are omitted.
"""

import ast
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def declared(repository: Path) -> list[str]:
    """install_requires of setup.py, read without running the file."""
    tree = ast.parse((repository / "setup.py").read_text(encoding="utf-8"))
    keywords = {node.arg: node.value for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    needs: list[str] = ast.literal_eval(keywords["install_requires"])
    return needs


def missing_pins(repository: Path) -> list[str]:
    """The lines of launchers/constraints.txt whose package is not installed, or is outside its range in setup.py."""
    ranges = {canonicalize_name(need.name): need.specifier for need in map(Requirement, declared(repository))}
    installed = {canonicalize_name(item.name): item.version for item in metadata.distributions()}
    needed = []
    for line in (repository / "launchers" / "constraints.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name = canonicalize_name(Requirement(text).name)
        satisfied = name in installed and (
            name not in ranges or ranges[name].contains(installed[name], prereleases=True)
        )
        if not satisfied:
            needed.append(text)
    return needed


if __name__ == "__main__":
    print("\n".join(missing_pins(Path(sys.argv[1]))))
