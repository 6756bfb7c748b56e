"""`export: best` on real runs: a collapsed model and a warm-up must not win, whatever their nelbo, resumed or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.checkpoint_cases import weights_at
from support.launch import WORKER, job, launch, run_jobs
from support.recipes import small_recipe
from support.tiny import NORMAL_PRIOR, demo_settings
from vae_ds.training import train

# The warm-up collapses under a high beta, with a low nelbo. The last phase has beta 0: the code comes into use.
WARM, LAST, EVERY = 80, 40, 4
END = WARM + LAST


def model_is_of(run: Path) -> list[int]:
    """The steps of the checkpoints that have the weights of the exported model."""
    model = load_file(run / "model" / "model.safetensors")
    found = []
    for folder in sorted((run / "checkpoints").glob("step-*")):
        stored = weights_at(folder)
        if all(torch.equal(tensor, stored[name]) for name, tensor in model.items()):
            found.append(int(folder.name.removeprefix("step-")))
    return found


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]


def lowest(rows_: list[dict[str, Any]]) -> int:
    return int(min(rows_, key=lambda row: row["nelbo"])["step"])


def told(run: Path) -> dict[str, Any]:
    """What the run says of model/; model/ must say the same of itself, but for the validations since."""
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))["export"]
    origin = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))["origin"]
    assert (origin["step"], origin["nelbo"]) == (status["step"], status["nelbo"])
    return dict(status)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("export")
    phases = [
        *(f"phases.{index}.learning_rate={{schedule: constant, warmup_steps: 0}}" for index in (0, 1)),
        *(f"phases.{index}.free_bits.nats=0" for index in (0, 1)),
        *("phases.0.freeze=[]", "phases.0.optimizer.lr=1e-2", "phases.1.optimizer={lr: 2e-2, clip: 0}"),
        *("phases.0.beta={schedule: constant, value: 10}", "phases.1.beta={schedule: constant, value: 0}"),
        *(f"phases.0.steps={WARM}", f"phases.1.steps={LAST}"),
    ]
    often = [f"validation.every_steps={EVERY}", f"checkpoint.every_steps={EVERY}", "checkpoint.keep=99", "export=best"]
    small = demo_settings(folder, num_layers=1, num_decoder_layers=1)
    return [*small, *NORMAL_PRIOR, *phases, *often, "logging.tensorboard=false", f"data.cache_dir={folder / 'cache'}"]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("demo", tmp_path_factory.mktemp("runs") / "whole", settings)


@pytest.fixture(scope="module")
def used(whole: Path) -> list[dict[str, Any]]:
    """The validations of the last phase that use z. They are several, so that a choice is one."""
    found = [row for row in rows(whole) if row["step"] > WARM and row["verdict"] == "uses z"]
    assert len(found) >= 2
    return found


def cut(whole: Path, to: Path, step: int) -> Path:
    """The run as it was killed after the checkpoint of `step`, and the model/ that it had exported by its end."""
    shutil.copytree(whole, to)
    for folder in (to / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    (to / "status.json").unlink()
    return to


@pytest.mark.timeout(800)
def test_the_best_that_uses_z_is_exported(whole: Path, used: list[dict[str, Any]]) -> None:
    best = lowest(used)
    everything = rows(whole)
    assert everything[lowest(everything) // EVERY - 1]["verdict"] == "collapsed"
    assert lowest([row for row in everything if row["step"] > WARM]) != best
    assert model_is_of(whole) == [best]
    found = told(whole)
    nelbo = min(row["nelbo"] for row in used)
    assert (found["step"], found["nelbo"]) == (best, nelbo)
    assert found["reason"] == (
        f"model/ is the validation of step {best} (nelbo {nelbo:.2f}, the best of {len(used)} that use z)"
    )


@pytest.mark.timeout(800)
def test_the_last_validation_can_be_the_best_and_stays_it_in_a_longer_run(
    settings: list[str], whole: Path, used: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The phase is shorter by what came after the best; then it is as long, and nothing better comes."""
    best = lowest(used)
    assert best < END
    run = cut(whole, tmp_path / "run", WARM)
    shutil.rmtree(run / "model")
    train("demo", run, [*settings, f"phases.1.steps={best - WARM}"])
    assert model_is_of(run) == [best]
    assert told(run)["step"] == best
    train("demo", run, settings)
    assert model_is_of(run) == [best]
    assert told(run) == told(whole)


@pytest.mark.timeout(800)
def test_a_killed_run_keeps_its_best_and_chooses_as_one_never_killed(
    settings: list[str], whole: Path, used: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Killed after the export and before the checkpoint: model/ is newer than all that is resumed."""
    run = cut(whole, tmp_path / "run", lowest(used) - EVERY)
    file = run / "model" / "model.safetensors"
    before = file.stat().st_ino
    train("demo", run, settings)
    assert file.stat().st_ino == before
    assert told(run) == told(whole)
    assert model_is_of(run) == [lowest(used)]


@pytest.mark.timeout(800)
def test_two_ranks_choose_alike(settings: list[str], whole: Path, used: list[dict[str, Any]], tmp_path: Path) -> None:
    """Resumed before the best at ZeRO 3: rank 1 takes part in the export. Then to the end, which has no export."""
    run = cut(whole, tmp_path / "run", lowest(used) - EVERY)
    shutil.rmtree(run / "model")
    run_jobs(2, [job(Path("demo"), run, *settings, "deepspeed=zero3")], tmp_path)
    assert model_is_of(run) == [told(run)["step"]] == [lowest(used)]


@pytest.mark.timeout(800)
def test_a_checkpoint_of_version_0_2_resumes_and_chooses_from_what_follows(
    settings: list[str], whole: Path, used: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = cut(whole, tmp_path / "run", END - EVERY)
    manifest = run / "checkpoints" / f"step-{END - EVERY:08d}" / "manifest.json"
    stored = json.loads(manifest.read_text(encoding="utf-8"))
    del stored["progress"]["state"]["choice"]
    stored["progress"]["state"]["best"] = 1.0
    manifest.write_text(json.dumps(stored), encoding="utf-8")
    description = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    del description["origin"]
    (run / "model" / "config.json").write_text(json.dumps(description), encoding="utf-8")
    train("demo", run, settings)
    assert used[-1]["step"] == END
    assert model_is_of(run) == [END]
    assert told(run)["reason"].endswith(", the only one that uses z)")


@pytest.mark.timeout(800)
def test_without_a_validation_that_uses_z_the_last_weights_are_exported(
    settings: list[str], whole: Path, tmp_path: Path
) -> None:
    """After the warm-up, another last phase: it keeps the code collapsed, and its nelbo rises."""
    run = cut(whole, tmp_path / "run", WARM)
    last = ["phases.1.steps=8", "phases.1.beta.value=10", "phases.1.optimizer={lr: 0.1, clip: 0}"]
    train("demo", run, [*settings, *last])
    assert "uses z" not in {row["verdict"] for row in rows(run)}
    assert lowest(rows(run)) < WARM + 8
    assert model_is_of(run) == [WARM + 8]
    found = told(run)
    assert (found["step"], found["nelbo"]) == (WARM + 8, None)
    assert found["reason"].startswith("model/ has the last weights: no validation at the final beta used z (")


@pytest.mark.timeout(800)
def test_a_language_model_has_the_best_of_its_last_phase(settings: list[str], tmp_path: Path) -> None:
    rates = ["phases.0.optimizer.lr=5e-3", "phases.1.optimizer={lr: 3, clip: 0}", "model.injection=none"]
    run = train("demo", tmp_path / "run", [*settings, *rates, "phases.0.steps=20", "phases.1.steps=12"])
    last = [row for row in rows(run) if row["step"] > 20]
    assert lowest(rows(run)) <= 20
    assert model_is_of(run) == [lowest(last)]
    assert told(run)["reason"].endswith(", the best of 3)")


@pytest.mark.timeout(800)
def test_a_longer_phase_drops_what_its_old_end_exported(settings: list[str], whole: Path, tmp_path: Path) -> None:
    """The rise of beta goes on, so the old end is at a beta on the way; the last weights are worse, but at the end."""
    rise = ["phases.1.beta=null", "phases.1.beta={schedule: linear, over_steps: 100}", "phases.0.steps=1"]
    start = [*settings, *rise, f"model.weights={whole}", "phases.1.optimizer={lr: 0.1, clip: 0}"]
    run = train("demo", tmp_path / "run", [*start, "phases.1.steps=1"])
    assert model_is_of(run) == [2]
    train("demo", run, [*start, "phases.1.steps=9"])
    assert lowest(rows(run)) != 10
    assert model_is_of(run) == [10]
    assert told(run)["step"] == 10


@pytest.mark.timeout(800)
def test_the_last_step_is_exported(settings: list[str], tmp_path: Path) -> None:
    short = ["phases.0.steps=4", "phases.1.steps=4", "phases.1.optimizer.lr=0.5", "export=last"]
    run = train("demo", tmp_path / "run", [*settings, *short])
    assert model_is_of(run) == [8]
    assert told(run)["reason"] == "model/ has the last weights, as `export: last` asks"


@pytest.mark.timeout(600)
def test_a_best_model_that_cannot_be_written_is_a_warning_on_every_rank(tmp_path: Path) -> None:
    """Rank 0 alone meets it, and the others must not wait for it.

    At the end of the run it is an error, and the same command writes the last model.
    """
    recipe, run = small_recipe(tmp_path / "made"), tmp_path / "run"
    before = """
from vae_ds.model import T5VAE
def full(self, path, *args, **kwargs):
    raise OSError(28, "No space left on device", str(path))
T5VAE.save_pretrained = full
"""
    # A plain language model, whose validations can all be chosen.
    plain = ["model.injection=none", "phases.0.freeze=[]", "phases.1.beta={schedule: constant, value: 0}"]
    short = [*plain, "export=best", "validation.every_steps=1", "phases.0.steps=2", "phases.1.steps=4"]
    listing = tmp_path / "jobs.json"
    listing.write_text(json.dumps([job(recipe, run, *short)]), encoding="utf-8")
    worker = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = launch(["-c", f"{before}\n{worker}", WORKER, listing], timeout_s=200, check=False)
    assert not done.timed_out, done.report()
    assert done.output.count("model: cannot be written (rank 0: OSError: [Errno 28] No space left on device") >= 3
    for said in done.outputs:
        assert "StorageError" in said, done.report()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    run_jobs(2, [job(recipe, run, *short)], tmp_path)
    assert model_is_of(run) == [6]
    assert told(run)["reason"].startswith("model/ has the last weights")
