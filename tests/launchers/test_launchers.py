"""The launchers, the packaging and the pins: one command from nothing to a table, and no process left behind."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support import ROOT, tiny
from support.processes import STARTUP_S, kill_all, new_job, processes_of, rows, start, state_of, wait_until

REPO = ROOT
LAUNCHERS = REPO / "launchers"
SCRIPTS = [*sorted(LAUNCHERS.glob("*.sh")), REPO / ".ci" / "run"]
# A CUDA build of torch pins what it brings itself.
TORCHS_OWN = re.compile(r"^(nvidia-|cuda-|triton)")


def declared(keyword: str) -> ast.expr:
    tree = ast.parse((REPO / "setup.py").read_text(encoding="utf-8"))
    return next(node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == keyword)


def requirements() -> list[Requirement]:
    groups = [ast.literal_eval(declared("install_requires")), *ast.literal_eval(declared("extras_require")).values()]
    return [Requirement(text) for group in groups for text in group]


def pins() -> dict[str, str]:
    lines = (LAUNCHERS / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


# Packaging


def test_the_pins_lie_within_setup_pys_ranges() -> None:
    for need in requirements():
        assert need.specifier.contains(pins()[canonicalize_name(need.name)]), need


def test_everything_that_comes_along_is_pinned() -> None:
    """A package without a pin is another version on another day, and another corpus."""
    seen: set[str] = set()
    waiting = requirements()
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        if name in seen or TORCHS_OWN.match(name):
            continue
        seen.add(name)
        for text in metadata.requires(name) or []:
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in ("", *need.extras)):
                waiting.append(inner)
    assert seen - set(pins()) == set()


def test_constraints_name_packages_and_versions_alone() -> None:
    for line in (LAUNCHERS / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line), line
        assert "://" not in line


def test_every_imported_package_is_declared() -> None:
    """What arrives only because another package wants it can leave with that package."""
    known = {canonicalize_name(need.name) for need in requirements()}
    owners = metadata.packages_distributions()
    for file in [*(REPO / "vae_ds").rglob("*.py"), *LAUNCHERS.glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"vae_ds", "nodes"}:
                assert {canonicalize_name(owner) for owner in owners[name]} & known, f"{file.name} imports {name}"


def test_a_wheel_has_all_that_the_package_reads(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("vae_ds", "ds_configs"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(REPO / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    offline = ["--no-deps", "--no-index", "--quiet"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = tmp_path.glob("vae_ds-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = [path for path in (REPO / "vae_ds").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(REPO)) for path in package} <= inside
    assert {f"vae_ds/ds_configs/{path.name}" for path in (REPO / "ds_configs").glob("*.json")} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert {name.partition("/")[0].partition("-")[0] for name in inside} == {"vae_ds"}

    subprocess.run([*pip, "install", *offline, "--target", str(tmp_path / "site"), str(wheel)], check=True, timeout=120)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    listed = subprocess.run(
        [sys.executable, "-m", "vae_ds", "recipes"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "demo-yardstick" in listed.stdout
    probe = "import vae_ds, vae_ds.engine.ds_config as d; print(vae_ds.__file__); print(*d.shipped_names())"
    shown = subprocess.run(
        [sys.executable, "-c", probe], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert shown.stdout.startswith(str(tmp_path / "site"))
    assert "zero2_bf16" in shown.stdout


# Setup


def bash(script: str, env: dict[str, str] | None = None, library: Path = LAUNCHERS, **kwargs: object) -> str:
    """What a script that has sourced lib.sh prints, standard error included; its exit code on the last line."""
    clean = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON")}
    whole = f'(set -euo pipefail; source "{library}/lib.sh"; {script}) 2>&1; echo "exit $?"'
    done = subprocess.run(
        ["bash", "-c", whole], env={**clean, **(env or {})}, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def fake_environment(folder: Path, version: str, recent: bool) -> Path:
    """An environment whose Python only tells its version: nothing of the setup may run it further."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    answer = 0 if recent else 1
    python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}"\nexit {answer}\n', encoding="utf-8")
    python.chmod(0o755)
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", str(script)], check=True, timeout=60)


def test_an_old_python_is_refused_by_name(tmp_path: Path) -> None:
    old = fake_environment(tmp_path / "old", "3.9.1", recent=False)
    said = bash("choose_environment", {"VIRTUAL_ENV": str(old)})
    assert "Python 3.9.1; Python 3.11 or newer is needed" in said
    assert said.endswith("exit 2\n")


def test_no_recent_python_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python"):
        shutil.copy(fake_environment(tmp_path / f"of-{name}", "3.8.0", recent=False) / "bin" / "python", folder / name)
    said = bash("find_python", {"PATH": f"{folder}:{os.environ['PATH']}"})
    assert "Python 3.11 or newer is needed; found Python 3.8.0" in said
    assert said.endswith("exit 2\n")


def test_the_active_environment_is_used(tmp_path: Path) -> None:
    show = 'choose_environment; echo "$VENV $OWN_VENV"'
    venv, conda = (fake_environment(tmp_path / name, "3.12.0", recent=True) for name in ("venv", "conda"))
    assert f"{venv} 0" in bash(show, {"VIRTUAL_ENV": str(venv), "CONDA_PREFIX": str(conda)})
    assert f"{conda} 0" in bash(show, {"CONDA_PREFIX": str(conda), "CONDA_DEFAULT_ENV": "mine"})


def test_without_one_a_venv_is_made_once(tmp_path: Path) -> None:
    """Conda's base environment is everybody's: nothing is installed there."""
    library = tmp_path / "repo" / "launchers"
    shutil.copytree(LAUNCHERS, library)
    env = {"CONDA_PREFIX": sys.prefix, "CONDA_DEFAULT_ENV": "base", "PYTHON": sys.executable}
    show = 'choose_environment; "$PY" -c "import sys; print(sys.prefix)"'
    first = bash(show, env, library)
    made = tmp_path / "repo" / ".venv"
    assert "creating the virtual environment" in first
    assert str(made) in first
    second = bash(show, env, library)
    assert "making" not in second
    assert str(made) in second


def test_an_environment_in_use_keeps_what_will_do(tmp_path: Path) -> None:
    (tmp_path / "launchers").mkdir()
    newer = f"numpy>{metadata.version('numpy')}"
    (tmp_path / "setup.py").write_text(
        f'setup(install_requires=["torch>=2.11", "{newer}", "absent"])', encoding="utf-8"
    )
    (tmp_path / "launchers" / "constraints.txt").write_text(
        "# why\ntorch==2.11.0\nnumpy==9.9\npyyaml==1.0\nabsent==1.2\n", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, str(LAUNCHERS / "missing_pins.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["numpy==9.9", "absent==1.2"]


def test_wrong_arguments_of_the_demo() -> None:
    for arguments in (["--run", "x"], ["--runs"], ["--set"]):
        done = subprocess.run(
            ["bash", str(LAUNCHERS / "demo.sh"), *arguments], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 2
        assert "see --help" in done.stderr


# Ranks and signals


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that make the demo's recipes tiny: a random base, a few sentences, a step or two a second."""
    folder = tmp_path_factory.mktemp("demo")
    return [*tiny.demo_settings(folder), "evaluation.iw_samples=4", "evaluation.iw_sentences=16"]


@pytest.fixture
def job() -> dict[str, str]:
    return new_job()


def test_the_ranks_exit_code_comes_back(job: dict[str, str], tmp_path: Path) -> None:
    """Also where the user has chosen devices, which the launcher alone would number anew."""
    command = [sys.executable, str(LAUNCHERS / "ranks.py"), "-n", "2"]
    wrong = subprocess.run(
        [*command, "train", "no-such-recipe"], env=job, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert wrong.returncode == 2
    assert wrong.stderr.count("no recipe `no-such-recipe`") == 1
    chosen = {**job, "CUDA_VISIBLE_DEVICES": "GPU-5ba3c1f0", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    right = subprocess.run([*command, "recipes"], env=chosen, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert right.returncode == 0, right.stderr
    assert right.stdout.count("demo-yardstick") == 2
    assert processes_of(job) == []


@pytest.mark.timeout(900)
def test_ranks_outlive_no_launcher(job: dict[str, str], settings: list[str], tmp_path: Path) -> None:
    """A killed launch.py leaves its ranks alone and lets `deepspeed` exit 0; ours ends them, and they save first."""
    run, output = tmp_path / "run", tmp_path / "output"
    changes = [*settings, "phases.0.steps=100000"]
    command = [sys.executable, str(LAUNCHERS / "ranks.py"), "-n", "2", "train", "demo", "--run-dir", str(run)]
    process = start([*command, "--set", *changes], job, output)
    try:
        wait_until(lambda: len(rows(run)) > 2, process, output, STARTUP_S)
        (launcher,) = [one for one in processes_of(job) if "deepspeed.launcher.launch" in one.cmdline()]
        launcher.kill()
        process.wait(timeout=90)
        assert processes_of(job) == []
        assert state_of(run) == "stopped"
    finally:
        kill_all(job)


@pytest.mark.timeout(1500)
def test_the_demo_from_a_stop_to_the_table(job: dict[str, str], settings: list[str], tmp_path: Path) -> None:
    """Ctrl-C in phase 1, the same command again, and once more when all is done."""
    runs, output = tmp_path / "my runs", tmp_path / "output"
    command = ["bash", str(LAUNCHERS / "demo.sh"), "--no-setup", "--runs", str(runs)]
    for setting in settings:
        command += ["--set", setting]
    slow = [*command, "--set-vae", "phases.0.steps=40", "--set-vae", "phases.1.steps=6"]
    slow += ["--set-yardstick", "phases.0.steps=8"]
    try:
        process = start(slow, job, output)
        wait_until(lambda: len(rows(runs / "demo")) > 2, process, output, STARTUP_S)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=90) == 75, output.read_text(encoding="utf-8")
        assert processes_of(job) == []
        assert state_of(runs / "demo") == "stopped"
        assert "The same command resumes" in output.read_text(encoding="utf-8")
        stopped_at = rows(runs / "demo")[-1]["step"]
        assert stopped_at < 40

        process = start(slow, job, output)
        code = process.wait(timeout=900)
        said = output.read_text(encoding="utf-8")
        assert code == 0, said
        assert processes_of(job) == []
        for run, steps in (("demo", 46), ("demo-yardstick", 8)):
            assert state_of(runs / run) == "done"
            assert [row["step"] for row in rows(runs / run)] == list(range(1, steps + 1))
            assert json.loads((runs / run / "eval-test.json").read_text(encoding="utf-8"))["sentences"] == 80
        for word in ("rec", "iw_nll", "z_gain", "demo-yardstick", "seconds by stage", "in all"):
            assert word in said
        assert re.search(r"tensorboard --logdir \S*my\\ runs\n", said)

        written = (runs / "demo" / "eval-test.json").stat().st_mtime_ns
        process = start(slow, job, output)
        assert process.wait(timeout=300) == 0
        again = output.read_text(encoding="utf-8")
        assert f"{runs}/demo is done" in again
        assert "z_gain" in again
        assert (runs / "demo" / "eval-test.json").stat().st_mtime_ns == written
    finally:
        kill_all(job)
