"""The commands that use a model on files: what is written, streams, bad lines, and files that never are half there."""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from support.launch import clean_environment, launch
from support.models import taught
from support.tiny import ENGLISH, base
from vae_ds import cli
from vae_ds.cli import using
from vae_ds.model import load_tokenizer
from vae_ds.textvae import TextVAE

UNITS = 4
SHORT = ("--max-new-tokens", "8", "--device", "cpu")
TEXTS = [*ENGLISH[:9], "zwölf 文字 \u2028 x"]
ENDINGS = ("jsonl", "csv", "npz", "safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model whose texts differ from code to code."""
    folder = tmp_path_factory.mktemp("codes") / "model"
    TextVAE(taught(UNITS), load_tokenizer(base()), 100, device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(model: Path) -> TextVAE:
    return TextVAE.from_pretrained(model, device="cpu")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """TEXTS with two blank lines among them, in the third and the sixth place."""
    every = list(TEXTS)
    every.insert(2, "")
    every.insert(5, "  ")
    (tmp_path / "texts.txt").write_bytes("\n".join(every).encode() + b"\r\n")
    return tmp_path / "texts.txt"


PLACES = [1, 2, 4, 5, 7, 8, 9, 10, 11, 12]  # the lines of TEXTS


def told(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[str]:
    capsys.readouterr()
    assert cli.run([str(word) for word in words]) == code
    return capsys.readouterr().out.split("\n")[:-1]  # a text may have other ends of lines


def rows_of(file: Path) -> list[dict[str, str]]:
    if file.suffix == ".csv":
        return list(csv.DictReader(file.open(encoding="utf-8", newline="")))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("skip", [False, True])
def test_codes_are_stored_and_decoded_in_place(
    model: Path, vae: TextVAE, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, skip: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(using, "BATCHES_AT_ONCE", 1)
    file, skips = tmp_path / f"codes.{ending}", ["--skip-bad"] if skip else []
    told(capsys, "encode", model, "--file", lines, "--to", file, "--batch", 3, "--device", "cpu", *skips)
    expected_NL = vae.encode(TEXTS).numpy()
    if ending in ("jsonl", "csv"):
        rows = [row for row in rows_of(file) if not row.get("error")]
        errors = [row for row in rows_of(file) if row.get("error")]
        assert [(int(row["line"]), row["error"]) for row in errors] == (
            [] if skip else [(3, "line 3 is blank"), (6, "line 6 is blank")]
        )
        assert [row["text"] for row in rows] == TEXTS
        assert {row["model"] for row in rows} == {vae.fingerprint}
        z = [row["z"] if ending == "jsonl" else [row[f"z{unit}"] for unit in range(UNITS)] for row in rows]
        z_NL, line = np.array(z, np.float64), [int(row["line"]) for row in rows]
        facts = json.loads((tmp_path / "codes.units.json").read_text())
    else:
        stored = dict(np.load(file)) if ending == "npz" else load_file(file)
        good = np.isfinite(stored["z"]).all(axis=1)
        assert (~good).sum() == (0 if skip else 2)
        assert stored["line"].tolist() == (PLACES if skip else list(range(1, 13)))
        z_NL, line, facts = stored["z"][good], stored["line"][good].tolist(), stored
        if ending == "npz":
            assert (str(stored["model"]), int(stored["dimension"])) == (vae.fingerprint, UNITS)
    assert line == PLACES
    assert np.abs(z_NL - expected_NL).max() < 1e-5
    assert np.asarray(facts["mean"]) == pytest.approx(expected_NL.mean(0), abs=1e-5)
    assert np.asarray(facts["scale"]) == pytest.approx(expected_NL.std(0), abs=1e-5)
    assert list(tmp_path.glob(".part*")) == []

    decoded = told(capsys, "decode", model, file, *SHORT, *skips, "--json")
    rows = [json.loads(row) for row in decoded]
    assert [row["line"] for row in rows] == (PLACES if skip else list(range(1, 13)))
    texts = [row["text"] for row in rows if "text" in row]
    assert texts == vae.reconstruct(TEXTS, max_new_tokens=8)
    assert len(set(texts)) > 3


SMALL_PARTS = """
import sys
from vae_ds import cli
from vae_ds.cli import using
from vae_ds.textvae import code_files
using.BATCHES_AT_ONCE, code_files.AT_ONCE = 1, 3
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.timeout(600)
def test_several_ranks_write_what_one_process_writes(model: Path, lines: Path, tmp_path: Path) -> None:
    """Three ranks and four parts of three lines: codes and texts, drawn and not, and probabilities."""
    how, drawn = ("--device", "cpu", "--batch", "3"), ("--temperature", "0.7", "--seed", "5", *SHORT[:2])
    for world in (1, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        for words in (
            ["encode", model, "--file", lines, "--sampled", "--seed", "2", "--to", folder / "codes.safetensors"],
            ["encode", model, "--file", lines, "--to", folder / "codes.csv"],
            ["decode", model, folder / "codes.safetensors", "--to", folder / "texts.jsonl", *drawn],
            ["sample", model, "-n", "10", "--to", folder / "samples.txt", *drawn],
            ["logprob", model, "--file", lines, "--skip-bad", "--samples", "3", "--to", folder / "logprob.csv"],
        ):
            done = launch(["-c", SMALL_PARTS, *words, *how], processes=world)
            assert "10 texts in " in done.outputs[0]
            assert ("cpu, 3 processes)" in done.outputs[0]) == (world == 3)
            assert "texts in" not in "".join(done.outputs[1:])
    found = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert found == ["codes.csv", "codes.safetensors", "codes.units.json", "logprob.csv", "samples.txt", "texts.jsonl"]
    for name in found:
        assert (tmp_path / "3" / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name


def test_several_ranks_cannot_divide_standard_input(model: Path) -> None:
    done = launch(["-m", "vae_ds", "encode", model, "-"], check=False)
    assert done.codes[0] == 2, done.report()
    assert "error: several ranks cannot divide standard input; give a file" in done.outputs[0]


@pytest.mark.timeout(900)
def test_json_lines_pass_through_a_pipe(model: Path, vae: TextVAE, tmp_path: Path) -> None:
    vae_ds = f"{shlex.quote(sys.executable)} -m vae_ds"
    run = shlex.quote(str(model))
    shell = (
        f"printf 'a cat\\n\\na dog\\n' | {vae_ds} encode {run} - --json --device cpu"
        f" | {vae_ds} decode {run} - --max-new-tokens 8 --device cpu"
    )
    env = clean_environment(tmp_path) | {"PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", shell], env=env, capture_output=True, text=True, timeout=240)
    cat, dog = vae.reconstruct(["a cat", "a dog"], max_new_tokens=8)
    assert done.stdout.splitlines() == [cat, "error: line 2 has no finite code", dog], done.stderr
    assert "Traceback" not in done.stderr
    assert "2 texts in " in done.stderr
    closed = f"yes 'a cat' | head -3000 | {vae_ds} reconstruct {run} - --max-new-tokens 1 --device cpu | head -1"
    done = subprocess.run(["bash", "-c", closed], env=env, capture_output=True, text=True, timeout=240)
    assert done.stdout == "text  a cat\n"
    assert "Error" not in done.stderr


@pytest.mark.parametrize("drawn", [[], ["--temperature", "1", "--seed", "3"]], ids=["greedy", "drawn"])
def test_files_give_what_the_object_gives(
    model: Path, vae: TextVAE, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In parts of three lines, with bad lines between them: the numbers of the texts, and so the draws, stay."""
    monkeypatch.setattr(using, "BATCHES_AT_ONCE", 1)
    monkeypatch.setattr("vae_ds.cli.latents.BATCHES_AT_ONCE", 1)
    how = {"max_new_tokens": 8, **({"temperature": 1.0, "seed": 3} if drawn else {})}
    small = ["--batch", "3", *SHORT, *drawn]
    (tmp_path / "bad.txt").write_text("\n".join(ENGLISH[10:15]), encoding="utf-8")
    (tmp_path / "good.txt").write_text("\n".join(ENGLISH[20:27]) + "\n\n", encoding="utf-8")

    def rows(command: str, *words: object) -> list[dict[str, str]]:
        to = tmp_path / "out.csv"
        told(capsys, command, model, *words, "--to", to, *small)
        return rows_of(to)

    found = rows("reconstruct", "--file", lines)
    assert [row["error"] for row in found if row["error"]] == ["line 3 is blank", "line 6 is blank"]
    assert [row["reconstruction"] for row in found if not row["error"]] == vae.reconstruct(TEXTS, **how)
    direction_L = vae.direction(ENGLISH[10:15], ENGLISH[20:27])
    moved = vae.shift(TEXTS, direction_L, 1.5, **how)
    files = ("bad.txt", "good.txt")
    for command, options in (("shift", ("--negative", "--positive")), ("analogy", ("--past", "--present"))):
        sides = [word for option, file in zip(options, files, strict=True) for word in (option, tmp_path / file)]
        found = rows(command, *sides, "--factor", 1.5, "--file", lines, "--skip-bad")
        assert [(row["source"], row["text"]) for row in found] == list(zip(TEXTS, moved, strict=True))
    assert [row["text"] for row in rows("sample", "-n", 8)] == vae.sample(8, **how)

    found = rows("traverse", "--file", lines, "--unit", 1, "--steps", 3, "--skip-bad")
    assert [int(row["line"]) for row in found] == [place for place in PLACES for _ in range(3)]
    assert [row["text"] for row in found[:3]] == vae.traverse(TEXTS[0], 1, steps=3, **how)
    assert [row["text"] for row in found[-3:]] == vae.traverse(TEXTS[-1], 1, steps=3, first=27, **how)
    (tmp_path / "pairs.txt").write_text("a cat\ta dog\nalone\n" + "\t".join(TEXTS[:2]) + "\n", encoding="utf-8")
    found = rows("interpolate", "--file", tmp_path / "pairs.txt", "--steps", 4)
    assert found[4]["error"] == "line 2 has 1 texts with tabs between them, not 2"
    assert [row["text"] for row in found[5:]] == vae.interpolate(*TEXTS[:2], 4, first=4, **how)
    (tmp_path / "threes.txt").write_text("\t".join(TEXTS[:3]) + "\n", encoding="utf-8")
    assert [row["text"] for row in rows("analogy", "--file", tmp_path / "threes.txt")] == [
        vae.analogy(*TEXTS[:3], **how)
    ]


def test_neighbours_and_probabilities(
    model: Path, vae: TextVAE, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("vae_ds.cli.codes.BATCHES_AT_ONCE", 1)
    how = ("neighbours", model, ENGLISH[3], "a cat", "--corpus", lines, "-k", 3, "--json", "--device", "cpu")
    found = [json.loads(row) for row in told(capsys, *how, "--batch", 2)]
    for place, query in ((0, ENGLISH[3]), (3, "a cat")):
        near = vae.neighbours(query, TEXTS, 3)
        part = found[place : place + 3]
        assert [(row["text"], row["neighbour"]) for row in part] == [(query, one.text) for one in near]
        assert [row["corpus_line"] for row in part] == [PLACES[one.row] for one in near]
        assert [row["distance"] for row in part] == pytest.approx([one.distance for one in near], abs=1e-4)
    codes = tmp_path / "z.npz"
    told(capsys, "encode", model, "--file", lines, "--to", codes, "--device", "cpu")
    again = [json.loads(row) for row in told(capsys, *how, "--codes", codes)]
    assert [row["corpus_line"] for row in again] == [row["corpus_line"] for row in found]

    monkeypatch.setattr(using, "BATCHES_AT_ONCE", 1)
    how = ("logprob", model, "--file", lines, "--samples", 5, "--batch", 2, "--skip-bad", "--device", "cpu")
    found = [json.loads(row) for row in told(capsys, *how, "--json")]
    assert [row["log_prob"] for row in found] == pytest.approx(vae.log_prob(TEXTS, 5).tolist(), abs=1e-3)
    assert told(capsys, *how)[0] == f"{found[0]['log_prob']:10.2f}  {TEXTS[0]}"


def broken_codes(folder: Path, model: str) -> None:
    z_NL = np.zeros((3, UNITS), np.float32)
    np.savez(folder / "wide.npz", z=np.zeros((3, UNITS + 1)))
    np.savez(folder / "flat.npz", z=np.zeros(UNITS))
    np.savez(folder / "other.npz", z=z_NL, model="0123456789abcdef")
    np.savez(folder / "none.npz", y=z_NL)
    np.savez(folder / "words.npz", z=np.full((3, UNITS), "a"))
    np.savez(folder / "empty.npz", z=z_NL[:0])
    (folder / "torn.npz").write_bytes((folder / "other.npz").read_bytes()[:100])
    (folder / "torn.safetensors").write_bytes(b"\x08\x00")
    (folder / "short.jsonl").write_text(json.dumps({"z": [0.0]}) + "\n")
    (folder / "late.jsonl").write_text(json.dumps({"z": [0.0] * UNITS}) + "\n" + json.dumps({"text": "a"}) + "\n")
    (folder / "no.jsonl").write_text("no json\n")
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "words.jsonl").write_text(json.dumps({"z": ["a"] * UNITS}) + "\n")
    (folder / "other.csv").write_text("z0,z1,z2,z3,model\n0,0,0,0,0123456789abcdef\n")
    (folder / "codes.pt").write_text("")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("wide.npz", f"wide.npz: codes of the shape (3, {UNITS + 1}), but this model needs (N, {UNITS})"),
        ("flat.npz", f"flat.npz: codes of the shape ({UNITS},), but"),
        ("other.npz", "other.npz: codes of the model 0123456789abcdef, but this model is "),
        ("none.npz", "none.npz: has no array `z`"),
        ("words.npz", "words.npz: `z` is no matrix of numbers"),
        ("empty.npz", "empty.npz: has no codes"),
        ("torn.npz", "torn.npz: no codes can be read"),
        ("torn.safetensors", "torn.safetensors: no codes can be read"),
        ("short.jsonl", f"short.jsonl: row 1 has a code of 1 units, but this model has {UNITS}"),
        ("late.jsonl", "late.jsonl: row 2 has no code `z`"),
        ("no.jsonl", "no.jsonl: no codes can be read"),
        ("list.jsonl", "list.jsonl: row 1 is no JSON object"),
        ("words.jsonl", "words.jsonl: row 1 has a code with values that are no numbers"),
        ("other.csv", "other.csv: codes of the model 0123456789abcdef"),
        ("codes.pt", "codes.pt: codes are in files with the ending"),
        ("absent.npz", "absent.npz: no such file"),
    ],
)
def test_wrong_codes_get_one_line_and_write_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, message: str
) -> None:
    broken_codes(tmp_path, "")
    before = sorted(tmp_path.iterdir())
    assert cli.run(["decode", str(model), str(tmp_path / file), "--to", str(tmp_path / "out.txt"), *SHORT]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {tmp_path}/")
    assert message in error
    assert "\n" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_codes_that_are_not_finite_keep_their_place(
    model: Path, vae: TextVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    z_NL = np.random.default_rng(0).standard_normal((3, UNITS))
    z_NL[1, 2] = np.inf
    np.savez(tmp_path / "z.npz", z=z_NL)  # what other programs write: float64, without a model
    first, last = vae.decode(z_NL[[0, 2]], max_new_tokens=8)
    assert told(capsys, "decode", model, tmp_path / "z.npz", *SHORT) == [
        first,
        "error: line 2 has no finite code",
        last,
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "--file", "empty.txt"], "empty.txt: is empty; it needs one text per line"),
        (["encode", "--file", "absent.txt"], "absent.txt: cannot be read: No such file or directory"),
        (["encode", "--file", "."], ".: cannot be read: Is a directory"),
        (["encode", "--file", "zero.bin"], "zero.bin: line 1 has a zero byte; this is no text file"),
        (["encode", "--file", "latin.txt", "--to", "z.npz"], "latin.txt: line 2 is not UTF-8 (byte 0xe9)"),
        (["encode", "--file", "long.txt"], "long.txt: line 1 is longer than 1,048,576 bytes"),
        (["encode", "a", "--file", "good.txt"], "texts are given as arguments and with --file good.txt"),
        (["encode"], "no text is given; give texts, --file FILE, or - for standard input"),
        (["logprob", "a", " "], "sentence 2 is empty"),
        (["encode", "a", "--to", "z.parquet"], "--to z.parquet: the ending must be one of .jsonl, .csv, .npz"),
        (["logprob", "a", "--to", "z.npz"], "--to z.npz: the ending must be one of .jsonl, .csv, .txt"),
        (["encode", "a", "--to", "nowhere/z.npz"], "--to nowhere/z.npz: nowhere is no directory"),
        (["interpolate", "a"], "an interpolation needs two sentences; found 1"),
        (["analogy", "a", "b"], "an analogy needs three sentences; found 2"),
        (["analogy", "a", "--past", "good.txt"], "a direction needs two files"),
        (["analogy", "a", "b", "c", "--factor", "2"], "--factor needs the files"),
        (["shift", "a", "--negative", "good.txt", "--positive", "absent.txt"], "absent.txt: cannot be read"),
        (["shift", "a", "--negative", "good.txt", "--positive", "blank.txt"], "blank.txt has only blank lines"),
        (["neighbours", "a", "--corpus", "absent.txt"], "absent.txt: cannot be read"),
        (["neighbours", "a", "--corpus", "blank.txt"], "blank.txt has only blank lines"),
        (["traverse", "a", "--unit", "4"], "the latent units are 0 to 3; found 4"),
        (["reconstruct", "a", "--temperature", "0"], "temperature must be above 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_texts_and_options_get_one_line(
    words: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("blank.txt").write_text("\n \n")
    Path("good.txt").write_text("a cat\n")
    Path("zero.bin").write_bytes(b"\x7fELF\x00\x01\n")
    Path("latin.txt").write_bytes(b"a cat\ncaf\xe9\n")
    Path("long.txt").write_bytes(b"a" * (1 << 21))
    before = sorted(Path().iterdir())
    command, *others = words
    assert cli.run([command, str(model), *others, "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert sorted(Path().iterdir()) == before


def test_an_older_file_stays_if_the_new_one_fails(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_bytes(b"a cat\n" * 200 + b"caf\xe9\n")
    for ending in ("csv", "npz"):
        out = tmp_path / f"out.{ending}"
        out.write_text("before")
        how = ["encode", str(model), "--file", str(tmp_path / "texts.txt"), "--to", str(out), "--batch", "1"]
        assert cli.run([*how, "--device", "cpu"]) == 2
        assert out.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"texts.txt", "out.csv", "out.npz"}


def test_a_gpu_that_is_not_there(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.run(["sample", str(model), "--device", "cuda"]) == 2
    assert "device cuda: this machine has no such usable GPU" in capsys.readouterr().err


@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_file(model: Path, tmp_path: Path) -> None:
    """The parts that are in memory are of one size: a file of 40,000 lines needs no more than one of 4,000."""
    code = (
        "import resource, sys\nfrom vae_ds import cli\nassert cli.run(sys.argv[1:]) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peak_kib = {}
    for count in (4_000, 40_000):
        (tmp_path / "texts.txt").write_text("a cat\n" * count)
        how = ["encode", model, "--file", tmp_path / "texts.txt", "--to", tmp_path / "z.npz", "--device", "cpu"]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, how)],
            env=clean_environment(tmp_path), capture_output=True, text=True, timeout=240, check=True,
        )  # fmt: skip
        peak_kib[count] = int(done.stdout)
        assert np.load(tmp_path / "z.npz")["z"].shape == (count, UNITS)
    assert peak_kib[40_000] - peak_kib[4_000] < 30_000, peak_kib


def test_every_command_has_an_example() -> None:
    (commands,) = [a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    generating = ("decode", "reconstruct", "sample", "interpolate", "analogy", "traverse", "shift")
    for name in ("encode", "neighbours", "logprob", *generating):
        assert f"vae-ds {name} runs/demo" in commands.choices[name].format_help()
