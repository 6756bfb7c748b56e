"""Jobs on a real SLURM with two nodes: the same numbers as anywhere, and an end as documented, whatever happens."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from support import ROOT, slurm_cluster, tiny
from support.processes import rows, small_disk_at, state_of
from support.slurm_cluster import Cluster
from vae_ds import cli
from vae_ds.errors import ConfigError
from vae_ds.runtime import slurm
from vae_ds.runtime.machine import is_alive

REPO = ROOT
SLURM = REPO / "launchers" / "slurm"
TRAIN = SLURM / "train.sbatch"
REASON = slurm_cluster.why_not()
on_slurm = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LOSSES = ("rec", "kl", "loss")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
# Seconds on free cores; minutes where others use them too.
pytestmark = pytest.mark.timeout(900)


# SLURM's variables


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu-[07-09,12],login1", "gpu-07"),
        ("login1,gpu-[07-09]", "login1"),
        ("rack[2-3]node[5,7]-ib,x", "rack2node5-ib"),
        ("c[003]", "c003"),
    ],
)
def test_the_first_of_any_node_list(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


def test_tasks_a_node_written_out() -> None:
    assert slurm.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert slurm.tasks_per_node("8") == [8]
    with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE: 'two'"):
        slurm.tasks_per_node("two")


def test_a_task_only_inside_a_step() -> None:
    """A batch script has a process number and a number of tasks too, and would wait for peers that never come."""
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert slurm.task(batch) is None
    step = {
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_ID": "1",
        "SLURM_STEP_NODELIST": "localhost,n[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_NODEID": "2",
        "SLURM_PROCID": "4",
        "SLURM_LOCALID": "0",
    }
    found = slurm.task(batch | step | {"MASTER_ADDR": "10.0.0.9"})
    assert found == slurm.Task(
        rank=4, local_rank=0, world=5, local_world=1, master_addr="10.0.0.9", master_port=slurm.port_of(7, 1)
    )
    with pytest.raises(ConfigError, match=r"the node no\.such\.host has no address; set MASTER_ADDR"):
        slurm.task(batch | step | {"SLURM_STEP_NODELIST": "no.such.host"})


def test_ports_of_jobs_and_steps_differ() -> None:
    ports = {slurm.port_of(job, step) for job in range(4000, 4010) for step in range(10)}
    assert len(ports) == 100
    assert all(10000 <= port < 30000 for port in ports)


# Jobs


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of seconds: a random base without dropout, a few sentences, both phases."""
    folder = tmp_path_factory.mktemp("demo")
    lengths = ["phases.0.steps=4", "phases.1.steps=4", "evaluation.iw_samples=4", "evaluation.iw_sentences=16"]
    return [*tiny.demo_settings(folder), "logging.tensorboard=false", *lengths]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes on this machine's own network."""
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    made.env |= {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    yield made
    made.close()


def train(place: Cluster, run: Path, settings: list[str], *options: str, env: dict[str, str] | None = None) -> str:
    """Submit a training as a user does; the job's number."""
    return place.submit(*options, TRAIN, "demo", "--run-dir", run, "--set", *settings, env=env)


def wait_for(ready: Callable[[], bool], place: Cluster, limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < deadline, place.logs()
        time.sleep(0.2)


def steps_of(run: Path) -> int:
    found = rows(run)
    return int(found[-1]["step"]) if found else 0


def is_pending(process: psutil.Process, number: int) -> bool:
    """Whether a signal has been sent to a process and waits for it, or has ended it."""
    if not is_alive(process):
        return True
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return bool(int(re.findall(r"^ShdPnd:\s*(\w+)", status, re.M)[0], 16) >> number - 1 & 1)


def same_curve(one: Path, other: Path, steps: int | None = None, rel: float = 1e-6) -> None:
    ours, theirs = rows(one)[:steps], rows(other)[:steps]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert [a[key] for key in LOSSES] == pytest.approx([b[key] for key in LOSSES], rel=rel)


def same_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def job_log(place: Cluster, job: str) -> str:
    """What the job has written so far; SLURM makes the file a moment after it calls the job running."""
    log = Path(place.field(job, "StdOut"))
    return log.read_text(encoding="utf-8") if log.is_file() else ""


def rank_log(place: Cluster, job: str, rank: int) -> str:
    log = Path(place.field(job, "StdOut"))
    return (log.with_suffix("") / f"rank-{rank}.log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def longer(settings: list[str]) -> list[str]:
    """Steps enough to be hit in the middle."""
    steps = ["phases.0.steps=20", "phases.1.steps=140", "checkpoint.every_steps=50"]
    return [*settings, *steps, "timeouts.silent_s=10"]


@pytest.fixture(scope="module")
def quiet(nodes: Cluster, longer: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The longer run undisturbed, on one node; the number of tasks is that of its devices."""
    run = tmp_path_factory.mktemp("quiet") / "run"
    job = train(nodes, run, longer, "--nodes=1", "--gpus-per-node=2")
    assert nodes.wait(job) == "COMPLETED", nodes.logs()
    assert world_of(run) == 2
    return run


def world_of(run: Path) -> int:
    return int(json.loads((run / "environment.json").read_text(encoding="utf-8"))["world_size"])


@on_slurm
def test_two_nodes_are_one_and_a_job_comes_back(nodes: Cluster, longer: list[str], quiet: Path, tmp_path: Path) -> None:
    """On two nodes, requeued by hand in phase 1, then warned of its time limit in phase 2."""
    run = tmp_path / "run"
    # The ranks stand still for a while below.
    patient = [*longer, "timeouts.silent_s=600"]
    job = train(nodes, run, patient, *TWO_NODES, "--time=3", "--signal=USR1@60")
    wait_for(lambda: steps_of(run) > 4, nodes)
    nodes.run("scontrol", "requeue", job)
    wait_for(lambda: int(nodes.field(job, "Restarts")) > 0 and steps_of(run) > 40, nodes)
    # They cannot be done before SLURM warns them, unless it has done so already.
    ranks = nodes.ranks(job).values()
    with suppress(psutil.NoSuchProcess):
        for rank in ranks:
            rank.suspend()
    wait_for(lambda: all(is_pending(rank, signal.SIGUSR1) for rank in ranks), nodes)
    with suppress(psutil.NoSuchProcess):
        for rank in ranks:
            rank.resume()
    assert nodes.wait(job) == "COMPLETED", nodes.logs()
    assert int(nodes.field(job, "Restarts")) >= 2
    assert state_of(run) == "done"
    assert world_of(run) == 2
    same_curve(run, quiet)
    same_weights(run, quiet)
    log = job_log(nodes, job)
    assert "start 3: vae-ds train demo" in log
    assert "the job is in the queue again and resumes" in log
    # Each rank has a log of its own, which goes on over the starts.
    assert rank_log(nodes, job, 0).count("run the same command to resume") >= 2
    assert rank_log(nodes, job, 1) != rank_log(nodes, job, 0)


@on_slurm
def test_an_aborted_rank_brings_the_job_back(nodes: Cluster, longer: list[str], quiet: Path, tmp_path: Path) -> None:
    """As NCCL aborts a rank whose peer is gone. Nobody else can read or foresee the name of the job's own libraries."""
    run = tmp_path / "run"
    job = train(nodes, run, longer, *TWO_NODES)
    wait_for(lambda: steps_of(run) > 60, nodes)
    aborted = nodes.ranks(job)[1]
    libraries = Path(aborted.environ()["TORCH_EXTENSIONS_DIR"]).parent
    assert re.fullmatch(r"vae_ds-\w{12}", libraries.name)
    assert libraries.stat().st_mode & 0o777 == 0o700
    aborted.send_signal(signal.SIGABRT)
    assert nodes.wait(job) == "COMPLETED", nodes.logs()
    assert nodes.field(job, "Restarts") == "1"
    assert "exit code 69" in job_log(nodes, job)
    same_weights(run, quiet)


@on_slurm
def test_a_killed_rank_fails_the_job(nodes: Cluster, longer: list[str], tmp_path: Path) -> None:
    """Two jobs at a time, a killed one and one that its user cancels; neither comes back, and nothing is left."""
    killed, cancelled = tmp_path / "killed", tmp_path / "cancelled"
    endless = [*longer, "phases.1.steps=100000"]
    jobs = [train(nodes, run, endless, *TWO_NODES) for run in (killed, cancelled)]
    wait_for(lambda: min(steps_of(killed), steps_of(cancelled)) > 22, nodes)
    nodes.ranks(jobs[0])[1].kill()
    nodes.run("scancel", jobs[1])
    assert nodes.wait(jobs[0], limit_s=60) == "FAILED"
    assert nodes.wait(jobs[1], limit_s=60) == "CANCELLED"
    wait_for(lambda: nodes.processes() == [], nodes, 30)
    assert [nodes.field(job, "Restarts") for job in jobs] == ["0", "0"]
    assert "the end of " in job_log(nodes, jobs[0])
    done = subprocess.run([sys.executable, "-m", "vae_ds", "status", str(killed)], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert state_of(cancelled) == "stopped"
    saved = max((cancelled / "checkpoints").glob("step-*"))
    assert int(saved.name.removeprefix("step-")) == steps_of(cancelled)


@on_slurm
def test_phases_as_jobs_of_their_own(nodes: Cluster, longer: list[str], quiet: Path, tmp_path: Path) -> None:
    """Phase 1 on one rank, the rest on two nodes with a device a task; then the evaluation as a job."""
    run = tmp_path / "run"
    words = ["--both", "--time=10", "--first", "--ntasks=1", "--second", "--nodes=2", "--ntasks=2", "--gpus-per-task=1"]
    said = nodes.run("bash", SLURM / "two_phase.sh", *words, "--train", "demo", "--run-dir", run, "--set", *longer)
    first, second = re.findall(r"job (\d+)", said)
    assert nodes.field(second, "Dependency").startswith(f"afterok:{first}")
    assert nodes.wait(first) == "COMPLETED", nodes.logs()
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["reason"]) == ("stopped", "after phase warmup, as requested")
    assert world_of(run) == 1
    assert nodes.wait(second) == "COMPLETED", nodes.logs()
    assert world_of(run) == 2
    # One rank and two sum in another order, which grows; these are 30 steps of phase 2.
    same_curve(run, quiet, steps=50, rel=1e-4)
    assert steps_of(run) == 160
    evaluation = nodes.submit("--ntasks=2", SLURM / "evaluate.sbatch", run, "--split", "valid")
    assert nodes.wait(evaluation) == "COMPLETED", nodes.logs()
    assert json.loads((run / "eval-valid.json").read_text(encoding="utf-8"))["sentences"] == 64


@on_slurm
def test_a_phase_that_fails_leaves_no_job_waiting(nodes: Cluster, settings: list[str], tmp_path: Path) -> None:
    words = ["--train", "demo", "--run-dir", tmp_path / "run", "--set", *settings, "data.path=/no/such/folder"]
    first, second = re.findall(r"job (\d+)", nodes.run("bash", SLURM / "two_phase.sh", *words))
    assert nodes.wait(first) == "FAILED"
    assert nodes.field(first, "ExitCode") == "2:0"
    assert "/no/such/folder" in job_log(nodes, first)
    assert nodes.wait(second) == "CANCELLED"


@on_slurm
def test_an_array_of_which_one_fails(nodes: Cluster, settings: list[str], tmp_path: Path) -> None:
    """The yardstick's array comes first, and the other waits for it: each run has a `lm_gain`."""
    study = tmp_path / "small.yaml"
    rows_of = {"a": {"model.latent_dim": 16}, "bad": {"model.base": "/no/such/base"}, "c": {"model.latent_dim": 2}}
    yardstick = {"name": "lm", "recipe": "demo-yardstick", "set": {"phases.0.steps": 3}}
    given = [setting.split("=", 1) for setting in settings if "latent_dim" not in setting]
    tree = {
        "name": "small",
        "recipe": "demo",
        "set": {key: yaml.safe_load(value) for key, value in given if not key.startswith("phases.1")},
        "variants": [{"name": name, "set": {"phases.1.steps": 3, **changes}} for name, changes in rows_of.items()],
        "yardstick": "lm",
    }
    tree["variants"].append(yardstick)
    study.write_text(yaml.safe_dump(tree), encoding="utf-8")
    runs = tmp_path / "runs"
    words = [sys.executable, "-m", "vae_ds", "study", study, "--runs", runs]
    shown = nodes.run(*words, "--slurm", "--dry-run", env={"PYTHONPATH": str(REPO)})
    assert re.findall(r"--array=\S+", shown) == ["--array=3%4", "--array=0,1,2%4"]
    said = nodes.run(*words, "--slurm", "--parallel", "2", env={"PYTHONPATH": str(REPO)})
    (first, _), (rest, after) = re.findall(r"^array (\d+)(?:, after (\d+))?: ", said, re.M)
    assert first == after
    states = [nodes.wait(f"{rest}_{number}") for number in range(3)]
    assert states == ["COMPLETED", "FAILED", "COMPLETED"], nodes.logs()
    for name, units in (("a", 16), ("c", 2)):
        found = json.loads((runs / name / "eval-test.json").read_text(encoding="utf-8"))
        assert found["sentences"] == 80
        assert len(found["kl_per_dim"]) == units
        assert found["lm_gain"] is not None
    assert rows(runs / "a")[0]["rec"] != rows(runs / "c")[0]["rec"]
    assert "ArrayTaskThrottle=2" in nodes.run("scontrol", "show", "job", rest)
    assert (runs / "logs" / f"slurm-{rest}_1.log").is_file()
    listed = nodes.run(*words, env={"PYTHONPATH": str(REPO)})
    assert re.findall(r"^ +(\d) (\w+) +(\w+)$", listed, re.M) == [
        ("0", "done", "a"),
        ("1", "missing", "bad"),
        ("2", "done", "c"),
        ("3", "done", "lm"),
    ]
    assert "--array=1%4" in nodes.run(*words, "--slurm", "--dry-run", env={"PYTHONPATH": str(REPO)})
    alone = nodes.submit("--ntasks=1", SLURM / "sweep.sbatch", study)
    assert nodes.wait(alone) == "FAILED"
    assert "not a job array" in job_log(nodes, alone)


@on_slurm
def test_inside_an_interactive_allocation(nodes: Cluster, settings: list[str], tmp_path: Path) -> None:
    """salloc's shell: the ranks' output comes to the terminal; the second time there is nothing left to do."""
    run = tmp_path / "run"
    words = ["salloc", *TWO_NODES, "bash", TRAIN, "demo", "--run-dir", f"{run}-%j", "--set", *settings]
    nodes.run(*words, timeout_s=200)
    (made,) = tmp_path.glob("run-*")
    assert state_of(made) == "done"
    assert world_of(made) == 2
    wrong = subprocess.run(["bash", str(TRAIN), "demo"], env=nodes.env, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "not inside a SLURM job" in wrong.stderr


@on_slurm
def test_a_full_disk_is_told_in_the_log(nodes: Cluster, settings: list[str], tmp_path: Path) -> None:
    with small_disk_at(tmp_path / "disk", "200k") as disk:
        job = train(nodes, disk / "run", settings, "--ntasks=1")
        assert nodes.wait(job) == "FAILED"
        assert "No space left on device" in job_log(nodes, job)


@on_slurm
def test_a_cut_link_ends_both_sides(longer: list[str], quiet: Path, tmp_path: Path) -> None:
    """Nodes with addresses of their own; the link between them is cut and mended."""
    try:
        apart = Cluster(tmp_path, apart=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    apart.env |= {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    try:
        run = tmp_path / "run"
        job = train(apart, run, longer, *TWO_NODES)
        wait_for(lambda: steps_of(run) > 60, apart)
        ranks = apart.ranks(job)
        apart.cut("n2")
        wait_for(lambda: not any(is_alive(rank) for rank in ranks.values()), apart, 180)
        # SLURM misses the node before it is back, or the job itself asks to be queued again.
        wait_for(lambda: apart.field(job, "Restarts") != "0", apart)
        apart.mend("n2")
        assert apart.wait(job, limit_s=400) == "COMPLETED", apart.logs()
        assert int(apart.field(job, "Restarts")) >= 1
        same_curve(run, quiet)
        same_weights(run, quiet)
        assert "no heartbeat from rank 1" in rank_log(apart, job, 0)
        assert "rank 0 is lost or has been silent for 10 s" in rank_log(apart, job, 1)
    finally:
        apart.close()


@on_slurm
def test_submit(nodes: Cluster, settings: list[str], tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("partition: main\ninterface: lo\nenvironment: {SAID: 'a b; $c'}\n", encoding="utf-8")
    run = tmp_path / "run"
    words = [
        sys.executable,
        "-m",
        "vae_ds",
        "submit",
        "demo",
        "--nodes",
        "2",
        "--gpus-per-node",
        "1",
        "--time",
        "0:10:00",
    ]
    words += ["--site", str(site), "--run-dir", str(run), "--set", *settings]
    shown = nodes.run(*words, "--dry-run", env={"PYTHONPATH": str(REPO)})
    assert not run.exists()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=1\n#SBATCH --time=0:10:00" in shown
    assert "export SAID='a b; $c'\nexport NCCL_SOCKET_IFNAME=lo" in shown
    said = nodes.run(*words, env={"PYTHONPATH": str(REPO)})
    assert (run / "submit.sbatch").read_text(encoding="utf-8") == shown
    (job,) = re.findall(r"^job (\d+):", said, re.M)
    assert nodes.wait(job) == "COMPLETED", nodes.logs()
    assert state_of(run) == "done"
    assert world_of(run) == 2
    for line, start in (("log ", "log "), ("follow it: tail -F ", "follow it")):
        (path,) = [word.removeprefix(line) for word in said.splitlines() if word.startswith(start)]
        assert Path(path).is_file()


# Debian has no Apptainer: this program checks how it is called, and runs the command on the node itself.
APPTAINER = """#!/usr/bin/env bash
set -euo pipefail
echo "$*" >>"$CALLED"
[[ $1 == exec && $2 == --nv && $3 == --bind && $4 == /data:/data && -f $5 ]] || exit 2
shift 5
exec "$@"
"""


@on_slurm
def test_a_job_in_an_apptainer_image(nodes: Cluster, settings: list[str], tmp_path: Path) -> None:
    # Apptainer starts each rank of both nodes, and the job installs nothing beside the image.
    image, program, called = tmp_path / "vae_ds.sif", tmp_path / "bin" / "apptainer", tmp_path / "called"
    image.touch()
    program.parent.mkdir()
    program.write_text(APPTAINER, encoding="utf-8")
    program.chmod(0o755)
    site = tmp_path / "site.yaml"
    site.write_text(
        f"partition: main\ncontainer: {image}\ncontainer_mounts: ['/data:/data']\npython: {sys.executable}\n"
        f"environment: {{PATH: '{program.parent}:/usr/bin:/bin', CALLED: '{called}'}}\n",
        encoding="utf-8",
    )
    run = tmp_path / "run"
    words = [sys.executable, "-m", "vae_ds", "submit", "demo", "--nodes", "2", "--gpus-per-node", "1"]
    words += ["--site", str(site), "--run-dir", str(run), "--set", *settings]
    said = nodes.run(*words, env={"PYTHONPATH": str(ROOT)})
    (job,) = re.findall(r"^job (\d+):", said, re.M)
    assert nodes.wait(job) == "COMPLETED", nodes.logs()
    assert state_of(run) == "done"
    calls = called.read_text(encoding="utf-8").splitlines()
    assert len(calls) == 2
    assert all(f"{image} {sys.executable} -m vae_ds train demo" in call for call in calls)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--gpus-per-node", "65"],
            "batch.global 64 has fewer sentences than there are ranks (65)",
        ),
        (["--time", "tomorrow"], "--time tomorrow: use SLURM's format"),
        (["--sbatch=--mail user"], "a batch file cannot contain '--mail user'"),
        (["--set", "phases.0.stepss=3"], "stepss"),
    ],
)
def test_what_submit_refuses(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["submit", "demo", "--dry-run", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_site_file_is_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.yaml"
    for text, told in (("partitionn: gpu", "did you mean `partition`"), ("modules: ['a; rm x']", "modules.0")):
        site.write_text(text, encoding="utf-8")
        assert cli.run(["submit", "demo", "--dry-run", "--site", str(site)]) == 2
        assert told in capsys.readouterr().err


@on_slurm
def test_tensorboard_on_a_node(nodes: Cluster, quiet: Path) -> None:
    job = nodes.submit(SLURM / "tensorboard.sbatch", quiet.parent)
    wait_for(lambda: nodes.state(job) == "RUNNING" and "-L 6006:" in job_log(nodes, job), nodes)
    (port,) = re.findall(r"-L 6006:127\.0\.0\.1:(\d+) ", job_log(nodes, job))

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/environment", timeout=5) as page:
                return str(quiet.parent) in page.read().decode()
        except OSError:
            return False

    wait_for(answers, nodes)
    listening = [
        one.laddr.ip for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == int(port)
    ]
    assert listening == ["127.0.0.1"]
    nodes.run("scancel", job)
    assert nodes.wait(job) == "CANCELLED"
