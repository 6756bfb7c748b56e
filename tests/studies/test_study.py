"""Studies: the runs they plan, the complete study of the paper, skipping finished runs, going on after a failure."""

import argparse
import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.launch import launch
from support.processes import state_of
from support.tiny import demo_settings
from vae_ds import cli
from vae_ds.config.settings import RunConfig, StudyConfig
from vae_ds.errors import ConfigError
from vae_ds.runtime import records
from vae_ds.studies import study


def write(path: Path, **keys: Any) -> str:
    path.write_text(yaml.safe_dump({"name": "small", "recipe": "demo", **keys}, sort_keys=False), encoding="utf-8")
    return str(path)


def resolved(config: StudyConfig) -> dict[str, RunConfig]:
    return {row.name: study.resolve(config, row) for row in study.rows(config)}


def test_the_paper_study_has_every_technique() -> None:
    every = resolved(study.load("paper", {"data.corpus": "grammar"}))
    two = [run for run in every.values() if [phase.name for phase in run.phases] == ["warmup", "full"]]
    assert {run.data.corpus for run in every.values()} == {"grammar"}
    assert {run.model.base for run in every.values()} == {"tiny"}
    assert {sum(phase.epochs or 0 for phase in run.phases) for run in every.values()} == {8}
    assert {(run.model.pooling, run.model.pool_layers) for run in every.values()} == {
        (pooling, layers) for pooling in ("max", "mean") for layers in ("last", "all")
    }
    assert {run.model.latent_dim for run in every.values()} == {32, 64, 128}
    assert {run.model.injection for run in every.values()} == {
        *("cross_attention", "self_attention", "embedding", "self_attention+embedding", "none")
    }
    denoising = {tuple(phase.denoise for phase in run.phases) for run in two}
    assert denoising >= {(0, 0), (0.15, 0), (0.4, 0), (0, 0.15), (0, 0.4), (0.15, 0.15), (0.4, 0.4)}
    bits = {(run.phases[1].free_bits.mode, run.phases[1].free_bits.nats) for run in two}
    assert bits >= {(mode, nats) for mode in ("per_dim", "per_dim_batch", "total") for nats in (0.5, 3, 6)}
    assert any(nats == 0 for _, nats in bits)
    betas = [run.phases[-1].beta for run in two]
    assert {beta.schedule for beta in betas} == {"constant", "linear", "cyclical", "target"}
    assert {beta.over_epochs for beta in betas if beta.schedule == "linear"} == {10, 50}
    frozen = {frozenset(run.phases[0].freeze) for run in two}
    assert frozen == {frozenset(), *map(frozenset, (["memory"], ["decoder", "embeddings"]))} | {
        frozenset(["decoder", "embeddings", "memory"])
    }
    assert any(not run.phases[0].sample_posterior for run in two)
    assert any(run.phases[1].reset_decoder for run in two)
    alone = [run.phases[0].beta.schedule for name, run in every.items() if name.startswith("no-warmup")]
    assert sorted(alone) == ["constant", "cyclical", "linear", "linear"]
    assert any(run.phases[0].aggressive for run in every.values())
    assert {"optimus", "encoder-pretraining", "aggressive", "cyclical", "denoising", "language-model"} <= set(every)


def test_the_recommended_recipe_is_measured_against_a_language_model_of_its_budget() -> None:
    config = study.load("recommended", {"data.corpus": "wordnet"})
    pairs = [row for row in study.rows(config) if row.yardstick]
    compared = ("recommended", "normal-prior")
    assert [row.name for row in pairs] == [f"{name}+seed={seed}" for seed in range(3) for name in compared]
    every = resolved(config)
    for row in pairs:
        model, plain = every[row.name], every[str(row.yardstick)]
        assert (model.model.injection, plain.model.injection) == ("self_attention", "none")
        assert model.data.corpus == "wordnet"
        assert (model.seed, model.data, model.evaluation) == (plain.seed, plain.data, plain.evaluation)
        assert model.batch == plain.batch
        assert sum(phase.steps or 0 for phase in model.phases) == sum(phase.steps or 0 for phase in plain.phases)
        assert model.phases[-1].optimizer == plain.phases[-1].optimizer


def test_names_lengths_seeds_and_further_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "small.yaml",
        grid={"model.latent_dim": [2, 4], "model.base": ["google-t5/t5-small"]},
        variants=[
            {"name": "lm", "recipe": "demo-yardstick"},
            {"name": "wide", "recipe": "cyclical", "set": {"model.latent_dim": 64}},
            {"name": "papers", "recipe": "snli"},
        ],
        yardstick="lm",
        seeds=[3],
    )
    deep = ["deep", "model.base=google-t5/t5-base", "phases.0.steps=7"]
    config = study.load(path, {"model.base": "tiny", "data.corpus": "grammar"}, [deep], length=0.5, seeds=[1, 2])
    every = resolved(config)
    names = [
        "latent_dim=2+base=google-t5-t5-small",
        "latent_dim=4+base=google-t5-t5-small",
        "lm",
        "wide",
        "papers",
        "deep",
    ]
    assert list(every) == [f"{name}+seed={seed}" for seed in (1, 2) for name in names]
    assert {run.data.corpus for run in every.values()} == {"grammar"}
    assert every["wide+seed=1"].model.latent_dim == 64
    assert every["wide+seed=2"].seed == 2
    assert every["wide+seed=1"].phases[0].epochs == 10
    papers = every["papers+seed=1"]
    assert [phase.epochs for phase in papers.phases] == [2.5, 1.5]
    assert papers.phases[1].beta.over_epochs == 25
    assert every["deep+seed=1"].model.base == "google-t5/t5-base"
    # Lengths in steps are as they are said.
    assert [phase.steps for phase in every["deep+seed=1"].phases] == [7, 1150]
    yardsticks = {row.name: row.yardstick for row in study.rows(config)}
    assert yardsticks["lm+seed=2"] is None
    assert yardsticks["wide+seed=2"] == "lm+seed=2"


@pytest.mark.parametrize(
    ("keys", "further", "said"),
    [
        ({"variants": [{"name": "a"}], "yardstick": "b"}, (), "`yardstick` is b, which is not a run"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, (), "two runs have the name a"),
        ({"variants": [{"name": "a"}]}, [("b", "no-value")], "no-value"),
        ({"variants": [{"name": "a", "recipe": "demmo"}]}, (), "run a: no recipe `demmo`"),
        ({}, (), "neither `grid` nor `variants`"),
        ({"variants": [{"name": "a"}], "length": 0}, (), "`length`: input should be greater than 0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, keys: dict[str, Any], further: Any, said: str) -> None:
    path = write(tmp_path / "small.yaml", **keys)
    with pytest.raises(ConfigError, match=said):
        study.check(study.load(path, {}, further))


def test_a_study_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"no study `papper` \(did you mean `paper`\?\)"):
        study.load("papper")


def small_study(folder: Path) -> str:
    """Four rows, one of which fails."""
    settings = dict(setting.split("=", 1) for setting in demo_settings(folder))
    return write(
        folder / "small.yaml",
        set={key: yaml.safe_load(value) for key, value in settings.items()}
        | {"evaluation": {"iw_samples": 2, "iw_sentences": 16, "samples": 16, "bleu_sentences": 16}},
        variants=[
            {"name": "plain", "set": {"phases.0.steps": 3, "phases.1.steps": 3}},
            {"name": "bad", "set": {"model.base": str(folder / "none")}},
            {"name": "aggressive", "recipe": "aggressive", "set": {"phases.0.aggressive": {"inner_steps": 2}}},
            {"name": "lm", "recipe": "demo-yardstick", "set": {"phases.0.steps": 3}},
        ],
        yardstick="lm",
        length=0.05,
    )


def test_a_study_runs_on_two_ranks(tmp_path: Path) -> None:
    """The same as on one rank: all ranks take the rows in the same order, and go on after a row that fails."""
    words = ["study", small_study(tmp_path), "--here", "--set", "logging.tensorboard=false"]
    finished = launch(["-m", "vae_ds", *words, "--runs", tmp_path / "two"], processes=2, timeout_s=200, check=False)
    assert finished.codes[0] == 1, finished.report()
    assert finished.output.count("1 of the runs failed: bad") >= 1
    assert cli.run([*words, "--runs", str(tmp_path / "one")]) == 1
    for name in ("lm", "plain", "aggressive"):
        files = [tmp_path / runs / name / "eval-test.json" for runs in ("two", "one")]
        two, one = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        assert two["nelbo"] == pytest.approx(one["nelbo"], rel=1e-4)
        assert (two["lm_gain"] is None) == (name == "lm")
    assert (tmp_path / "two" / "report" / "report.md").is_file()


def test_a_study_runs_here_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row of four fails. The others run, the yardstick first, and the same command then finds nothing to do."""
    path = small_study(tmp_path)
    runs = tmp_path / "runs"
    words = ["study", path, "--runs", str(runs), "--set", "logging.tensorboard=false"]
    assert cli.run([*words, "--here"]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "error: 1 of the runs failed: bad"
    assert "Traceback" not in said.err
    assert said.out.index("1 of 4: lm") < said.out.index("2 of 4: plain")
    assert {run.name: state_of(run) for run in runs.iterdir() if (run / "status.json").is_file()} == dict.fromkeys(
        ("plain", "aggressive", "lm"), "done"
    )
    for name in ("plain", "aggressive"):
        found = json.loads((runs / name / "eval-test.json").read_text(encoding="utf-8"))
        assert found["lm_gain"] is not None
    assert (runs / "report" / "report.md").is_file()
    with (runs / "report" / "runs.csv").open(encoding="utf-8") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"plain", "aggressive", "lm"}

    (runs / "plain" / "eval-test.json").unlink()
    trained = (runs / "plain" / "metrics.jsonl").stat().st_mtime_ns
    assert cli.run(words) == 0
    said = capsys.readouterr()
    assert [line.split()[1:] for line in said.out.splitlines()[:4]] == [
        *(["trained", "plain"], ["missing", "bad"], ["done", "aggressive"], ["done", "lm"])
    ]
    assert f"vae-ds study {path} --runs {runs} --set logging.tensorboard=false --here" in said.out
    assert cli.run([*words, "--run", "0"]) == 0
    assert (runs / "plain" / "eval-test.json").is_file()
    assert (runs / "plain" / "metrics.jsonl").stat().st_mtime_ns == trained


def pasted(output: str) -> list[argparse.Namespace]:
    """The commands that a program printed, read by the parser."""
    lines = [shlex.split(line) for line in output.splitlines() if line.startswith("  vae-ds ")]
    return [cli.parser().parse_args(words[1:]) for words in lines]


def test_the_commands_of_a_study_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a study.yaml", variants=[{"name": "plain"}])
    words = ["study", path, "--runs", str(tmp_path / "runs"), "--set", "seed=1"]
    assert cli.run(words) == 0
    here, slurm = pasted(capsys.readouterr().out)
    assert (here.study, here.runs, here.set, here.here) == (path, str(tmp_path / "runs"), ["seed=1"], True)
    assert (slurm.study, slurm.slurm) == (path, True)
    records.write_status(tmp_path / "runs" / "plain", "done")
    (tmp_path / "runs" / "plain" / "eval-test.json").touch()
    assert cli.run(words) == 0
    (report,) = pasted(capsys.readouterr().out)
    assert (report.study, report.report) == (path, True)


def test_the_study_may_follow_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "small.yaml", variants=[{"name": "plain"}])
    assert cli.run(["study", "--runs", str(tmp_path / "runs"), "--set", "seed=1", path]) == 0
    here, _ = pasted(capsys.readouterr().out)
    assert (here.study, here.set) == (path, ["seed=1"])
