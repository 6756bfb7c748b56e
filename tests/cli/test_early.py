"""What is wrong with the arguments is told at once: before torch is imported, and in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.evaluated import DATA, write_evaluation
from support.launch import clean_environment

# Each command with what its one line of error names. `nope` does not exist, `empty` is an empty directory, `file` is a
# file, `begun` a run without a model, `model` an exported model, `run` a run with a model and without an evaluation.
# Of the models in `evaluated`, `old` does not name its data, `lone` has no values of the sentences, `torn` has broken
# ones, `other` has those of another evaluation, and `damaged` has a broken eval-test.json.
CASES = {
    "evaluate nope": "nope: no such directory",
    "evaluate empty": "empty: neither a run directory",
    "evaluate begun": "begun: no model/ yet",
    "evaluate model": "--recipe",
    "evaluate model --recipe nope.yaml": "nope.yaml",
    "evaluate run --yardstick nope": "nope: no such directory",
    "evaluate run --yardstick run": "eval-test.json: no such file; write it with `vae-ds evaluate run --split test`",
    "evaluate run --yardstick evaluated/old": "evaluated/old/eval-test.json: has no data_fingerprint",
    "evaluate run --yardstick evaluated/lone": "evaluated/lone/eval-test.safetensors: no such file; write it with",
    "evaluate run --yardstick evaluated/torn": "evaluated/torn/eval-test.safetensors: not the values of an evaluation",
    "evaluate run --yardstick evaluated/other": "evaluated/other/eval-test.safetensors: belongs to another evaluation",
    "evaluate run --yardstick evaluated/damaged": "evaluated/damaged/eval-test.json: not an evaluation",
    "compare evaluated/good evaluated/old": "evaluated/old/eval-test.json: has no data_fingerprint, so it may be of",
    "compare evaluated/good evaluated/lone": "evaluated/lone/eval-test.safetensors: no such file; write it with",
    "compare evaluated/good evaluated/moved": "moved cannot be compared with good: it has other sentences",
    "compare evaluated/good evaluated/damaged --json": "evaluated/damaged/eval-test.json: not an evaluation",
    "compare nope": "nope: no such directory",
    "compare empty": "empty: neither a run directory",
    "compare run": "vae-ds evaluate run --split test",
    "compare .": "none of the 2 runs was evaluated on the test split",
    "report nope --to out": "nope: no such directory",
    "report empty --to out": "empty: neither",
    "status nope": "nope: no such directory",
    "status empty": "empty has no status.json",
    "export nope --to out": "nope: no such directory",
    "export begun --to out": "begun: no model/ yet",
    "export run --to file": "--to file: file is a file; choose another directory",
    "prior nope --kind flow": "nope: no such directory",
    "prior model --kind flow": "model is an exported model, which has no data settings; select the data with --recipe",
    "reconstruct nope": "nope: no such directory",
    "reconstruct model": "give sentences",
    "sample nope": "nope: no such directory",
    "interpolate nope a b": "nope: no such directory",
    "analogy nope a b c": "nope: no such directory",
    "traverse nope a": "nope: no such directory",
    "encode nope a": "nope: no such directory",
    "encode model --file nope.txt": "nope.txt: cannot be read: No such file or directory",
    "encode model a --to codes.pt": "--to codes.pt: the ending must be one of",
    "decode nope codes.npz": "nope: no such directory",
    "decode model codes.npz": "codes.npz: no such file; write codes with `vae-ds encode model --to FILE`",
    "neighbours nope a --corpus file": "file: is empty",
    "logprob model": "no text is given",
    "shift model a --negative nope.txt --positive file": "nope.txt: cannot be read",
    "train nope": "no recipe `nope`",
    "train nope.yaml": "nope.yaml: no such recipe file",
    "train demo --run-dir file": "--run-dir file: file is a file; choose another directory",
    "train demo --run-dir file/below": "--run-dir file/below: file is a file; choose another directory",
    "train demo --run-dir /proc/vae_ds": "--run-dir /proc/vae_ds: cannot be written (/proc: ",
    "train demo --run-dir file --dry-run": "--run-dir file: file is a file; choose another directory",
    "pretrain pretrain-tiny --run-dir file": "--run-dir file: file is a file; choose another directory",
    "study recommended --here --runs file": "--runs file: file is a file; choose another directory",
    "bench soak --run-dir file": "--run-dir file: file is a file; choose another directory",
    "train": "the recipe is missing",
    "study": "the study is missing",
    "train --set seed=1 demo twice": "the recipe is missing; give a YAML file",
    "train demo --set seed": "--set seed: write KEY=VALUE",
    "train demo --set phases.0.steps=x seed=1": "--set phases.0.steps=x: input should be a valid integer",
    "train --set model.latent_dim=0 seed=1 demo": "--set model.latent_dim=0: input should be greater than",
    "train demo --set phases.0.stpes=3": "--set phases.0.stpes=3: unknown key `phases.0.stpes` (did you mean `steps`?)",
    "train demo --set phases.0.steps=3 phases.0.epochs=1": "--set phases.0.steps=3 phases.0.epochs=1: `phases.0`",
    "train demo --set phases.0.name=full": "--set phases.0.name=full: phase names must differ",
    "train demo --set batch.global=[": "--set batch.global=[: not valid YAML",
    "train wrong.yaml --set seed=1": "wrong.yaml: `phases` is missing; unknown key `sed`",
}
CODE = """
import contextlib, io, json, sys
from vae_ds import cli
found = {}
for words in json.loads(sys.stdin.read()):
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            code = cli.run(words.split())
        except SystemExit as end:
            code = end.code
    found[words] = (code, told.getvalue(), "torch" in sys.modules)
print(json.dumps(found))
"""


def _evaluated(folder: Path) -> None:
    metrics = {"rec": 20.0, "kl": 3.0, "nelbo": 23.0, "sentences": 4}
    for name in ("good", "old", "lone", "torn", "other", "damaged"):
        write_evaluation(folder / name, metrics)
        (folder / name / "config.json").write_text("{}", encoding="utf-8")
    write_evaluation(folder / "moved", metrics, data=DATA | {"texts": "f" * 16, "lengths": "f" * 16})
    (folder / "old" / "eval-test.json").write_text(json.dumps(metrics), encoding="utf-8")
    (folder / "lone" / "eval-test.safetensors").unlink()
    (folder / "torn" / "eval-test.safetensors").write_bytes(b"torn")
    write_evaluation(folder / "twin", metrics | {"rec": 21.0})
    (folder / "twin" / "eval-test.safetensors").replace(folder / "other" / "eval-test.safetensors")
    shutil.rmtree(folder / "twin")
    (folder / "damaged" / "eval-test.json").write_text("{", encoding="utf-8")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, bool]]:
    """Exit code, output, and whether torch was imported, after each of the commands, in one process."""
    folder = tmp_path_factory.mktemp("early")
    work = folder / "work"
    for name in ("empty", "begun", "model", "run/model"):
        (work / name).mkdir(parents=True)
    (work / "file").touch()
    for name in ("begun", "run"):
        (work / name / "config.yaml").write_text("name: x\n", encoding="utf-8")
    for name in ("model", "run/model"):
        (work / name / "config.json").write_text("{}", encoding="utf-8")
    _evaluated(work / "evaluated")
    (work / "wrong.yaml").write_text("name: x\nsed: 1\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps(list(CASES)),
        cwd=work,
        env=clean_environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not (work / "out").exists()
    found: dict[str, tuple[int, str, bool]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("words", CASES)
def test_wrong_arguments_are_told_in_one_line_before_torch_is_imported(
    words: str, told: dict[str, tuple[int, str, bool]]
) -> None:
    code, output, has_torch = told[words]
    assert code == 2, output
    (line,) = output.splitlines()
    assert line.startswith("error: ")
    assert CASES[words] in line
    assert not has_torch


def test_a_comparison_needs_no_torch(tmp_path: Path) -> None:
    _evaluated(tmp_path)
    code = "import sys; from vae_ds import cli; cli.run(sys.argv[1:]); assert 'torch' not in sys.modules"
    for option in ([], ["--json"]):
        words = ["compare", str(tmp_path / "good"), str(tmp_path / "good-too"), *option]
        shutil.copytree(tmp_path / "good", tmp_path / "good-too", dirs_exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            env=clean_environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "0.00 ± 0.00" in done.stdout or '"mean": 0.0' in done.stdout
