"""A dry run finds what a start would find, says what the run would be, and leaves nothing behind."""

from pathlib import Path

import pytest
import yaml

from support.tiny import demo_settings
from vae_ds.errors import CheckpointError, ConfigError, UserError
from vae_ds.training import dry_run, train

pytestmark = pytest.mark.timeout(360)
STEPS = ("phases.0.steps=2", "phases.1.steps=3")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    return [*demo_settings(tmp_path), *STEPS, "logging.tensorboard=false"]


def test_the_facts_of_a_run(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = [setting.replace(f"{tmp_path}/", "") for setting in settings]
    told = dry_run("demo", tmp_path / "run", relative)
    assert not (tmp_path / "run").exists()
    recipe = yaml.safe_load(told)
    assert recipe["data"]["path"] == str(tmp_path / "text")
    assert recipe["model"]["base"] == str(tmp_path / "base")
    facts = [line[2:] for line in told.splitlines() if line.startswith("# ")]
    assert facts[0] == f"start: a new run in {tmp_path / 'run'}"
    assert facts[1].startswith("train: 256 sentences, ")
    assert " tokens per sentence (50%: " in facts[1]
    assert facts[1].endswith("0.00% of the sentences cut, 0.00% of the tokens unknown")
    assert facts[2].startswith("valid: 32 sentences, ")
    assert ": encoder " in facts[3] or ": bottleneck " in facts[3]
    assert facts[4].startswith("phase warmup: 2 steps, 0.12 epochs, trains ")
    assert facts[5].startswith("phase full: 3 steps, 0.19 epochs, trains ")
    assert facts[6] == "ranks: 1, fp32, 16 sentences per step, at most 1,536 tokens per rank and forward pass"
    warmup, full = (int(fact.split("trains ")[1].split()[0].replace(",", "")) for fact in facts[4:6])
    assert warmup < full == int(facts[3].split()[1].replace(",", ""))


@pytest.mark.parametrize(
    ("change", "until", "message"),
    [
        ("phases.1.freeze=[decodr]", None, r"phases\.1\.freeze: `decodr` matches no parameter"),
        ("seed=1", "nope", "no phase 'nope'; the recipe has warmup, full"),
        ("model.latent_dim=100000", None, "use at most 32"),
    ],
)
def test_what_passed_before_is_refused(
    settings: list[str], tmp_path: Path, change: str, until: str | None, message: str
) -> None:
    for start in (dry_run, train):
        with pytest.raises(UserError, match=message):
            start("demo", tmp_path / "run", [*settings, change], until=until)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there(settings: list[str], tmp_path: Path) -> None:
    """Each incompatible change is refused by a dry run as by a start, and a run is never shortened."""
    run = train("demo", tmp_path / "run", settings)
    assert f"start: nothing to do, the run in {run} is done" in dry_run("demo", run, settings)
    longer = [*settings, "phases.1.steps=4"]
    assert f"start: resumes from {run}/checkpoints/step-00000005, phase full, step 3 of 3" not in dry_run(
        "demo", run, longer
    )
    assert "phase full, step 3 of 4" in dry_run("demo", run, longer)
    for start in (dry_run, train):
        with pytest.raises(ConfigError, match=r"phases\.1: the recipe has 2 steps, but 3 are done"):
            start("demo", run, [*settings, "phases.1.steps=2"])
        with pytest.raises(ConfigError, match=r"model\.latent_dim was 4, now 5"):
            start("demo", run, [*settings, "model.latent_dim=5"])
    with (tmp_path / "text" / "train.txt").open("a", encoding="utf-8") as text:
        text.write("one more sentence .\n")
    for start in (dry_run, train):
        with pytest.raises(CheckpointError, match="the training text has changed"):
            start("demo", run, longer)


def test_a_run_directory_that_cannot_be_made(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        for start in (dry_run, train):
            with pytest.raises(ConfigError, match=r"--run-dir .*file is a file; choose another"):
                start("demo", place, settings)
    with pytest.raises(ConfigError, match=r"--run-dir /proc/run: cannot be written"):
        train("demo", "/proc/run", settings)
