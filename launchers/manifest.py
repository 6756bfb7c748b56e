"""The manifest of a wheelhouse: `manifest.py write DIR ...` writes DIR/manifest.json, `check DIR` checks the files.

Needs only Python 3.11 or newer, because it runs before the installation.
"""

import argparse
import hashlib
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NAME = "manifest.json"
# The same directory may also contain a virtual environment, which is not listed.
PARTS = ("wheels", "base", "corpus", "cache", "launchers", "recipe.yaml", "offline.sh")
FORMAT = 1


def listed(here: Path) -> dict[str, dict[str, Any]]:
    """The size in bytes and the SHA-256 of every file of the wheelhouse, by path."""
    files = [file for part in PARTS for file in [here / part, *sorted((here / part).rglob("*"))] if file.is_file()]
    return {str(file.relative_to(here)): {"bytes": file.stat().st_size, "sha256": digest(file)} for file in files}


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write(here: Path, python: str, platform: str, recipe: str, settings: list[str]) -> None:
    """Write the manifest. `settings` select the base and the text of the recipe; {here} stands for the directory."""
    files = listed(here)
    wheels = [Path(name).name.split("-") for name in files if name.startswith("wheels/")]
    manifest = {
        "format": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": python,
        "platform": platform,
        "recipe": recipe or None,
        "settings": settings,
        "packages": {parts[0]: parts[1] for parts in sorted(wheels)},
        "bytes": sum(one["bytes"] for one in files.values()),
        "files": files,
    }
    partial = here / f"{NAME}.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    partial.replace(here / NAME)


def read(here: Path) -> dict[str, Any]:
    """Read the manifest. Exits with one line if it is missing or unreadable."""
    try:
        manifest: dict[str, Any] = json.loads((here / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        sys.exit(f"error: {here}: no {NAME}; the wheelhouse is incomplete. Make it again with launchers/wheelhouse.sh")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {here / NAME}: cannot be read ({error}); copy it again")
    return manifest


def check(here: Path, installed: bool) -> None:
    """Compare the files with the manifest. Exits with one line at the first difference.

    After the installation (`installed`) the wheels are not needed and not checked.
    """
    for name, expected in read(here)["files"].items():
        file = here / name
        if installed and name.startswith("wheels/"):
            continue
        if not file.is_file():
            sys.exit(f"error: {file}: missing; copy the wheelhouse again")
        size = file.stat().st_size
        if size != expected["bytes"]:
            sys.exit(f"error: {file}: has {size} bytes instead of {expected['bytes']}; copy the wheelhouse again")
        if digest(file) != expected["sha256"]:
            sys.exit(f"error: {file}: its content has changed; copy the wheelhouse again")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write, check or print the manifest of a wheelhouse.")
    parser.add_argument("action", choices=("write", "check", "python", "recipe", "settings"))
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--python", default="")
    parser.add_argument("--platform", default="")
    parser.add_argument("--recipe", default="")
    parser.add_argument("--setting", action="append", default=[])
    parser.add_argument("--installed", action="store_true")
    given = parser.parse_args()
    here = given.directory.resolve()
    if given.action == "write":
        write(here, given.python, given.platform, given.recipe, given.setting)
    elif given.action == "check":
        check(here, given.installed)
    elif given.action == "settings":
        print("\n".join(setting.replace("{here}", str(here)) for setting in read(here)["settings"]))
    else:
        print(read(here)[given.action] or "")


if __name__ == "__main__":
    main()
