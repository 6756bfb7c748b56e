"""The wheelhouse: made where there is a network, used where there is none at all."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from support import ROOT, tiny
from support.processes import new_job, rows, state_of

LAUNCHERS = ROOT / "launchers"
MAKE = ["bash", str(LAUNCHERS / "wheelhouse.sh"), "--no-setup"]
BUNDLE = [sys.executable, str(LAUNCHERS / "bundle.py")]
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
# What the command behind it sees: a loopback interface and no other, and a wheelhouse that cannot be written.
ALONE = 'ip link set lo up; mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; shift; exec "$@"'


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny base and a small text of our own, and two steps a phase."""
    folder = tmp_path_factory.mktemp("recipe")
    settings = tiny.demo_settings(folder, num_layers=1, num_decoder_layers=1)
    (folder / "base" / "flax_model.msgpack").write_bytes(b"another framework's weights")
    return [*settings, "phases.0.steps=2", "phases.1.steps=2", "logging.tensorboard=false"]


def sh(words: list[str], cwd: Path, limit_s: float = 60.0, **env: str) -> subprocess.CompletedProcess[str]:
    # No cache of the session's: the wheelhouse's own has to do.
    job = {name: value for name, value in new_job().items() if name not in ("VAE_DS_CACHE", "PYTHONPATH")}
    return subprocess.run(words, env={**job, **env}, cwd=cwd, capture_output=True, text=True, timeout=limit_s)


def can_be_alone() -> bool:
    probe = ["unshare", "-n", "-m", "bash", "-ec", ALONE, "bash", "/tmp", "true"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.timeout(1200)
def test_from_the_network_to_a_machine_without(settings: list[str], tmp_path: Path) -> None:
    """The directory moves, what it was made from is gone, and a run there is done, with the files of the manifest."""
    made, moved = tmp_path / "made", tmp_path / "moved here"
    recipe = [part for setting in settings for part in ("--set", setting)]
    done = sh([*MAKE, "--to", str(made), "--recipe", "demo", *recipe], tmp_path, 600)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["python"], manifest["recipe"]) == (VERSION, "demo")
    for package in ("torch", "transformers", "deepspeed", "numpy", "vae_ds"):
        assert manifest["packages"][package] == metadata.version(package)
    inside = {str(file.relative_to(made)) for file in made.rglob("*") if file.is_file()}
    assert inside - set(manifest["files"]) == {"manifest.json", ".vae_ds-wheelhouse"}
    assert manifest["bytes"] == sum((made / name).stat().st_size for name in manifest["files"])
    assert "base/model.safetensors" in inside
    assert "base/flax_model.msgpack" not in inside

    made.rename(moved)
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in ("model.base", "data.path"):
            shutil.move(value, tmp_path / f"gone-{key}")
    offline = ["bash", str(moved / "offline.sh"), "--venv", str(tmp_path / "venv")]
    home = {"HOME": str(tmp_path / "home"), "VIRTUAL_ENV": "", "PYTHON": sys.executable}
    (tmp_path / "home").mkdir()
    train = [*offline, "-n", "2", "train", "demo", "--run-dir", str(tmp_path / "run"), "--set", "phases.1.steps=3"]
    alone = ["unshare", "-n", "-m", "bash", "-ec", ALONE, "bash", str(moved)] if can_be_alone() else []
    done = sh([*alone, *train], tmp_path, 600, **home)
    assert done.returncode == 0, done.stderr
    assert state_of(tmp_path / "run") == "done"
    assert len(rows(tmp_path / "run")) == 5
    copied = tmp_path / "home" / ".cache" / "vae_ds" if alone else moved / "cache"
    tokens = {name.removeprefix("cache/") for name in manifest["files"] if name.startswith("cache/")}
    assert {str(file.relative_to(copied)) for file in copied.rglob("*") if file.is_file()} == tokens

    again = sh([*alone, *offline, "-n", "1", "status", str(tmp_path / "run")], tmp_path, 120, **home)
    assert again.returncode == 0, again.stderr
    assert "installing" not in again.stdout
    with (moved / "corpus" / "train.txt").open("ab") as file:
        file.write(b"one more\n")
    changed = sh([*offline, "-n", "1", "status", str(tmp_path / "run")], tmp_path, **home)
    assert changed.returncode == 2
    assert changed.stderr.startswith(f"error: {moved}/corpus/train.txt: has ")
    if not alone:
        pytest.skip("all passed, with the network there: this machine lets nobody take it away")


# Verification, before anything is installed


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A wheelhouse that is whole, but for the wheels inside being none."""
    house = tmp_path / "house"
    for name in ("launchers/lib.sh", "launchers/manifest.py", "launchers/ranks.py", "offline.sh"):
        target = house / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(LAUNCHERS / target.name, target)
    (house / "wheels").mkdir()
    (house / "wheels" / "one-1.0-py3-none-any.whl").write_bytes(b"a wheel")
    write = [sys.executable, str(LAUNCHERS / "manifest.py"), "write", str(house), "--python", VERSION]
    subprocess.run([*write, "--platform", "manylinux_2_28_x86_64"], check=True)
    return house


@pytest.mark.parametrize(
    ("blow", "said"),
    [
        (lambda house: (house / "manifest.json").unlink(), "{house}: no manifest.json; the wheelhouse is incomplete"),
        (lambda house: (house / "manifest.json").write_text("{"), "{house}/manifest.json: cannot be read"),
        (lambda house: (house / "launchers" / "ranks.py").unlink(), "{house}/launchers/ranks.py: missing"),
        (lambda house: next(house.glob("wheels/*")).write_bytes(b"a"), "{wheel}: has 1 bytes instead of 7"),
        (lambda house: next(house.glob("wheels/*")).write_bytes(b"A wheel"), "{wheel}: its content has changed"),
        (lambda house: shutil.rmtree(house / "launchers"), "{house} is no wheelhouse"),
    ],
)
def test_a_missing_or_changed_file_is_named(house: Path, tmp_path: Path, blow: object, said: str) -> None:
    assert callable(blow)
    blow(house)
    done = sh(["bash", str(house / "offline.sh"), "--venv", str(tmp_path / "venv"), "recipes"], tmp_path)
    assert done.returncode == 2
    expected = said.format(house=house, wheel=house / "wheels" / "one-1.0-py3-none-any.whl")
    assert done.stderr.startswith(f"error: {expected}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "venv").glob("*"))


def test_what_cannot_be_installed_here(house: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    offline = ["bash", str(house / "offline.sh")]
    taken = sh([*offline, "--venv", str(tmp_path / "mine"), "recipes"], tmp_path)
    assert taken.returncode == 2
    assert f"{tmp_path}/mine contains other files" in taken.stderr
    assert (tmp_path / "mine" / "thesis.tex").is_file()

    file = house / "manifest.json"
    file.write_text(file.read_text(encoding="utf-8").replace(f'"python": "{VERSION}"', '"python": "3.99"'))
    other = sh([*offline, "--venv", str(tmp_path / "venv"), "recipes"], tmp_path)
    assert other.returncode == 2
    assert "the wheels are for Python 3.99, which is not on the PATH" in other.stderr


# Making one


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--to DIR is missing"),
        (["--to"], "--to needs a value"),
        (["--to", "DIR", "--python", "2.7"], "--python 2.7: expected 3.11 or newer"),
        (["--to", "DIR", "--set", "seed=1"], "--set needs a recipe; name it with --recipe"),
        (["--to", "DIR", "--wheels"], "unknown argument --wheels"),
        (["--to", "."], " contains other files; name a new directory"),
        (["--to", "DIR", "--platform", "manylinux_2_28_vax"], "error: pip finds no torch"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "thesis.tex").touch()
    done = sh([*MAKE, *arguments], tmp_path, 120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "DIR" / "manifest.json").exists()


def test_a_data_set_of_the_hub_and_its_base_come_along(settings: list[str], tmp_path: Path) -> None:
    """A base by its hub name, here from the hub's cache, and a data set whose text may hold line ends."""
    name = "someone/small-t5"
    base = tiny.make_base(tmp_path / "base", num_layers=1, num_decoder_layers=1)
    snapshot = tmp_path / "hf" / "hub" / "models--someone--small-t5" / "snapshots" / ("0" * 40)
    shutil.copytree(base, snapshot)
    (snapshot / "tf_model.h5").write_bytes(b"another framework's weights")
    reference = snapshot.parent.parent / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("0" * 40, encoding="ascii")
    texts = {split: [f"Line one of {split}.\nLine two, {n}." for n in range(20)] for split in ("a", "b", "c")}
    saved = DatasetDict({split: Dataset.from_dict({"body": rows}) for split, rows in texts.items()})
    saved.save_to_disk(str(tmp_path / "saved"))

    here = tmp_path / "house"
    here.mkdir()
    words = [*BUNDLE, str(here), "demo", f"model.base={name}", "data.corpus=dataset", f"data.path={tmp_path / 'saved'}"]
    words += ["data.column=body", "data.splits={train: a, valid: b, test: c}", "data.limit=12"]
    made = sh(words, tmp_path, 120, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
    assert made.returncode == 0, made.stderr
    assert sorted(file.name for file in (here / "base").iterdir()) == sorted(file.name for file in base.iterdir())

    from vae_ds import config as configuration
    from vae_ds.config.settings import RunConfig
    from vae_ds.data import corpora

    overrides = [line.replace("{here}", str(here)) for line in made.stdout.splitlines()]
    shutil.rmtree(tmp_path / "saved")
    config = configuration.load(RunConfig, str(here / "recipe.yaml"), overrides)
    assert config.model.base == str(here / "base")
    assert config.phases == configuration.load(RunConfig, "demo").phases
    found = corpora.load(config.data).splits
    assert {split: rows["text"][:] for split, rows in found.items()} == {
        "train": texts["a"][:12],
        "valid": texts["b"][:12],
        "test": texts["c"][:12],
    }
    assert len(list((here / "cache" / "tokens").glob("dataset-*.arrow"))) == 3


def test_a_recipe_that_cannot_be_taken_along(tmp_path: Path) -> None:
    (tmp_path / "house").mkdir()
    for words, said in (
        (["no-such-recipe"], "no recipe `no-such-recipe`"),
        (["demo", "data.corpus=text", "data.path=absent"], "absent: no such directory"),
        (["demo", "model.base=someone/unheard-of"], "model.base someone/unheard-of: no such directory, and the hub"),
    ):
        done = sh([*BUNDLE, str(tmp_path / "house"), *words], tmp_path, 120, HF_HUB_OFFLINE="1")
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        assert not os.path.exists(tmp_path / "house" / "manifest.json")
