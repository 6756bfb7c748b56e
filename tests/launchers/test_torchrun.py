"""torchrun as its users know it: one node, two nodes on this machine, and ranks that it starts again."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support import ROOT
from support.processes import STARTUP_S, kill_all, new_job, processes_of, rows, start, state_of, wait_until
from support.recipes import STEPS, small_recipe
from vae_ds import cli
from vae_ds.runtime import records
from vae_ds.runtime.machine import free_port

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
ENDLESS = ["--set", "phases.0.steps=1000000"]
AGAIN = "torchrun has started the ranks again; nothing is trained: "
pytestmark = [
    pytest.mark.timeout(900),
    # Both nodes would take the same one.
    pytest.mark.skipif("os.environ.get('DS_ACCELERATOR') != 'cpu'", reason="two nodes on one machine's GPU"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("torchrun"))


@pytest.fixture
def job() -> Iterator[dict[str, str]]:
    env = new_job() | {"PYTHONPATH": str(ROOT)}
    yield env
    kill_all(env)


class Torchrun:
    """One torchrun, or one for each of two nodes, that trains the recipe into one run directory."""

    def __init__(self, recipe: Path, folder: Path, job: dict[str, str]) -> None:
        self.run, self.job, self.folder = folder / "run", job, folder
        self.words = ["-m", "vae_ds", "train", str(recipe), "--run-dir", str(self.run)]
        self.outputs: list[Path] = []

    def begin(self, options: list[str], *words: str) -> subprocess.Popen[bytes]:
        """Start the torchrun of the next node."""
        self.outputs.append(self.folder / f"output-{len(self.outputs)}")
        return start([TORCHRUN, *options, *self.words, *words], self.job, self.outputs[-1])

    def wait_for_step(self, step: int, process: subprocess.Popen[bytes]) -> None:
        def reached() -> bool:
            return bool(rows(self.run)) and rows(self.run)[-1]["step"] >= step

        wait_until(reached, process, self.outputs[0], STARTUP_S)

    def rank(self, number: int) -> psutil.Process:
        ranks = [one for one in processes_of(self.job) if one.environ().get("RANK") == str(number)]
        return next(one for one in ranks if one.parent() not in ranks)

    def said(self) -> str:
        return "\n".join(output.read_text(encoding="utf-8") for output in self.outputs)

    def steps(self) -> list[float]:
        return [row["step"] for row in rows(self.run)]


@pytest.fixture
def torchrun(recipe: Path, tmp_path: Path, job: dict[str, str]) -> Torchrun:
    return Torchrun(recipe, tmp_path, job)


def shown_status(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.run(["status", str(run)])
    return capsys.readouterr().out


def test_a_killed_rank_is_started_again_and_resumes(torchrun: Torchrun) -> None:
    """The agent's store still has what the killed ranks wrote there."""
    process = torchrun.begin(["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"])
    torchrun.wait_for_step(10, process)
    torchrun.rank(1).kill()
    assert process.wait(STARTUP_S) == 0, torchrun.said()
    assert torchrun.steps() == list(range(1, STEPS + 1))
    assert state_of(torchrun.run) == "done"
    assert processes_of(torchrun.job) == []


def test_a_stop_on_two_nodes_ends_both_without_a_restart(
    torchrun: Torchrun, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun starts the ranks again after code 75, too, and exits with 1; the status tells the code of the run."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "stopped"]
    options = [*rendezvous, "--local-addr", "127.0.0.1", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts"]
    nodes = [torchrun.begin([*options, "1"], *ENDLESS) for _ in (0, 1)]
    torchrun.wait_for_step(3, nodes[0])
    torchrun.rank(1).send_signal(signal.SIGUSR1)
    assert [node.wait(STARTUP_S) for node in nodes] == [1, 1], torchrun.said()
    assert f"{AGAIN}the run was stopped" in torchrun.said()
    status = records.read_status(torchrun.run) or {}
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert status["reason"] == "a signal to another rank"
    assert status["step"] == torchrun.steps()[-1]
    assert "exit code   75" in shown_status(torchrun.run, capsys)
    assert processes_of(torchrun.job) == []


def test_nodes_with_a_fixed_address_train_and_report_wrong_input_once(torchrun: Torchrun) -> None:
    def both(restarts: int, *words: str) -> list[subprocess.Popen[bytes]]:
        common = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", str(restarts)]
        common += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        return [torchrun.begin([*common, "--node-rank", str(node)], *words) for node in (0, 1)]

    assert [node.wait(STARTUP_S) for node in both(0)] == [0, 0], torchrun.said()
    assert torchrun.steps() == list(range(1, STEPS + 1))
    torchrun.outputs.clear()
    assert [node.wait(STARTUP_S) for node in both(1, "--set", "model.latent_dim=5")] == [1, 1], torchrun.said()
    assert torchrun.said().count("model.latent_dim was 4, now 5") == 1
    assert state_of(torchrun.run) == "done"
