"""The report: numbers as in the evaluations, corrected rows of the paper, and figures that show every run."""

import csv
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

from support.evaluated import change_evaluation
from support.tiny import make_base
from vae_ds import cli
from vae_ds.config.settings import RunConfig
from vae_ds.config.yaml_tree import override
from vae_ds.data.corpora import grammar
from vae_ds.runtime.evaluations import with_error
from vae_ds.studies import figures, runs, setting_words
from vae_ds.studies.figures import Curve, Point
from vae_ds.studies.published import PAPER, published_rows
from vae_ds.studies.report import pareto_front

RECIPE = """
name: small
model: {{base: {base}, latent_dim: 4}}
data: {{corpus: grammar, sentences: {{train: 64, valid: 12, test: 20}}, max_tokens: 80, cache_dir: {cache}}}
batch: {{global: 16}}
precision: fp32
phases:
  - {{name: warmup, steps: 2, freeze: [decoder, embeddings], beta: {{schedule: constant, value: 0}}}}
  - {{name: full, steps: 4, beta: {{schedule: constant, value: 1}}}}
validation: {{every_steps: 2, sentences: 12}}
logging: {{every: 3, tensorboard: false, progress: false}}
evaluation: {{iw_samples: 2, bleu_sentences: 0, samples: 4}}
"""
DENOISE = ["phases.0.denoise", "phases.1.denoise"]
README_LIMIT_BYTES = 60_000
LOOK = ("#000000", "o")  # of a point


def code_of(*words: object) -> int:
    try:
        return cli.run([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """study/plain and study/noisy, evaluated; study/left, a copy without its evaluation; yardstick, evaluated."""
    root = tmp_path_factory.mktemp("report")
    base = make_base(root / "base", "t5", num_layers=1, num_decoder_layers=1)
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base, cache=root / "cache"), encoding="utf-8")
    changes = {
        "yardstick": ["model.injection=none", "phases.0.freeze=[]"],
        "study/plain": ["phases.1.free_bits.nats=0.5"],
        "study/noisy": ["phases.1.free_bits.nats=0.5", *(f"{key}=0.4" for key in DENOISE)],
    }
    for name, settings in changes.items():
        assert code_of("train", recipe, "--run-dir", root / name, "--set", *settings) == 0
        yardstick = [] if name == "yardstick" else ["--yardstick", root / "yardstick"]
        assert code_of("evaluate", root / name, *yardstick) == 0
    shutil.copytree(root / "study" / "plain", root / "study" / "left")
    (root / "study" / "left" / "eval-test.json").unlink()
    return root


@pytest.fixture(scope="module")
def report(trained: Path) -> Path:
    folder = trained / "reports" / "first"
    assert code_of("report", trained / "study", trained / "yardstick", "--to", folder, "--paper") == 0
    return folder


def evaluation(run: Path) -> dict[str, object]:
    found = json.loads((run / "eval-test.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def texts(svg: Path) -> list[str]:
    """The words in an SVG, which is parsed as XML."""
    root = ElementTree.parse(svg).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


# Tables


def test_the_numbers_are_those_of_the_evaluations(trained: Path, report: Path) -> None:
    every, layout = rows_of(report / "runs.csv"), rows_of(report / "table-grammar.csv")
    for name, run in {"plain": "study/plain", "noisy": "study/noisy", "yardstick": "yardstick"}.items():
        metrics = evaluation(trained / run)
        compared = 0
        for key, value in metrics.items():
            for row in (every[name], layout[name]):
                if key in row and key != "model":
                    assert row[key] == ("" if value is None else str(value)), (name, key)
                    compared += 1
        assert compared > 25
        assert layout[name]["tokens_per_sentence"] == str(int(str(metrics["tokens"])) / 20)
    assert {every[name]["set:phases.warmup.denoise"] for name in ("plain", "yardstick")} == {"0"}
    assert every["noisy"]["set:phases.warmup.denoise"] == "0.4"
    for key in ("verdict", "cost", "above_yardstick_se"):
        assert every["plain"][key] == str(evaluation(trained / "study/plain")[key])
    page = (report / "report.md").read_text(encoding="utf-8")
    assert f"- plain: cost: {every['plain']['cost']}".replace("iw_nll", "iw\\_nll") in page
    assert layout["yardstick"]["model"] == "plain language model"
    assert layout["noisy"]["model"] == "Max pool + Denoise 0.4 + KLT 0.5 (per_dim)"


def test_a_run_without_an_evaluation_is_listed(trained: Path, report: Path) -> None:
    page = (report / "report.md").read_text(encoding="utf-8")
    left = trained / "study" / "left"
    assert f"- left: done; `vae-ds evaluate {left} --split test` evaluates it" in page
    assert "3 of 4 runs were evaluated" in page
    assert page.count("Not drawn, because a finite number is missing: left.") == 2
    assert rows_of(report / "runs.csv")["left"]["state"] == "done, not evaluated"
    assert rows_of(report / "runs.csv")["left"]["rec"] == ""
    assert rows_of(report / "table-grammar.csv")["left"]["note"] == "not evaluated (done)"


def test_runs_of_several_seeds_have_their_mean(trained: Path, tmp_path: Path) -> None:
    """Two copies of a run with other seeds and other numbers. A run with one seed is in no mean."""
    folders = [trained / "study" / "noisy", tmp_path / "plain+seed=0", tmp_path / "plain+seed=7"]
    for number, folder in enumerate(folders[1:]):
        shutil.copytree(trained / "study" / "plain", folder)
        recipe = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) | {"seed": 7 * number}
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        change_evaluation(folder, rec=50.0 + 4 * number)
    assert code_of("report", *folders, "--to", tmp_path / "report") == 0
    (row,) = rows_of(tmp_path / "report" / "seeds.csv").values()
    assert (row["run"], row["seeds"], row["rec_mean"]) == ("plain", "2", "52.0")
    assert float(row["rec_sd"]) == pytest.approx(8**0.5)
    assert float(row["rec_se"]) == pytest.approx(2.0)
    assert (row["kl_mean"], row["kl_sd"]) == (str(evaluation(folders[1])["kl"]), "0.0")
    assert row["mi_train_mean"] == str(evaluation(folders[1])["mi_train"])
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert re.search(r"^\| plain \| 2 \| 52 ± 2 \|", page, re.M)


def copied(run: Path, to: Path, seed: int) -> Path:
    """A copy of a run, as if it had another seed."""
    shutil.copytree(run, to)
    recipe = yaml.safe_load((to / "config.yaml").read_text(encoding="utf-8")) | {"seed": seed}
    (to / "config.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return to


def differences_of(report: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (report / "differences.csv").open(encoding="utf-8", newline="") as file:
        return {(row["run"], row["to"]): row for row in csv.DictReader(file)}


def test_differences_are_paired_by_sentence(trained: Path, report: Path) -> None:
    """Against arithmetic on the files of the evaluations."""
    found = differences_of(report)
    # `noisy` is the first of two runs, so its settings are the usual ones.
    assert set(found) == {("plain", "noisy"), ("noisy", "yardstick"), ("plain", "yardstick")}
    files = {"noisy": "study/noisy", "plain": "study/plain", "yardstick": "yardstick"}
    values = {name: load_file(trained / run / "eval-test.safetensors") for name, run in files.items()}
    expected = {
        ("plain", "noisy", "kl"): values["plain"]["kl"] - values["noisy"]["kl"],
        ("plain", "noisy", "iw_nll"): values["plain"]["iw_nll"] - values["noisy"]["iw_nll"],
        ("plain", "yardstick", "nelbo"): values["plain"]["rec"] + values["plain"]["kl"] - values["yardstick"]["rec"],
    }
    for (run, to, name), gaps_N in expected.items():
        row = found[run, to]
        assert (row["over"], row["seeds"], row[f"{name}_count"]) == ("sentences", "0", "20")
        assert float(row[f"{name}_mean"]) == pytest.approx(gaps_N.mean(), rel=1e-4)
        assert float(row[f"{name}_se"]) == pytest.approx(gaps_N.std(ddof=1) / 20**0.5, rel=1e-4)
    assert float(found["plain", "yardstick"]["iw_nll_mean"]) == pytest.approx(
        float(str(evaluation(trained / "study/plain")["above_yardstick"])), rel=1e-4
    )
    assert found["plain", "yardstick"]["kl_mean"] == ""
    swapped = [values[name]["rec_swapped"] - values[name]["rec"] for name in ("plain", "noisy")]
    assert float(found["plain", "noisy"]["z_gain_mean"]) == pytest.approx((swapped[0] - swapped[1]).mean(), rel=1e-3)


def test_differences_of_several_seeds_are_paired_by_seed(trained: Path, tmp_path: Path) -> None:
    """The runs of seed 1 are 30 nats worse, all of them: it does not change the differences, nor their error."""
    rec = float(str(evaluation(trained / "study" / "plain")["rec"]))
    for seed in (0, 1):
        plain = copied(trained / "study" / "plain", tmp_path / "runs" / f"a-plain+seed={seed}", seed)
        noisy = copied(trained / "study" / "noisy", tmp_path / "runs" / f"b-noisy+seed={seed}", seed)
        copied(trained / "yardstick", tmp_path / "runs" / f"lm+seed={seed}", seed)
        change_evaluation(plain, rec=rec + 30 * seed)
        change_evaluation(noisy, rec=rec + 30 * seed + 1 + 2 * seed)
    # Without a run of their seeds to be paired with.
    copied(trained / "study" / "plain", tmp_path / "runs" / "a-plain+seed=8", 8)
    copied(trained / "study" / "noisy", tmp_path / "runs" / "b-noisy+seed=7", 7)
    assert code_of("report", tmp_path / "runs", "--to", tmp_path / "report") == 0
    found = differences_of(tmp_path / "report")
    assert set(found) == {("b-noisy", "a-plain"), ("a-plain", "lm"), ("b-noisy", "lm")}
    row = found["b-noisy", "a-plain"]
    assert (row["seeds"], row["over"], row["rec_count"]) == ("0, 1", "seeds", "2")
    assert float(row["rec_mean"]) == pytest.approx(2.0, abs=1e-4)
    assert float(row["rec_se"]) == pytest.approx(1.0, abs=1e-4)
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert re.search(r"^\| b-noisy \| a-plain \| 0, 1 \| seeds \|", page, re.M)
    assert "standard error over the\n  S seeds" in page


def test_runs_of_two_tokenizers_are_not_compared(trained: Path, tmp_path: Path) -> None:
    """The settings of the data are the same: only the fingerprint tells."""
    for name in ("one", "two"):
        for run in ("plain", "noisy"):
            shutil.copytree(trained / "study" / run, tmp_path / "runs" / f"{name}-{run}")
    for run in ("plain", "noisy"):
        folder = tmp_path / "runs" / f"two-{run}"
        change_evaluation(folder, data={**evaluation(folder)["data_fingerprint"], "tokenizer": "ABCDEF0123456789"})  # type: ignore[dict-item]
    shutil.copytree(trained / "study" / "left", tmp_path / "runs" / "left")
    groups = runs.by_data(runs.read_runs([tmp_path / "runs"]))
    assert sorted([run.name for run in members] for members in groups.values()) == [
        ["one-noisy", "one-plain", "left"],
        ["two-noisy", "two-plain"],
    ]
    assert code_of("report", tmp_path / "runs", "--to", tmp_path / "report") == 0
    assert (tmp_path / "report" / "rate-distortion-grammar-tokenizer-ABCDEF.png").is_file()
    found = differences_of(tmp_path / "report")
    assert set(found) == {("one-plain", "one-noisy"), ("two-plain", "two-noisy")}
    assert found["two-plain", "two-noisy"]["data"] == "grammar, tokenizer ABCDEF"
    assert code_of("compare", tmp_path / "runs") == 2


def files_of(report: Path) -> list[str]:
    """The files of a report, without that of TensorBoard, which has the time in it."""
    return sorted(file.name for file in report.iterdir() if "tfevents" not in file.name)


def test_tensorboard_shows_the_figures(report: Path) -> None:
    (events,) = report.glob("*tfevents*")
    shown = events.read_bytes()
    figures = list(report.glob("*.png"))
    assert figures
    for figure in figures:
        assert figure.read_bytes() in shown


def test_the_page_shows_what_the_folder_has(report: Path) -> None:
    """The page links each table and figure in the folder, and has the rounded numbers."""
    page = (report / "report.md").read_text(encoding="utf-8")
    for name in files_of(report):
        assert name == "report.md" or f"({name})" in page
    first_table = next(line for line in page.split("\n") if line.startswith("|"))
    assert first_table.split(" | ")[1:7] == ["verdict", "rec", "kl", "nelbo", "iw_nll", "above_yardstick"]
    for name, row in rows_of(report / "runs.csv").items():
        if row["rec"]:
            assert any(
                line.startswith(f"| {name} |") and with_error(float(row["rec"]), float(row["rec_se"])) in line
                for line in page.split("\n")
            )


def test_the_same_runs_give_the_same_bytes(trained: Path, report: Path) -> None:
    again = trained / "reports" / "again"
    assert code_of("report", trained / "study", trained / "yardstick", "--to", again, "--paper") == 0
    files = files_of(report)
    assert files == files_of(again)
    assert [name for name in files if (report / name).read_bytes() != (again / name).read_bytes()] == []


# The paper's rows


def test_the_printed_rows_are_corrected(report: Path) -> None:
    """The arithmetic on Yahoo: the number printed as -ELBO is rec - KL."""
    with (report / "table-1-yahoo.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["tokens_per_sentence"]]
    assert [round(float(row["rec"]), 1) for row in rows] == [343.2, 343.4, 343.6, 296.1]
    assert [round(float(row["tokens_per_sentence"]), 1) for row in rows] == [113.0] * 4
    assert [float(row["paper_nelbo"]) for row in rows] == [343.02, 301.86, 223.69, 140.57]
    # By hand: the first row is 343.02 + 0.21 + 0.21.
    assert float(rows[0]["nelbo"]) == pytest.approx(343.44)


def test_runs_stand_beside_the_numbers_of_their_corpus(trained: Path, report: Path, tmp_path: Path) -> None:
    """As if a run and a yardstick were on yelp, and a run without an evaluation on yahoo."""
    for name, corpus in {"study/plain": "yelp", "yardstick": "yelp", "study/left": "yahoo"}.items():
        run = tmp_path / "runs" / Path(name).name
        shutil.copytree(trained / name, run)
        recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        recipe["data"]["corpus"] = corpus
        (run / "config.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert code_of("report", tmp_path / "runs", "--to", tmp_path / "report") == 0
    found = {}
    for corpus in ("yelp", "yahoo"):
        with (tmp_path / "report" / f"published-{corpus}.csv").open(encoding="utf-8", newline="") as file:
            found[corpus] = list(csv.DictReader(file))
        theirs = [row for row in published_rows() if row.corpus == corpus and row.source != PAPER]
        shown = [(row["model"], row["iw_nll"], row["nelbo"], row["remark"]) for row in found[corpus][: len(theirs)]]
        assert shown == [tuple(str(v or "") for v in (r.model, r.iw_nll, r.nelbo, r.remark)) for r in theirs]
        assert len(theirs) > 9
    assert not (tmp_path / "report" / "published-ptb.csv").exists()
    plain, yardstick = ({row["run"]: row for row in found["yelp"]}[name] for name in ("plain", "yardstick"))
    for key in ("iw_nll", "nelbo", "rec", "kl", "mi", "au", "ppl", "iw_ppl"):
        assert plain[key] == str(evaluation(trained / "study/plain")[key]), key
    assert (plain["unit"], plain["bound"], yardstick["bound"]) == ("word", "yes", "exact")
    assert found["yahoo"][-1]["remark"] == "not evaluated (done)"
    assert found["yahoo"][-1]["bound"] == ""
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    section = page.partition("## Published numbers")[2].partition("\n## ")[0]
    assert "Perplexities of other tokenisations, or on other test sentences, do not compare." in section
    assert "cannot exceed ln 32 = 3.47" in section
    # No run of the first report is on a corpus with published numbers.
    assert "## Published numbers" not in (report / "report.md").read_text(encoding="utf-8")


# Figures


def test_every_figure_is_a_complete_and_small_image(report: Path) -> None:
    names = {"phase-1", "phase-2", "rate-distortion", "perplexity-information"}
    page = (report / "report.md").read_text(encoding="utf-8")
    assert "the counterpart of the paper's Figure 2" in page.partition("## Phase 2")[0]
    assert "the counterpart of the paper's Figure 3" in page.partition("## Phase 2")[2]
    assert {file.stem for file in report.glob("*.png")} == {file.stem for file in report.glob("*.svg")} == names
    for file in report.glob("*.png"):
        assert file.stat().st_size < README_LIMIT_BYTES
        with Image.open(file) as image:
            image.load()
            assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 8


def test_the_figures_name_the_runs_by_what_differs(report: Path, trained: Path) -> None:
    """`left` is `plain` again, so their curves are one. In the planes they would share a label, and go by name."""
    for name in ("phase-1", "phase-2"):
        words = texts(report / f"{name}.svg")
        assert {"no denoising", "denoising 0.4", "mutual information (nats)", "KL (nats)"} <= set(words)
        assert any("active units" in word for word in words)
        assert sum("denoising" in word for word in words) == 2
    rec = float(str(evaluation(trained / "yardstick")["rec"]))
    words = texts(report / "rate-distortion.svg")
    assert {"denoising 0.4", "plain", f"language model: {rec:.1f} nats"} <= set(words)
    assert f"entropy of the source: {grammar.entropy_nats():.1f} nats" in words
    assert evaluation(trained / "yardstick")["truncated"] == 0
    assert any(word.startswith("nelbo ") for word in words)
    words = texts(report / "perplexity-information.svg")
    assert {"Pareto front", "language model", "iw_nll minus that of the language model (nats per sentence)"} <= set(
        words
    )
    assert "mi_train: mutual information (nats)" in words
    assert "perplexity per word, relative to the language model" in words


def test_many_runs_are_drawn_by_what_they_differ_in(trained: Path, tmp_path: Path) -> None:
    """Fourteen runs: a reference, and others that differ from it in one thing or in more."""
    changes: dict[str, dict[str, object]] = {"reference": {}}
    changes |= {f"denoise-{n}": {"phases.1.denoise": n / 10} for n in range(1, 6)}
    changes |= {f"bits-{n}": {"phases.1.free_bits": {"mode": "total", "nats": n}} for n in range(1, 5)}
    changes |= {"mean": {"model.pooling": "mean"}, "all": {"model.pool_layers": "all"}}
    changes |= {"two": {"model.pooling": "mean", "phases.1.denoise": 0.1}, "warm": {"phases.0.denoise": 0.3}}
    for number, (name, settings) in enumerate(changes.items()):
        run = tmp_path / "study" / name
        shutil.copytree(trained / "study" / "plain", run)
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        (run / "config.yaml").write_text(yaml.safe_dump(override(config, words)), encoding="utf-8")
        # Without a yardstick and training sentences, as `vae-ds evaluate` has it by default.
        nll = 500.0 if name == "bits-2" else 50.0 + number
        change_evaluation(run, mi=1 + number / 10, iw_nll=nll, above_yardstick=None, mi_train=None)
    folder = tmp_path / "out"
    assert code_of("report", tmp_path / "study", trained / "yardstick", "--to", folder) == 0
    # Up to the end of phase 1, what phase 2 has cannot tell runs apart.
    assert {file.stem for file in folder.glob("*.png")} == {
        *("phase-1-pooling", "phase-1-denoise", "phase-2-pooling", "phase-2-denoise", "phase-2-free_bits"),
        *("phase-2-several", "rate-distortion", "perplexity-information"),
    }
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert all(f"({file.name})" in page for file in folder.glob("*.png"))
    legend = set(texts(folder / "phase-2-free_bits.svg"))
    assert {f"free bits {n}, in total" for n in range(1, 5)} <= legend
    assert "free bits 0.5, per unit" in legend
    for name in ("rate-distortion", "perplexity-information"):
        found_words = set(texts(folder / f"{name}.svg"))
        assert {"reference", "pooling", "denoising", "free bits (KL threshold)", "several settings"} <= found_words
        assert not any(re.match(r"free_bits|phases\.", word) for word in found_words)
    # bits-2 is worse than all others by far: it is beyond the axes, and named.
    words = texts(folder / "perplexity-information.svg")
    nll = float(str(evaluation(trained / "yardstick")["iw_nll"]))
    assert {f"language model: {nll:.1f} nats", "iw_nll (nats per sentence)"} <= set(words)
    notes = [word for word in words if "Beyond the axes" in word]
    assert len(notes) == 1
    assert notes[0].endswith("bits-2 (1.70, 500.0)")
    assert "Beyond the axes of this figure, with `mi` and `iw_nll`: bits-2 (1.70, 500.0)." in page
    # Each other run has more of both than the run before: these are on the front.
    front = page.partition("On the front, by `iw_nll` and `mi`, from the lowest `mi` on: ")[2].splitlines()[0]
    assert front.count(", ") == 12
    assert "bits-2" not in front
    # The table of the groups names every run.
    groups = page.partition("## Groups of runs")[2].partition("## Phase 1")[0]
    assert all(name in groups for name in changes)
    (denoising,) = [line for line in groups.splitlines() if line.startswith("| denoising |")]
    assert sorted(denoising.strip("| ").split(" | ")[1].split(", ")) == [*(f"denoise-{n}" for n in range(1, 6)), "warm"]


@pytest.mark.parametrize("count", [4, 9])
def test_a_run_has_one_colour_in_all_figures(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """In the planes and in the figures of a phase, with a few runs and with many."""
    recipe = yaml.safe_load((trained / "study" / "plain" / "config.yaml").read_text(encoding="utf-8"))
    for n in range(count):
        run = tmp_path / "study" / f"run-{n}"
        shutil.copytree(trained / "study" / "plain", run)
        changed = override(recipe, [f"phases.1.free_bits.nats={n / 4}"])
        (run / "config.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
        change_evaluation(run, kl=2.0 + n)
    curves: dict[str, str] = {}
    points: dict[str, set[str]] = defaultdict(set)

    def phase(folder: Path, name: str, title: str, drawn: list[Curve]) -> None:
        if name.startswith("phase-2"):
            curves.update({curve.label: curve.colour for curve in drawn})

    def plane(folder: Path, name: str, title: str, *arguments: Any) -> list[Point]:
        for point in next(a for a in arguments if isinstance(a, list) and a and isinstance(a[0], Point)):
            points[point.label].add(point.colour)
        return []

    monkeypatch.setattr(figures, "phase", phase)
    monkeypatch.setattr(figures, "rate_distortion", plane)
    monkeypatch.setattr(figures, "perplexity_information", plane)
    assert code_of("report", tmp_path / "study", "--to", tmp_path / "report") == 0
    assert len(curves) == len(points) == count
    for n in range(count):
        label = f"free bits {n / 4:g}" if n else "no free bits"
        assert points[label if count == 4 else f"run-{n}"] == {curves[label]}
    # A panel has the reference and at most five shades.
    assert len(set(curves.values())) == min(count, 6)


def test_the_pareto_front() -> None:
    best = [Point("a", 1.0, 20.0, *LOOK), Point("b", 3.0, 25.0, *LOOK), Point("c", 5.0, 40.0, *LOOK)]
    beaten = [Point("d", 2.9, 25.0, *LOOK), Point("e", 3.0, 26.0, *LOOK), Point("f", 0.0, 90.0, *LOOK)]
    twin = Point("g", 5.0, 40.0, *LOOK)
    assert pareto_front([*beaten, *best, twin]) == [*best, twin]
    assert pareto_front([]) == []


# Runs side by side


def test_validations_go_to_their_phase(trained: Path) -> None:
    """In phase `full` the training logs steps 5 and 6 and validates at 4: the logged rows give the phases' ends."""
    (plain,) = runs.read_runs([trained / "study" / "plain"])
    stored = [json.loads(line) for line in (plain.path / "evaluations.jsonl").read_text().splitlines()]
    found = runs.validations(plain)
    assert {phase: [row["step"] for row in rows] for phase, rows in found.items()} == {1: [2], 2: [2, 4]}
    assert [row["kl"] for rows in found.values() for row in rows] == [row["kl"] for row in stored]


def test_an_unfinished_row_is_left_out_and_a_broken_row_is_an_error(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "study" / "plain", tmp_path / "run")
    path = tmp_path / "run" / "evaluations.jsonl"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + '{"step": 7, "ki', encoding="utf-8")
    (run,) = runs.read_runs([tmp_path / "run"])
    assert sum(map(len, runs.validations(run).values())) == 3
    path.write_text(whole + '{"step": 7, "ki\n', encoding="utf-8")
    assert code_of("report", tmp_path / "run", "--to", tmp_path / "out") == 2
    assert_one_line(capsys, "evaluations.jsonl")


def settings_of(*changes: str) -> dict[str, object]:
    tree = {
        "phases": [
            {"name": "warmup", "steps": 10, "freeze": ["decoder"]},
            {"name": "full", "epochs": 3, "beta": {"schedule": "linear", "over_steps": 5}},
        ]
    }
    return runs._settings(RunConfig.model_validate(override(tree, changes)))


def test_labels_have_what_differs_and_no_more() -> None:
    every = [
        settings_of("phases.0.denoise=0.15", "phases.1.denoise=0.15", "data.cache_dir=/a", "logging.every=3"),
        settings_of("phases.0.freeze=[]", "model.pooling=mean", "phases.1.steps=7"),
    ]
    keys = runs.differing(every)
    assert setting_words.label(every[0], keys) == "max pooling, decoder frozen, denoising 0.15, 3 epochs"
    assert setting_words.label(every[1], keys) == "mean pooling, nothing frozen, no denoising, 7 steps"


def test_phases_are_compared_by_name() -> None:
    """A run without the warm-up differs in its phases, but not in the settings of the phase that it lacks."""
    both = settings_of("phases.1.optimizer.lr=0.002", "phases.0.denoise=0.4")
    (alone,) = [settings_of("phases.1.denoise=0.15")]
    alone = {key: value for key, value in alone.items() if not key.startswith("phases.warmup.")} | {"phases": ["full"]}
    keys = runs.differing([both, alone])
    assert set(keys) == {"phases", "phases.full.optimizer.lr", "phases.full.denoise"}
    assert setting_words.label(alone, keys) == "one phase (full), denoising 0.15, learning rate 0.001"


def test_two_phases_that_differ_are_told_apart() -> None:
    every = [settings_of("phases.0.denoise=0.4"), settings_of("phases.1.denoise=0.15")]
    keys = runs.differing(every)
    assert setting_words.label(every[0], keys) == "denoising 0.4 (warmup), no denoising (full)"


# Wrong input


def assert_one_line(capsys: pytest.CaptureFixture[str], named: str) -> None:
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, told
    assert named in lines[0]
    assert "Traceback" not in told


def test_a_path_without_runs(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("report", tmp_path / "nothing", "--to", tmp_path / "out") == 2
    assert_one_line(capsys, "nothing")
    # A good run beside it changes nothing.
    assert code_of("report", trained / "yardstick", tmp_path, "--to", tmp_path / "out") == 2
    assert_one_line(capsys, str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_a_file(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert code_of("report", trained / "yardstick", "--to", tmp_path / "file") == 2
    assert_one_line(capsys, "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_broken_evaluation(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "yardstick", tmp_path / "run")
    (tmp_path / "run" / "eval-test.json").write_text("{", encoding="utf-8")
    assert code_of("report", tmp_path / "run", "--to", tmp_path / "out") == 2
    assert_one_line(capsys, "eval-test.json")


def changed(run: Path, to: Path, *settings: str) -> Path:
    """A copy of a run with other settings."""
    shutil.copytree(run, to)
    recipe = yaml.safe_load((to / "config.yaml").read_text(encoding="utf-8"))
    (to / "config.yaml").write_text(yaml.safe_dump(override(recipe, settings)), encoding="utf-8")
    return to


def test_a_yardstick_of_other_data(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "study" / "plain" / "eval-test.json").read_bytes()
    for number, (setting, told) in enumerate(
        {
            "data.max_tokens=20": "other lengths of the kept text (data.max_tokens)",
            "data.seed=5": "other sentences",
        }.items()
    ):
        run = changed(trained / "study" / "plain", tmp_path / f"run-{number}", setting)
        assert code_of("evaluate", run, "--yardstick", trained / "yardstick") == 2
        assert_one_line(capsys, f"{trained / 'yardstick'} cannot be compared with {run}: it has {told}")
        assert (run / "eval-test.json").read_bytes() == before


def test_a_split_of_one_sentence_has_no_errors(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is evaluated, compared and reported, without what needs two sentences."""
    one = "data.sentences.test=1"
    runs = [changed(trained / name, tmp_path / name, one) for name in ("yardstick", "study/plain", "study/noisy")]
    for run in runs:
        yardstick = [] if run is runs[0] else ["--yardstick", runs[0]]
        assert code_of("evaluate", run, *yardstick, "--mi-train-sentences", "30") == 0
    found = evaluation(runs[1])
    assert (found["z_gain"], found["rec_se"], found["above_yardstick_se"]) == (None, None, None)
    assert found["mi_train_sentences"] == 30
    assert "plain: 1 sentence is too few for standard errors, z_gain and a verdict" in capsys.readouterr().out
    assert code_of("compare", *runs) == 0
    assert code_of("report", *runs, "--to", tmp_path / "out") == 0
    row = differences_of(tmp_path / "out")["noisy", "yardstick"]
    plain, noisy = (float(str(evaluation(run)["rec"])) for run in (runs[0], runs[2]))
    assert float(row["rec_mean"]) == pytest.approx(noisy - plain, rel=1e-5)
    assert row["rec_se"] == ""


@pytest.mark.parametrize("command", ["report", "compare"])
def test_an_evaluation_of_an_older_version(
    command: str, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not say what it was computed on."""
    old = shutil.copytree(trained / "study" / "plain", tmp_path / "old")
    found = {key: value for key, value in evaluation(old).items() if key != "data_fingerprint"}
    (old / "eval-test.json").write_text(json.dumps(found), encoding="utf-8")
    target = ["--to", tmp_path / "out"] if command == "report" else []
    assert code_of(command, trained / "study" / "noisy", old, *target) == 2
    assert_one_line(capsys, f"write it again with `vae-ds evaluate {old} --split test`")
    assert not (tmp_path / "out").exists()


def test_missing_values_of_the_sentences(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Differences need them; a run alone does not."""
    run = shutil.copytree(trained / "study" / "plain", tmp_path / "run")
    (run / "eval-test.safetensors").unlink()
    assert code_of("report", trained / "yardstick", run, "--to", tmp_path / "out") == 2
    assert_one_line(capsys, f"{run}/eval-test.safetensors: no such file; write it with `vae-ds evaluate {run}")
    assert code_of("report", run, "--to", tmp_path / "out") == 0


def test_the_yardstick_alone_has_tables_and_no_figure(tmp_path: Path, trained: Path) -> None:
    assert code_of("report", trained / "yardstick", "--to", tmp_path / "out") == 0
    assert not list((tmp_path / "out").glob("*.png"))
    assert rows_of(tmp_path / "out" / "runs.csv")["yardstick"]["mi"] == ""


@pytest.mark.parametrize(
    ("settings", "has_tables"),
    [
        ({}, False),
        ({"name": "papers"}, False),
        ({"name": "paper-plain"}, True),
        ({"data": {"corpus": "ptb", "path": "data/ptb"}}, True),
    ],
)
def test_the_tables_of_the_paper_need_a_reason(
    settings: dict[str, Any], has_tables: bool, trained: Path, tmp_path: Path
) -> None:
    """A run on one of its corpora, or of its study. Otherwise, one asks for them with `--paper`."""
    run = shutil.copytree(trained / "study" / "plain", tmp_path / "run")
    recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) | settings
    (run / "config.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert code_of("report", run, trained / "yardstick", "--to", tmp_path / "out") == 0
    assert ("## The paper's tables" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")) == has_tables
    assert bool(list((tmp_path / "out").glob("table-*.csv"))) == has_tables


def test_unknown_tokens_are_noted_from_one_percent_on(trained: Path, tmp_path: Path) -> None:
    for name, share in (("little", 0.0099), ("much", 0.0123)):
        run = shutil.copytree(trained / "study" / "plain", tmp_path / "runs" / name)
        change_evaluation(run, unk=share)
    assert code_of("report", tmp_path / "runs", "--to", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "- much: 1.2% of the tokens are unknown to the tokenizer" in page
    assert "- little: 1.0%" not in page


def test_a_directory_of_runs_can_be_compared(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert code_of("compare", trained / "study", trained / "yardstick") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["noisy", "plain", "yardstick"]
    assert any(line.split()[:2] == ["minus", "noisy"] for line in lines)
    assert lines[-1] == f" not evaluated on the test split: {trained / 'study' / 'left'}"
    assert code_of("compare", trained / "study", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: metrics["rec"] for name, metrics in found.items()} == {
        name: evaluation(trained / "study" / name)["rec"] for name in ("noisy", "plain")
    }
