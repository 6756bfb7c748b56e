"""The command line: wrong input ends with one clear line and exit code 2, before a model is loaded; help is quick."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.launch import clean_environment
from support.tiny import ENGLISH, make_base, write_splits
from vae_ds import cli

RECIPE = """
name: small
model: {{base: {base}, latent_dim: 4}}
data: {{corpus: text, path: {text}, max_tokens: 40, blank_lines: error, cache_dir: {cache}}}
batch: {{global: 16}}
precision: fp32
phases:
  - {{name: only, steps: 3, beta: {{schedule: constant, value: 1}}}}
logging: {{every: 1, tensorboard: false, progress: false}}
evaluation: {{iw_samples: 2, iw_sentences: 4}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("cli") / "base", "t5", num_layers=1, num_decoder_layers=1)


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    text = write_splits(tmp_path / "text", ENGLISH[:60], ENGLISH[60:80], ENGLISH[80:100])
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(base=base, text=text, cache=tmp_path / "cache"), encoding="utf-8")
    return path


def code_of(*words: object) -> int:
    """The exit code of a command run in this process."""
    try:
        return cli.run([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def empty(folder: Path) -> str:
    (folder / "train.txt").write_text("")
    return "train.txt"


def not_utf8(folder: Path) -> str:
    (folder / "valid.txt").write_bytes(b"fine\nno\xff good\n")
    return "valid.txt:2"


def blank_line(folder: Path) -> str:
    (folder / "test.txt").write_text("fine .\n \nfine too .\n")
    return "test.txt:2"


def missing(folder: Path) -> str:
    (folder / "train.txt").unlink()
    return "train.txt"


@pytest.mark.parametrize("spoil", [empty, not_utf8, blank_line, missing])
def test_wrong_text(
    spoil: Callable[[Path], str], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the file, and the line in it where there is one."""
    named = spoil(tmp_path / "text")
    assert code_of("train", recipe, "--run-dir", tmp_path / "run") == 2
    assert_one_line(capsys, named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("phases.0.stpes=3", "did you mean `steps`"),
        ("model.latent_dim=0", "model.latent_dim"),
        ("phases.0.freeze=[encodr]", "encodr"),
        ("phases.0.freeze=[encoder,decoder,memory,embeddings,bottleneck]", "nothing to train"),
        ("phases.0.beta.value=-1", "phases.0.beta.value"),
        ("batch.micro=0", "batch.micro"),
        ("batch.tokens=many", "batch.tokens"),
        ("batch.global=10000", "60"),
        ("model.base=/nonexistent/t5", "/nonexistent/t5"),
        ("deepspeed=zero7", "zero7"),
        ("nonsense", "KEY=VALUE"),
        ("phases.3.steps=1", "phases.3"),
    ],
)
def test_wrong_setting(
    setting: str, named: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of("train", recipe, "--run-dir", tmp_path / "run", "--set", setting) == 2
    assert_one_line(capsys, named)


def test_a_base_that_is_no_t5(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    assert code_of("train", recipe, "--run-dir", tmp_path / "run", "--set", f"model.base={other}") == 2
    assert_one_line(capsys, "bert")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_base_whose_weights_do_not_fit(
    kind: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tensor is named, and not a report that nobody sees. The shapes in PyTorch's format are known only on load."""
    other = make_base(tmp_path / "other", "t5", num_layers=1, num_decoder_layers=1)
    if kind == "bin":
        torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
        (other / "model.safetensors").unlink()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"d_ff": 2 * config["d_ff"]}))
    assert code_of("train", recipe, "--run-dir", tmp_path / "run", "--set", f"model.base={other}") == 2
    assert_one_line(capsys, "DenseReluDense.wi.weight is [")


def test_a_missing_column(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.csv").write_text("sentence,label\nA line .,1\n")
    overrides = ["data.corpus=dataset", f"data.path={folder}", "data.column=text"]
    assert code_of("train", recipe, "--run-dir", tmp_path / "run", "--set", *overrides) == 2
    assert_one_line(capsys, "sentence")


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping"),
        ({"gradient_clipping": 3.0}, "gradient_clipping"),
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu"),
        ({"fp16": {"enabled": True}}, "fp16"),
    ],
)
def test_a_wrong_ds_config(
    tree: dict[str, object], named: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **tree}))
    assert code_of("train", recipe, "--run-dir", tmp_path / "run", "--deepspeed", path) == 2
    assert_one_line(capsys, named)


def assert_one_line(capsys: pytest.CaptureFixture[str], named: str) -> None:
    """One line on standard error that starts with `error:` and names the culprit; no traceback."""
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, told
    assert named in lines[0], told
    assert "Traceback" not in told


@pytest.mark.parametrize("words", [["show"], ["train"], ["evaluate", "RUN", "--iw-samples", "0"], ["sample"], []])
def test_wrong_arguments(words: list[str]) -> None:
    assert code_of(*words) == 2


@pytest.mark.parametrize("command", ["evaluate", "reconstruct", "sample", "status", "compare"])
def test_no_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(command, tmp_path) == 2
    assert_one_line(capsys, str(tmp_path))


def test_a_dry_run_trains_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("train", recipe, "--run-dir", tmp_path / "run", "--dry-run") == 0
    assert "phase only: 3 steps, 1.00 epochs" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_run_from_training_to_text(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, evaluate, compare, generate, export, and again from the export; a second training finds it done."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    assert code_of("train", recipe, "--run-dir", run) == 0
    assert code_of("status", run) == 0
    stamp = (run / "status.json").read_bytes()
    assert code_of("train", recipe, "--run-dir", run) == 0
    assert (run / "status.json").read_bytes() == stamp
    assert code_of("train", recipe, "--run-dir", run, "--resume", "never") == 2
    assert code_of("train", recipe, "--run-dir", run, "--set", "seed=1") == 2
    assert code_of("evaluate", run) == 0
    metrics = json.loads((run / "eval-test.json").read_text())
    assert metrics["sentences"] == 20
    assert metrics["nelbo"] == pytest.approx(metrics["rec"] + metrics["kl"])
    assert code_of("compare", run) == 0
    capsys.readouterr()
    assert code_of("evaluate", run, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run / "eval-test.json").read_text())
    assert code_of("reconstruct", run, "the captain sold two letters .") == 0
    assert code_of("reconstruct", run, "--from", "valid", "-n", "2", "--sampled") == 0
    assert code_of("sample", run, "-n", "2", "--temperature", "1.0") == 0
    assert code_of("interpolate", run, ENGLISH[0], ENGLISH[1], "--steps", "3", "--path", "slerp") == 0
    assert code_of("analogy", run, *ENGLISH[:3]) == 0
    assert code_of("traverse", run, ENGLISH[0], "--unit", "3") == 0
    assert code_of("traverse", run, ENGLISH[0], "--unit", "4") == 2
    assert code_of("export", run, "--to", moved) == 0
    assert code_of("export", run, "--to", moved) == 2
    capsys.readouterr()
    assert code_of("evaluate", moved) == 2
    assert_one_line(capsys, "--recipe")
    assert code_of("evaluate", moved, "--recipe", recipe) == 0
    again = json.loads((moved / "eval-test.json").read_text())
    assert again["nelbo"] == metrics["nelbo"]


def test_the_best_by_valid_nelbo_is_exported(recipe: Path, tmp_path: Path) -> None:
    """With a rate that ruins a language model, the export is that of the best validation, and not the last."""
    run = tmp_path / "run"
    ruinous = ["phases.0.optimizer.lr=1000", "phases.0.learning_rate.warmup_steps=1000", "model.injection=none"]
    often = ["phases.0.steps=6", "validation.every_steps=1", "export=best"]
    assert code_of("train", recipe, "--run-dir", run, "--set", *often, *ruinous) == 0
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    nelbos = [row["nelbo"] for row in rows]
    assert len(nelbos) == 6
    assert min(nelbos) < nelbos[-1]
    assert code_of("evaluate", run, "--split", "valid") == 0
    assert json.loads((run / "eval-valid.json").read_text())["nelbo"] == pytest.approx(min(nelbos), rel=1e-6)


def test_help_is_quick(tmp_path: Path) -> None:
    """Nothing heavy is imported for it; the bound is ten times what it takes, for busy machines."""
    began = time.monotonic()
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vae_ds", "--local_rank=0", "--help"],
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 0
    assert "train a recipe" in finished.stdout
    assert " torch" not in finished.stderr
    assert time.monotonic() - began < 10
