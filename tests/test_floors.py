"""The house's floors: imports go strictly down, one room opens the door to DeepSpeed, no room grows too large."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "vae_ds"
LONGEST_ROOM = 400
DEEPSPEED_ROOM = "engine"
# A new room gets its floor here: above every room that it imports.
FLOORS = (
    {"errors", "schedules", "gaussian", "stop", "exits", "machine", "processes", "verdict", "paper"},
    {"hub", "yaml_tree", "vocabulary", "tables", "settings", "slurm"},
    {"config", "runtime", "ds_keys", "generators"},
    {
        "injection",
        "corpora",
        "phases",
        "tokens",
        "records",
        "bases",
        "denoising",
        "ds_config",
        "masters",
        "nvme",
        "watch",
        "checks",
    },
    {"aggressive", "model", "batches", "monitor", "basemodel", "modelcard", "allreduce", "figures", "runs"},
    {"engine", "generate"},
    {"checkpoint", "evaluate", "installation", "feed"},
    {"saver", "preparation", "pretrain_job", "text_metrics"},
    {"trainer", "jobs"},
    {"pretrain", "study", "report", "plan", "doctor", "bench", "submit"},
    {"__init__", "commands"},
    {"arguments"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def rooms() -> dict[str, list[Path]]:
    """Each room's files; a folder is one room, whose files may import each other."""
    found: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(file)
    return found


def imported(source: str) -> set[str]:
    """Dotted names of everything a file imports, at the top, inside a function, or by `import_module`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide their floor"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def faults(room: str, source: str) -> list[str]:
    """What a room's source imports that it may not."""
    found = []
    for name in sorted(imported(source)):
        package, _, rest = name.partition(".")
        if package == "deepspeed" and room != DEEPSPEED_ROOM:
            found.append(f"{room} imports {name}; only {DEEPSPEED_ROOM} may")
        if package != "vae_ds":
            continue
        other = rest.partition(".")[0] or "__init__"
        # `from vae_ds import name` is a room, or something of the package's front door.
        other = other if other in FLOOR else "__init__"
        if other != room and FLOOR[other] >= FLOOR[room]:
            found.append(f"{room} (floor {FLOOR[room]}) imports {name} (floor {FLOOR[other]})")
    return found


def test_every_room_has_a_floor() -> None:
    assert set(rooms()) <= set(FLOOR)


@pytest.mark.parametrize("room", sorted(set(rooms()) & set(FLOOR)))
def test_imports_go_strictly_down(room: str) -> None:
    assert [fault for file in rooms()[room] for fault in faults(room, file.read_text(encoding="utf-8"))] == []


def test_the_engine_room_is_the_door_to_deepspeed() -> None:
    """The rule would hold in an empty house, too."""
    assert any("deepspeed" in imported(file.read_text(encoding="utf-8")) for file in rooms()[DEEPSPEED_ROOM])


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("gaussian", "import deepspeed"),
        ("trainer", "def run():\n    from deepspeed.utils import safe_get_full_fp32_param"),
        ("trainer", "import importlib\nimportlib.import_module('deepspeed')"),
        ("gaussian", "from vae_ds import schedules"),
        ("model", "from vae_ds.trainer import train"),
        ("model", "def late():\n    import vae_ds.cli"),
        ("evaluate", "from vae_ds import train"),
        ("injection", "from vae_ds.corpora.prose import sentences"),
    ],
)
def test_a_breach_is_seen(room: str, source: str) -> None:
    assert len(faults(room, source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("engine", "import deepspeed"),
        ("model", "from vae_ds import gaussian, injection\nfrom vae_ds.config import ModelConfig"),
        ("corpora", "from vae_ds.corpora.prose import sentences"),
    ],
)
def test_what_is_allowed_is_allowed(room: str, source: str) -> None:
    assert faults(room, source) == []


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_room_grows_too_large(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_ROOM, f"{file.name} has {lines} lines; a room past {LONGEST_ROOM} wants to be two"
