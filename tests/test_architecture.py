"""The package's layers: imports between wings go strictly down and take public names, one wing imports DeepSpeed."""

import ast
from pathlib import Path

import pytest

from support import ROOT

PACKAGE = ROOT / "vae_ds"
LONGEST_FILE = 400
DEEPSPEED_WING = "engine"
# From the lowest layer up. Wings of one layer do not import each other.
LAYERS = (
    {"errors"},
    {"config", "runtime"},
    {"distributed"},
    {"engine", "data", "model"},
    {"latents", "cluster", "sharing"},
    {"evaluation"},
    {"training", "textvae"},
    {"studies", "pretraining", "authoring", "inspection"},
    {"bench"},
    {"cli"},
)
LAYER = {wing: number for number, wings in enumerate(LAYERS) for wing in wings}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str) -> set[tuple[str, str]]:
    """Every (module, name) that a file imports, anywhere in it; the name is empty for `import module`."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the wing"
            found |= {(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {(arg.value, "") for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def public_names(wing: str) -> set[str]:
    """`__all__` of a wing, read from its source."""
    file = PACKAGE / wing / "__init__.py"
    if not file.is_file():
        return {node.name for node in ast.parse((PACKAGE / f"{wing}.py").read_text()).body if hasattr(node, "name")}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{wing} has no __all__")


def used_names(source: str) -> set[tuple[str, str]]:
    """Every (wing, name) that a file takes as an attribute of a wing: `from vae_ds import engine`, `engine.resolve`."""
    tree = ast.parse(source)
    aliases = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "vae_ds"
        for alias in node.names
    }
    return {
        (aliases[node.value.id], node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
    }


def breaches(module: str, source: str) -> list[str]:
    """What a module imports that it must not."""
    wing = module.split(".")[1]
    found = []
    names = used_names(source)
    for target, name in sorted(imports(source)):
        package, *rest = target.split(".")
        if package == "deepspeed" and wing != DEEPSPEED_WING:
            found.append(f"{module} imports {target}; only {DEEPSPEED_WING} may")
        # The version belongs to no wing.
        if package != "vae_ds" or (target, name) == ("vae_ds", "__version__"):
            continue
        if not rest:
            other, inside = name, False
        else:
            other, inside = rest[0], len(rest) > 1 or not name
        if other == wing:
            continue
        if other not in LAYER:
            found.append(f"{module} imports {target} {name}, which is no wing")
            continue
        if LAYER[other] >= LAYER[wing]:
            found.append(f"{module} (layer {LAYER[wing]}) imports {other} (layer {LAYER[other]})")
        if inside:
            found.append(f"{module} reaches into {other}: {target}")
        elif rest:
            names = names | {(other, name)}
    for other, name in sorted(names):
        if other in LAYER and other != wing and name not in public_names(other):
            found.append(f"{module} takes {name} from {other}, which is not public")
    return found


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that cannot be ordered so that each imports only what comes before it."""
    left = dict(edges)
    while ready := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in ready:
            del left[module]
    return sorted(left)


def test_every_wing_has_a_layer() -> None:
    wings = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert wings - {"__init__", "__main__"} == set(LAYER)


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_go_down_and_take_public_names(file: Path) -> None:
    assert breaches(module_of(file), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("wing", sorted({path.relative_to(PACKAGE).parts[0] for path in FILES}))
def test_a_wing_has_no_circle_inside(wing: str) -> None:
    """`__init__` imports what it hands on; its modules import each other and not their own `__init__`."""
    modules = {module_of(file): file for file in (PACKAGE / wing).rglob("*.py")}
    edges = {}
    for module, file in modules.items():
        targets = {
            named if (named := f"{target}.{name}") in modules else target
            for target, name in imports(file.read_text(encoding="utf-8"))
        }
        edges[module] = (targets & modules.keys()) - {module}
    assert circles(edges) == []


def test_the_engine_is_the_door_to_deepspeed() -> None:
    """The rule would hold in an empty package, too."""
    files = (PACKAGE / DEEPSPEED_WING).glob("*.py")
    assert any("deepspeed" in {target for target, _ in imports(file.read_text(encoding="utf-8"))} for file in files)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vae_ds.model.gaussian", "import deepspeed"),
        ("vae_ds.training.trainer", "def run():\n    from deepspeed.utils import safe_get_full_fp32_param"),
        ("vae_ds.training.trainer", "import importlib\nimportlib.import_module('deepspeed')"),
        ("vae_ds.model.t5vae", "from vae_ds.training import train"),
        ("vae_ds.model.t5vae", "from vae_ds.data import collate"),
        ("vae_ds.model.t5vae", "from vae_ds import training"),
        ("vae_ds.evaluation.metrics", "from vae_ds import train"),
        ("vae_ds.training.trainer", "from vae_ds.model import Bottleneck"),
        ("vae_ds.training.trainer", "from vae_ds import engine\nengine.ds_config"),
        ("vae_ds.training.trainer", "from vae_ds.data.corpora import load"),
        ("vae_ds.training.trainer", "import vae_ds.data.batches"),
    ],
)
def test_a_breach_is_seen(module: str, source: str) -> None:
    assert breaches(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vae_ds.engine.phase_engine", "import deepspeed"),
        ("vae_ds.training.trainer", "from vae_ds import engine\nengine.resolve"),
        ("vae_ds.training.trainer", "from vae_ds.model import T5VAE, gaussian\nfrom vae_ds.training import phases"),
        ("vae_ds.data.corpora.docstrings", "from vae_ds.data.corpora.prose import sentences"),
    ],
)
def test_what_is_allowed_is_allowed(module: str, source: str) -> None:
    assert breaches(module, source) == []


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_grows_too_large(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{file.name} has {lines} lines; more than {LONGEST_FILE} should be two files"
