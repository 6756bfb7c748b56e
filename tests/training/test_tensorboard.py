"""What TensorBoard shows of runs, asked of the real server with either of its loaders."""

import base64
import html
import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import ROOT
from support.reports import MAIN, row
from vae_ds.training import Monitor
from vae_ds.training import tensorboard as events

SOURCE = "a | b <b>bold</b> *star* [link](x) `code` &amp; \\ _under_ ~~x~~ 1. - # ![i](y) <http://z>"
RECIPE = {
    "name": "run",
    "seed": 0,
    "model": {"latent_dim": 8, "mu_std": None, "gradient_checkpointing": False},
    "batch": {"global": 64, "micro": "auto"},
    "phases": [{"name": "full", "steps": 60, "freeze": ["decoder", "embeddings"], "beta": {"max": 0.5}}],
    "logging": {"every": 10},
}
METRICS = {"rec": 90.0, "kl": 3.0, "nelbo": 93.0, "mi": 2.0, "mi_ceiling": 7.6, "au": 2, "z_gain": 4.0, "ppl": 20.0}
# The smallest PNG file: one pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

CRASHES = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from support.reports import MAIN, row
from vae_ds.training import Monitor
monitor = Monitor({run_dir!r}, MAIN, progress=False)
monitor.begin_run({recipe!r})
monitor.begin_phase("warmup", 50, 0)
for step in (10, 20, 30, 40, 50):
    monitor.log(row(step, rec=1000.0 + step))
    monitor.checkpoint(step, size_bytes=7, copy_s=0.05, stall_s=0.1, write_s=0.2)
    if step == 20 or step == 40:
        monitor.evaluation(step, "valid", {{"rec": 1000.0 + step}}, [9.0], [("cut" if step > 30 else "kept", "x")])
os._exit(1)
"""


class Board:
    """A running TensorBoard and its answers."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/data/{path}?{urllib.parse.urlencode(query)}", data=data)
        if data:
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def scalars(self, tag: str, run: str = "resumed") -> dict[int, Any]:
        points = self.get("plugin/scalars/scalars", run=run, tag=tag)
        assert len({step for _, step, _ in points}) == len(points), f"{tag} has two points at one step: {points}"
        return {step: value for _, step, value in points}

    def texts(self, tag: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("plugin/text/text", run="resumed", tag=f"{tag}/text_summary")
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of runs: one that was resumed, one of version 0.1 that was resumed, a pretraining, and a report."""
    folder = tmp_path_factory.mktemp("runs")
    _resumed(folder / "resumed")
    _of_version_0_1(folder / "study" / "old")
    pretraining = Monitor(folder / "pretraining", MAIN, progress=False)
    pretraining.log({"phase": "pretrain", "step": 1, "loss": 2.0, "tokens_per_s": 9.0})
    pretraining.evaluation(1, "valid", {"lm_per_token": 3.0, "sentences": 8})
    pretraining.close()
    figure = folder / "figure.png"
    figure.write_bytes(PNG)
    for name in ("first", "second"):
        events.add_figures(folder / "report", {f"report/{name}": figure})
    return folder


def _resumed(run_dir: Path) -> None:
    """A run that crashed at step 50 and was resumed from the checkpoint of step 30, to step 70, and evaluated twice."""
    code = CRASHES.format(root=str(ROOT), tests=str(ROOT / "tests"), run_dir=str(run_dir), recipe=RECIPE)
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    crashed = subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables)
    assert crashed.returncode == 1, crashed.stderr
    # TensorBoard orders a run's event files by the second of their creation.
    time.sleep(1.1)
    monitor = Monitor(run_dir, MAIN, progress=False)
    monitor.resume_from(30)
    monitor.begin_run(RECIPE | {"seed": 5})
    monitor.begin_phase("full", 100, 0)
    for step in (35, 45, 55, 65):
        monitor.log(row(step, grad_norm=math.inf if step == 45 else 4.0))
    verdict = {"verdict": "unused KL", "verdict_reason": "KL is 3.00 nats but <b>little</b> is read", "cost": "2 < 3"}
    pairs = [(SOURCE, "<script>alert(1)</script>"), ("two\nlines", "")]
    extent = {"sentences": 2000, "iw_nll": None, "iw_samples": None, "mi_sentences": 2000, "rec_se": 0.5}
    monitor.evaluation(70, "valid", METRICS | verdict | extent, [1.0, 2.0, math.nan, 0.0], pairs, ["a prior sample"])
    monitor.end_run()
    monitor.close()
    monitor.close()
    time.sleep(1.1)
    for iw_nll in (88.0, 89.0):
        events.add_evaluation(run_dir, "test", METRICS | {"iw_nll": iw_nll, "iw_samples": 9}, step=70)


def _of_version_0_1(run_dir: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=0)
    for step in (10, 20, 30):
        writer.add_scalar("train/rec", 100.0 + step, step)
        writer.add_scalar("valid/nelbo", 200.0 + step, step)
        writer.add_scalar("checkpoint/stall_s", 0.5, step)
        writer.add_text("valid/verdict", "uses z", step)
    writer.close()
    time.sleep(1.1)
    monitor = Monitor(run_dir, MAIN, progress=False)
    monitor.resume_from(20)
    monitor.log(row(40))
    monitor.close()


@pytest.fixture(scope="module", params=["--load_fast=false", "--load_fast=auto"])
def board(request: pytest.FixtureRequest, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """The real server over the runs, with either of its loaders; `auto` is the default."""
    said = tmp_path_factory.mktemp("tensorboard") / "said"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", "0"]
    options = ["--host", "127.0.0.1", request.param, "--reload_interval=1"]
    with said.open("w") as file:
        server = subprocess.Popen([*command, *options], stdout=file, stderr=file, cwd=said.parent)
    try:
        yield wait_for_board(server, said)
    finally:
        server.kill()
        server.wait(timeout=10)


def wait_for_board(server: "subprocess.Popen[bytes]", said: Path) -> Board:
    """The server once it has loaded the runs."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and server.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", said.read_text())
        try:
            if found and _has_loaded(Board(found[0])):
                return Board(found[0])
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"TensorBoard shows no run: {said.read_text()}")


def _has_loaded(board: Board) -> bool:
    tags = board.get("plugin/scalars/tags")
    last = {
        "resumed": "7_evaluation/iw_nll/test",
        "study/old": "2_terms/kl/train",
        "pretraining": "1_objective/loss/train",
    }
    images = board.get("plugin/images/tags")
    return "report" in images and all(tag in tags.get(run, {}) for run, tag in last.items())


def test_a_run_is_named_by_its_directory(board: Board, runs: Path) -> None:
    assert set(board.get("runs")) == {"resumed", "study/old", "pretraining", "report"}
    assert not list(runs.rglob("tensorboard"))


def test_a_resumed_run_continues_its_curves_without_the_cut_points(board: Board) -> None:
    expected = {10: 1010.0, 20: 1020.0, 30: 1030.0, 35: 65.0, 45: 55.0, 55: 45.0, 65: 35.0}
    assert board.scalars("2_terms/rec/train") == pytest.approx(expected)
    nelbo = {step: value + 2.5 for step, value in expected.items()}
    assert board.scalars("1_objective/nelbo/train") == pytest.approx(nelbo)
    assert board.scalars("2_terms/rec/valid") == pytest.approx({20: 1020.0, 70: 90.0})
    assert list(board.scalars("8_checkpoint/size_bytes")) == [10, 20, 30]


def test_the_objective_comes_first_and_checkpoints_last(board: Board) -> None:
    """TensorBoard sorts the groups of tags, and the tags of a group, by name."""
    tags = sorted(board.get("plugin/scalars/tags")["resumed"])
    assert tags[:3] == ["1_objective/loss/train", "1_objective/nelbo/train", "1_objective/nelbo/valid"]
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in tags))
    assert groups == list(events.GROUPS)
    assert groups[-1] == "8_checkpoint"
    train = "rec kl kl_weighted beta nelbo loss lr grad_norm tokens_per_s padding skipped_steps epoch mfu share_data"
    keys = {"train": train.split(), "valid": list(METRICS)}
    for split, names in keys.items():
        found = {tag.split("/")[1] for tag in tags if tag.endswith(f"/{split}")}
        assert found == set(names), split
    assert board.scalars("2_terms/kl/train")[55] == pytest.approx(2.5)
    assert board.scalars("2_terms/kl_weighted/train")[55] == pytest.approx(0.25)
    assert board.scalars("4_optimizer/grad_norm/train")[45] == "Infinity"
    assert board.scalars("5_speed/share_data/train")[45] == pytest.approx(0.1)


def test_an_evaluation_after_training_is_added_once(board: Board) -> None:
    assert board.scalars("7_evaluation/iw_nll/test") == {70: 89.0}
    assert board.scalars("7_evaluation/nelbo/test") == {70: 93.0}


def test_the_charts_of_the_method(board: Board) -> None:
    categories = board.get("plugin/custom_scalars/layout")["category"]
    charts = {category["title"]: category["chart"] for category in categories}
    assert set(charts) == {"VAE", "Pretraining"}
    lines = {}
    for chart in charts["VAE"]:
        matched = set()
        for pattern in chart["multiline"]["tag"]:
            answer = board.get("plugin/custom_scalars/scalars", run="resumed", tag=pattern)
            assert answer["regex_valid"]
            matched |= set(answer["tag_to_events"])
        assert chart["title"] not in lines
        lines[chart["title"]] = matched
    objective, kl, beta, information, units, gain, throughput = lines.values()
    assert objective == {
        f"{tag}/{split}" for tag in ("1_objective/nelbo", "2_terms/rec", "2_terms/kl") for split in ("train", "valid")
    }
    assert kl == {"2_terms/kl/train", "2_terms/kl/valid", "2_terms/kl_weighted/train"}
    assert beta == {"4_optimizer/beta/train"}
    assert information == {"3_latent/mi/valid", "3_latent/mi_ceiling/valid"}
    assert units == {"3_latent/au/valid"}
    assert gain == {"3_latent/z_gain/valid"}
    assert throughput == {"5_speed/tokens_per_s/train"}
    losses = board.get(
        "plugin/custom_scalars/scalars", run="pretraining", tag=charts["Pretraining"][0]["multiline"]["tag"][0]
    )
    assert set(losses["tag_to_events"]) == {"1_objective/loss/train", "1_objective/lm_per_token/valid"}


def test_a_resumed_run_has_one_hparams_entry_with_its_last_settings_and_metrics(board: Board) -> None:
    query = {"allowedStatuses": ["STATUS_SUCCESS"], "colParams": [], "startIndex": 0, "sliceSize": 9}
    (group,) = board.get("plugin/hparams/session_groups", query)["sessionGroups"]
    assert group["name"] == "resumed"
    assert len(group["sessions"]) == 1
    assert group["hparams"] == {
        "seed": 5.0,
        "model.latent_dim": 8.0,
        "model.gradient_checkpointing": "false",
        "batch.global": 64.0,
        "phases.0.steps": 60.0,
        "phases.0.freeze": "decoder, embeddings",
        "phases.0.beta.max": 0.5,
    }
    metrics = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    final = {
        "1_objective/nelbo/valid": 93.0,
        "2_terms/kl/valid": 3.0,
        "3_latent/mi/valid": 2.0,
        "3_latent/au/valid": 2.0,
    }
    final |= {"3_latent/z_gain/valid": 4.0, "7_evaluation/iw_nll/test": 89.0}
    assert {tag: metrics[tag] for tag in final} == pytest.approx(final)


def test_the_histogram_of_units_and_the_texts_are_shown(board: Board) -> None:
    points = board.get("plugin/histograms/histograms", run="resumed", tag="3_latent/kl_per_dim/valid")
    assert [step for _, step, _ in points] == [20, 70]
    assert sum(count for _, _, count in points[1][2]) == pytest.approx(3)

    texts = board.texts("valid/reconstructions")
    assert [entry["step"] for entry in texts] == [20, 70]
    page = texts[1]["text"]
    assert not re.findall(r"<(?!/?(?:table|thead|tbody|tr|th|td)>)", page)
    cells = [html.unescape(cell) for cell in re.findall(r"<td>([^<]*)</td>", page)]
    assert cells == [SOURCE, "<script>alert(1)</script>", "two lines", ""]
    (verdict,) = board.texts("valid/verdict")
    assert verdict["step"] == 70
    assert "<strong>unused KL</strong>" in verdict["text"]
    assert "KL is 3.00 nats but <b>little</b> is read" in html.unescape(verdict["text"])
    assert "cost: 2 < 3" in html.unescape(verdict["text"])
    assert "a prior sample" in board.texts("valid/prior_samples")[0]["text"]


def test_a_run_of_version_0_1_continues_under_the_present_names(board: Board) -> None:
    assert board.scalars("2_terms/rec/train", "study/old") == pytest.approx({10: 110.0, 20: 120.0, 40: 60.0})
    assert board.scalars("1_objective/nelbo/valid", "study/old") == pytest.approx({10: 210.0, 20: 220.0})
    assert list(board.scalars("8_checkpoint/stall_s", "study/old")) == [10, 20]
    texts = board.get("plugin/text/text", run="study/old", tag="valid/verdict/text_summary")
    assert [entry["step"] for entry in texts] == [10, 20]


def test_the_figures_of_the_last_report_are_images(board: Board) -> None:
    assert list(board.get("plugin/images/tags")["report"]) == ["report/second"]
    (image,) = board.get("plugin/images/images", run="report", tag="report/second", sample="0")
    with urllib.request.urlopen(f"{board.url}/data/plugin/images/individualImage?{image['query']}", timeout=10) as got:
        assert got.read() == PNG


def test_a_figure_must_be_a_png_file(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("<svg/>", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.svg: not a PNG file"):
        events.add_figures(tmp_path / "report", {"a": tmp_path / "a.svg"})
    assert not (tmp_path / "report").exists()


def test_files_of_the_user_stay_in_the_old_directory(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    SummaryWriter(str(tmp_path / "tensorboard")).close()
    (tmp_path / "tensorboard" / "notes.txt").write_text("mine", encoding="utf-8")
    Monitor(tmp_path, MAIN, progress=False).resume_from(0)
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["notes.txt"]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_a_reader_that_saw_the_cut_points_drops_them_at_the_first_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    first = Monitor(tmp_path, MAIN, progress=False)
    first.begin_run(RECIPE)
    for step in (10, 20, 30):
        first.log(row(step))
    first.close()
    reader = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in reader.Tensors("2_terms/rec/train")] == [10, 20, 30]
    time.sleep(1.1)
    second = Monitor(tmp_path, MAIN, progress=False)
    second.resume_from(10)
    second.begin_run(RECIPE)
    second.log(row(40))
    second.close()
    assert [point.step for point in reader.Reload().Tensors("2_terms/rec/train")] == [10, 40]


def test_a_run_that_starts_over_has_no_records_left(tmp_path: Path) -> None:
    first = Monitor(tmp_path, MAIN, progress=False)
    first.begin_run(RECIPE)
    first.evaluation(0, "valid", {"rec": 1.0})
    first.log(row(1))
    first.end_run()
    first.close()
    (path,) = tmp_path.glob("*tfevents*")
    with path.open("ab") as file:
        file.write(b"\x40\0\0\0\0\0\0\0torn")
    before = path.stat().st_size
    Monitor(tmp_path, MAIN, progress=False).resume_from(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "evaluations.jsonl").read_bytes() == b""
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "metrics.jsonl", "evaluations.jsonl"}
    assert 0 < path.stat().st_size < before
    for gone in (b"/train", b"_hparams_", b"custom_scalars", b"torn"):
        assert gone not in path.read_bytes()


def test_hparams_of_the_demo_are_settings_of_the_optimisation() -> None:
    from vae_ds import config

    demo = config.load(config.RunConfig, "demo").model_dump(mode="json", by_alias=True)
    found = events.hparams_of(demo)
    assert found["phases.0.freeze"] == "decoder, embeddings, prior"
    assert found["phases.1.beta.schedule"] == "cyclical"
    assert found["phases.1.free_bits.nats"] == 15
    assert found["batch.global"] == 64
    assert {"seed", "precision", "model.latent_dim", "phases.1.denoise", "phases.1.optimizer.lr"} <= found.keys()
    assert not {
        key for key in found if key.split(".")[0] in ("name", "logging", "checkpoint", "timeouts", "evaluation")
    }
    assert all(isinstance(value, int | float | str) for value in found.values())
