"""What clusters do to a run: killed ranks and launchers, signals, hangs, a full disk, a loss that is no number."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from support import ROOT
from support.launch import launch
from support.processes import STARTUP_S, kill_all, new_job, processes_of, rows, start, state_of, wait_until
from support.recipes import STEPS, small_recipe
from support.tiny import ENGLISH, write_splits
from vae_ds import cli
from vae_ds.config.settings import TimeoutConfig
from vae_ds.engine import PhaseEngine
from vae_ds.errors import ConfigError
from vae_ds.model import T5VAE
from vae_ds.runtime import records
from vae_ds.runtime.exits import EXIT_LOST, EXIT_STOPPED, STOP_SIGNALS
from vae_ds.runtime.machine import launchers_of
from vae_ds.training import checkpoint, trainer
from vae_ds.training.build import FirstWeights
from vae_ds.training.phases import PhasePlan
from vae_ds.training.preparation import Setup
from vae_ds.training.watch import Board

RANKS_PY = ROOT / "launchers" / "ranks.py"
# The ranks get two minutes to save once a launcher is lost; they need seconds.
END_S = 60.0
# Steps after the last blow. The ranks see within a second that a launcher is gone; until then they go on training.
TAIL = 240


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("faults"))


class Run:
    """The recipe on two ranks through the real launchers, in a run directory, again and again."""

    def __init__(self, recipe: Path, folder: Path, *settings: str) -> None:
        self.job, self.run_dir, self.output = new_job(), folder / "run", folder / "output"
        self.command = [sys.executable, str(RANKS_PY), "-n", "2", "train", str(recipe), "--run-dir", str(self.run_dir)]
        self.command += ["--set", *settings] if settings else []

    def begin(self, at_step: int = 0) -> subprocess.Popen[bytes]:
        """Start it, and wait until it logs a step from `at_step` on."""
        stamp = self.run_dir / "metrics.jsonl"
        begun_s = time.time()
        process = start(self.command, self.job, self.output)

        def reached() -> bool:
            fresh = stamp.is_file() and stamp.stat().st_mtime > begun_s
            last = rows(self.run_dir)[-1:] if fresh and state_of(self.run_dir) == "running" else []
            return bool(last) and last[0]["step"] >= at_step

        wait_until(reached, process, self.output, STARTUP_S)
        return process

    def ranks(self) -> list[psutil.Process]:
        """The two ranks, in order."""
        found = {}
        for one in processes_of(self.job):
            rank = one.environ().get("RANK")
            if rank is not None and not (one.parent() or one).environ().get("RANK"):
                found[int(rank)] = one
        return [found[rank] for rank in sorted(found)]

    def above(self, mark: str) -> psutil.Process:
        """The launcher with this in its command line."""
        words = {one: [os.path.basename(word) for word in one.cmdline()[:4]] for one in launchers_of(self.ranks()[0])}
        return next(one for one, names in words.items() if mark in names)

    def end_of(self, process: subprocess.Popen[bytes], limit_s: float = END_S) -> int:
        """The exit code; nothing may be left."""
        code = process.wait(timeout=limit_s)
        deadline = time.monotonic() + END_S
        while processes_of(self.job):
            assert time.monotonic() < deadline, [one.cmdline() for one in processes_of(self.job)]
            time.sleep(0.1)
        return code


@pytest.fixture
def new_run(recipe: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def make(name: str, *settings: str) -> Run:
        folder = tmp_path / name
        folder.mkdir()
        made.append(Run(recipe, folder, *settings))
        return made[-1]

    yield make
    for one in made:
        kill_all(one.job)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.run_dir / "model" / "model.safetensors")


# One after the other, each at a later step: who is hit, with what, and how the job ends.
BLOWS: list[tuple[str, Callable[[Run], psutil.Process], int, int | None]] = [
    ("a rank", lambda run: run.ranks()[1], signal.SIGKILL, None),
    ("a rank", lambda run: run.ranks()[1], signal.SIGUSR1, 75),
    ("launch.py", lambda run: run.above("deepspeed.launcher.launch"), signal.SIGKILL, 75),
    ("rank 0", lambda run: run.ranks()[0], signal.SIGKILL, None),
    ("deepspeed", lambda run: run.above("deepspeed"), signal.SIGTERM, 75),
    ("ranks.py", lambda run: run.above("ranks.py"), signal.SIGKILL, -signal.SIGKILL),
]


@pytest.mark.timeout(1500)
def test_whatever_hits_a_run_it_resumes_to_the_undisturbed_result(new_run: Callable[..., Run]) -> None:
    """Killed and signalled at random steps in both phases, by ranks and launchers; then the weights of a quiet run."""
    longer = f"phases.1.steps={STEPS // 2 + TAIL}"
    quiet = new_run("quiet", longer)
    assert quiet.end_of(quiet.begin(), STARTUP_S) == 0
    run, draw = new_run("hit", longer), random.Random(11)
    span = STEPS // (len(BLOWS) + 1)
    for number, (who, whom, blow, expected) in enumerate(BLOWS):
        process = run.begin(at_step=span * number + draw.randint(1, span))
        target = whom(run)
        target.send_signal(blow)
        code = run.end_of(process)
        said = run.output.read_text(encoding="utf-8")
        case = f"{who} by {signal.Signals(blow).name}, exit code {code}:\n{said}"
        if expected is None:
            assert code not in (0, 75), case
            status = records.read_status(run.run_dir)
            assert status is not None
            assert records.of_the_living(status)["state"] == "failed", case
        else:
            assert code == expected, case
            assert state_of(run.run_dir) == "stopped", case
    last = start(run.command, run.job, run.output)
    assert run.end_of(last, STARTUP_S) == 0, run.output.read_text(encoding="utf-8")
    assert state_of(run.run_dir) == "done"
    assert [row["step"] for row in rows(run.run_dir)] == list(range(1, STEPS + TAIL + 1))
    ours, theirs = weights(run), weights(quiet)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.timeout(600)
def test_a_second_interrupt_ends_a_run_at_once(recipe: Path, tmp_path: Path) -> None:
    """For the impatient: no checkpoint, no traceback of any library, and a status that tells it."""
    run, job, output = tmp_path / "run", new_job(), tmp_path / "output"
    command = [sys.executable, "-m", "vae_ds", "train", str(recipe), "--run-dir", str(run), "--set"]
    process = start([*command, "phases.0.steps=100000", "batch.global=256"], job | {"PYTHONPATH": str(ROOT)}, output)
    try:
        wait_until(lambda: len(rows(run)) >= 2, process, output, STARTUP_S)
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 75
    finally:
        kill_all(job)
    said = output.read_text(encoding="utf-8")
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    status = records.read_status(run) or {}
    assert status["state"] == "stopped"
    # Between two steps, the first interrupt alone may have been enough.
    assert status["reason"] in ("interrupted; the steps since the last checkpoint are lost", "SIGINT")
    assert status["step"] >= 1


@pytest.mark.timeout(600)
def test_a_rank_that_hangs_is_named_and_ends_the_run(new_run: Callable[..., Run]) -> None:
    """A rank stopped in its tracks: the others would wait for half an hour."""
    run = new_run("hangs", "timeouts.silent_s=5")
    process = run.begin(at_step=3)
    began_s = time.monotonic()
    run.ranks()[1].send_signal(signal.SIGSTOP)
    code = run.end_of(process)
    assert code == EXIT_LOST
    assert time.monotonic() - began_s < END_S
    assert "no heartbeat from rank 1 on " in run.output.read_text(encoding="utf-8")
    status = json.loads((run.run_dir / "status.json").read_text(encoding="utf-8"))
    assert status["state"] == "failed"
    assert "rank 1" in status["reason"]


@pytest.mark.timeout(600)
def test_an_aborted_rank_means_a_lost_one(new_run: Callable[..., Run]) -> None:
    """NCCL aborts a rank whose peer is gone, or that has waited for too long: the same command resumes."""
    run = new_run("aborted")
    process = run.begin(at_step=3)
    run.ranks()[0].send_signal(signal.SIGABRT)
    assert run.end_of(process) == EXIT_LOST, run.output.read_text(encoding="utf-8")


# One process is enough for what follows.


def code_of(*words: object) -> int:
    return cli.run([str(word) for word in words])


def test_a_loss_that_is_no_number_ends_the_run_clearly(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps with non-finite gradients are skipped, counted and never applied; too many in a row are an end."""
    changes = ["phases.0.optimizer.lr=1e30", "max_skipped_steps=5", "phases.0.steps=20"]
    assert code_of("train", recipe, "--run-dir", tmp_path / "run", "--set", *changes) == 1
    assert "5 steps in a row had non-finite gradients" in capsys.readouterr().err
    assert state_of(tmp_path / "run") == "failed"
    assert rows(tmp_path / "run")[-1]["step"] < 20


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_stops_a_run_after_its_step(recipe: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    # Under nohup, SIGHUP is ignored, and a run leaves it so.
    before = signal.signal(number, signal.SIG_DFL)

    def send() -> None:
        while not rows(run):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(send)
        assert code_of("train", recipe, "--run-dir", run, "--set", "phases.0.steps=100000") == EXIT_STOPPED
    signal.signal(number, before)
    assert (records.read_status(run) or {})["reason"] == number.name
    found = checkpoint.newest(run)
    assert found is not None
    assert found.step == rows(run)[-1]["step"]


def test_a_run_ends_after_a_phase_and_goes_on(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Phases as jobs of their own: by the phase's name or number; asked for again, there is nothing to do."""
    run = ["train", recipe, "--run-dir", tmp_path / "run", "--set", "phases.0.steps=3", "phases.1.steps=3"]
    assert code_of(*run, "--until", "3") == 2
    assert "no phase '3'; the recipe has warmup, full" in capsys.readouterr().err
    for until in ("warmup", "1"):
        assert code_of(*run, "--until", until) == 0
        status = records.read_status(tmp_path / "run")
        assert status is not None
        assert (status["state"], status["reason"], status["step"]) == ("stopped", "after phase warmup, as requested", 3)
        assert len(rows(tmp_path / "run")) == 3
    assert code_of(*run) == 0
    assert state_of(tmp_path / "run") == "done"
    assert code_of(*run, "--until", "warmup") == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_phase_that_cannot_begin_leaves_the_checkpoint_of_the_one_before(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = trainer.build_engine

    def fails(setup: Setup, plan: PhasePlan, model: T5VAE, weights: FirstWeights) -> PhaseEngine:
        if plan.index == 1:
            raise ConfigError("phases.1: cannot begin")
        return build(setup, plan, model, weights)

    run = ["train", recipe, "--run-dir", tmp_path / "run", "--set", "checkpoint.every_steps=100"]
    monkeypatch.setattr(trainer, "build_engine", fails)
    assert code_of(*run, "phases.0.steps=3", "phases.1.steps=2") == 2
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None
    assert found.step == 3
    status = records.read_status(tmp_path / "run") or {}
    assert (status["state"], status["reason"], status["step"]) == ("failed", "phases.1: cannot begin", 3)
    monkeypatch.undo()
    # What a phase to come says may be corrected.
    assert code_of(*run, "phases.0.steps=3", "phases.1.steps=2", "phases.1.freeze=[memory]") == 0
    assert state_of(tmp_path / "run") == "done"


def test_a_program_that_trains_has_its_signals_back(recipe: Path, tmp_path: Path) -> None:
    """In Python, from the main thread and from another, which may not touch them."""
    short = ["phases.0.steps=1", "phases.1.steps=1"]
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    trainer.train(str(recipe), tmp_path / "one", short)
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(trainer.train, str(recipe), tmp_path / "two", short).result() == tmp_path / "two"
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
    assert state_of(tmp_path / "one") == state_of(tmp_path / "two") == "done"


def test_text_that_changed_is_refused_unless_told_otherwise(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_splits(tmp_path / "text", ENGLISH[:60], ENGLISH[300:320], ENGLISH[320:340])
    run = ["train", recipe, "--run-dir", tmp_path / "run", "--set", f"data.path={text}"]
    short = ["phases.0.steps=2", "phases.1.steps=2"]
    assert code_of(*run, *short) == 0
    (text / "train.txt").write_text("\n".join(ENGLISH[1:61]) + "\n", encoding="utf-8")
    longer = ["phases.0.steps=2", "phases.1.steps=4"]
    assert code_of(*run, *longer) == 2
    assert "the training text has changed" in capsys.readouterr().err
    assert code_of(*run, *longer, "--changed-data") == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_what_may_change_on_the_way_is_told_and_what_may_not_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Where a run ends may change, and a longer last phase goes on with a run that was done."""
    run = ["train", recipe, "--run-dir", tmp_path / "run", "--set", "phases.0.steps=3"]
    assert code_of(*run, "phases.1.steps=3") == 0
    for fatal in ("batch.global=32", "model.latent_dim=8", "phases.0.steps=4", "seed=1"):
        assert code_of(*run, "phases.1.steps=3", fatal) == 2
        assert fatal.partition("=")[0] in capsys.readouterr().err
    assert code_of(*run, "phases.1.steps=5", "checkpoint.every_steps=2", "logging.every=2") == 0
    assert "continues with changed settings: phases.1.steps was 3, now 5; checkpoint.every_steps was" in caplog.text
    assert "; logging.every was" in caplog.text
    assert rows(tmp_path / "run")[-1]["step"] == 8
    assert state_of(tmp_path / "run") == "done"


def test_on_a_full_disk_the_older_checkpoint_stays_whole(
    recipe: Path, small_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that does not fit is a warning; that the last one must be there is a clear error, and no success."""
    run = small_disk / "run"
    assert code_of("train", recipe, "--run-dir", run, "--set", "phases.0.steps=4", "phases.1.steps=4") == 0
    filler = small_disk / "filler"
    room = 65536  # for rows, not for a checkpoint
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
    capfd.readouterr()
    again = ["train", recipe, "--run-dir", run, "--set", "phases.0.steps=4", "phases.1.steps=12"]
    assert code_of(*again) == 1
    said = capfd.readouterr().err
    assert "No space left on device" in said
    assert "the previous checkpoint stays" in said
    assert "Traceback" not in said
    assert state_of(run) == "failed"
    filler.unlink()
    assert code_of(*again) == 0
    assert [row["step"] for row in rows(run)] == list(range(1, 17))


# The watch


def test_the_board_names_who_is_silent_and_who_is_behind() -> None:
    board = Board(3, TimeoutConfig(silent_s=10, stalled_s=100), begun_s=0.0)
    for rank in (0, 1):
        board.note(rank, f"1 5 node{rank}", 1.0)
    assert board.verdict(9.0) is None
    assert board.verdict(10.5) == "no heartbeat from rank 2 for 10 s"
    board.note(2, "1 4 node2", 10.5)
    for turn in range(2, 120):
        for rank, advanced in ((0, 5), (1, 5), (2, 4)):
            board.note(rank, f"{turn} {advanced} node{rank}", float(turn))
    assert board.verdict(100.0) is None
    assert board.verdict(119.0) == "no progress for 100 s, rank 2 on node2 behind the others"
    board.note(0, "200 6 node0", 119.0)
    assert board.verdict(119.0) is None


def test_every_rank_is_known_by_its_host_before_the_training(tmp_path: Path) -> None:
    """One that falls silent at once must be found too."""
    code = """
from pathlib import Path
from vae_ds import distributed
from vae_ds.config import TimeoutConfig
from vae_ds.runtime import StopFlag
from vae_ds.training import Watch
Watch._talk = lambda *_: None
ranks = distributed.start()
with Watch(ranks, StopFlag(), TimeoutConfig()) as watch:
    distributed.barrier()
    signs = [watch._store.get(f"sign/{rank}").decode() for rank in range(ranks.world)]
    assert [sign.split()[:2] for sign in signs] == [["0", "0"]] * 2, signs
distributed.finish()
"""
    launch(["-c", code], processes=2, timeout_s=100)
