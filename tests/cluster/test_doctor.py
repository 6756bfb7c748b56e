"""`vae-ds doctor`: this machine as it is, faults made on purpose, and ranks that hang, die or miscount."""

import contextlib
import importlib.metadata
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.launch import Finished, clean_environment, launch
from support.slurm_cluster import Cluster, why_not
from vae_ds import cli
from vae_ds.cluster import checks, installation
from vae_ds.cluster.checks import Check

DOCTOR = ("-m", "vae_ds", "doctor")
# To start two processes; seconds on an idle machine.
STARTUP_S = 60.0
SECRET = "a-token-that-nobody-may-see"


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in report["checks"]}


def test_this_machine(tmp_path: Path) -> None:
    """The whole of it as a user starts it, with two real ranks; nothing but one JSON object on standard output."""
    env = clean_environment(tmp_path) | {"HF_TOKEN": SECRET, "VAE_DS_CACHE": str(tmp_path / "cache")}
    run_dir = tmp_path / "runs" / "mine"
    finished = subprocess.run(
        [sys.executable, *DOCTOR, "--json", "--run-dir", run_dir], env=env, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads(finished.stdout)
    assert report["schema_version"] == 1
    assert report["passed"]
    assert SECRET not in finished.stdout
    found = by_name(report)
    assert {check["state"] for check in found.values()} <= {"ok", "warn", "skipped"}
    assert all(check["advice"] for check in found.values() if check["state"] == "warn")
    for name in ("python", "packages", "collectives", "deepspeed", "cores", "disk: run", "network", "ranks"):
        assert found[name]["state"] == "ok", found[name]
    facts = report["facts"]
    for package in ("torch", "transformers", "deepspeed", "pyarrow"):
        assert facts["packages"][package] == importlib.metadata.version(package)
    assert facts["ranks"]["world"] == 2
    assert facts["ranks"]["backend"] == "gloo"
    assert facts["ranks"]["sum_is_right"]
    rate = facts["ranks"]["bytes"] / facts["ranks"]["duration_s"] / 1e9
    assert facts["ranks"]["algorithm_gb_s"] == pytest.approx(rate)
    assert facts["ranks"]["bus_gb_s"] == pytest.approx(rate)  # 2(n-1)/n of it, with two ranks
    assert facts["disks_gb"]["run"]["all"] == pytest.approx(shutil.disk_usage(tmp_path).total / 1e9)
    assert not run_dir.parent.exists()


def test_what_is_wrong_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Six faults at once: each has its row, and the line beneath the table can be copied whole."""
    lock = tmp_path / "a folder whose name is longer than any line of the table" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parent.parent))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=et")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4096")
    stale = tmp_path / "site" / "tqdm-0.1.dist-info"
    stale.mkdir(parents=True)
    (stale / "METADATA").write_text("Metadata-Version: 2.1\nName: tqdm\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(str(stale.parent))
    (tmp_path / "file").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        code = cli_code("doctor", "--no-ranks", "--run-dir", tmp_path / "file" / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert code == 1
    lines = capfd.readouterr().out.splitlines()
    states = {
        "packages": "fail",
        "built operators": "fail",
        "disk: run": "fail",
        "network": "fail",
        "cores": "warn",
        "limit: open files": "warn",
        "ranks": "skipped",
    }
    for name, state in states.items():
        assert [line for line in lines if line.startswith(f"  {name}  ") and f" {state} " in line], (name, lines)
    text = "\n".join(lines)
    assert f"if no other machine builds there now, delete {lock}" in text
    assert "GLOO_SOCKET_IFNAME=nosuch0" in text
    assert "NCCL_SOCKET_IFNAME==et" in text
    assert "tqdm 0.1 (needed: >=4.66)" in text
    assert "limit: open files: first run `ulimit -n 1024`" in text
    assert "cores: srun does not inherit --cpus-per-task from sbatch" in text


def test_a_lock_that_a_build_holds_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    (lock.parent / "async_io.so").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    held = os.open(lock, os.O_CREAT | os.O_EXCL)
    try:
        building = installation.built_operators()
    finally:
        os.close(held)
    assert building.state == "ok"
    assert f"process {os.getpid()} builds async_io" in building.found
    assert installation.built_operators().state == "fail"
    lock.unlink()
    assert installation.built_operators() == Check(
        "built operators", "ok", f"{tmp_path}: async_io", facts={"built_operators": ["async_io"]}
    )


def test_a_small_and_a_full_disk(small_disk: Path) -> None:
    small = checks.disk("run", small_disk / "not" / "yet" / "made", "go elsewhere")
    assert small.state == "warn"
    assert small.facts["disks_gb"]["run"]["path"] == str(small_disk)
    assert small.advice == f"have 5 GB free: clear {small_disk}, or go elsewhere"
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 65536))
    full = checks.disk("run", small_disk, "go elsewhere")
    assert full.state == "fail"
    assert "No space left on device" in full.found
    assert list(small_disk.iterdir()) == [small_disk / "filler"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth1", ["eth1"]),
        ("^docker,lo", ["eth0", "eth1", "ib0"]),
        ("^=eth0", ["lo", "docker0", "eth1", "ib0"]),
        ("ib,eth1", ["eth1", "ib0"]),
        ("=eth", []),
    ],
)
def test_nccl_chooses_interfaces(value: str, expected: list[str]) -> None:
    assert checks.chosen(value, ["lo", "docker0", "eth0", "eth1", "ib0"]) == expected


def test_no_slurm_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert checks.scheduler().state == "skipped"
    assert checks.job().state == "skipped"


def test_ranks_that_are_here_already(tmp_path: Path) -> None:
    """A launcher's two ranks are the group: rank 0 prints, and nothing is started beside them."""
    finished = launch([*DOCTOR, "--json", "--run-dir", tmp_path])
    found = by_name(report_in(finished))
    assert found["ranks"]["state"] == "ok"
    assert found["ranks"]["found"].startswith("2 ranks on ")
    assert "{" not in finished.outputs[1]


def test_an_interface_that_is_not_here_ends_the_ranks_at_once(tmp_path: Path) -> None:
    """Long before the time-out, and in gloo's own words."""
    env = {"GLOO_SOCKET_IFNAME": "nosuch0"}
    finished = launch([*DOCTOR, "--json", "--run-dir", tmp_path, "--timeout", "100"], env=env, check=False)
    assert finished.codes[0] == 1, finished.report()
    assert finished.codes[1] != 0, finished.report()
    assert finished.duration_s < STARTUP_S
    found = by_name(report_in(finished))
    assert found["network"]["state"] == "fail"
    assert "GLOO_SOCKET_IFNAME=nosuch0 names no interface" in found["network"]["found"]
    assert found["ranks"]["state"] == "fail"
    assert "nosuch0" in found["ranks"]["found"]


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    """Two processes of a group of three."""
    finished = launch(
        [*DOCTOR, "--json", "--run-dir", tmp_path, "--timeout", "5"], env={"WORLD_SIZE": "3"}, check=False
    )
    assert finished.codes == [1, 1], finished.report()
    ranks = by_name(report_in(finished))["ranks"]
    assert ranks["state"] == "fail"
    assert "not finished after 5 s" in ranks["found"]
    assert "not joined: rank 2" in ranks["found"]
    assert "joining the group: rank 0 on " in ranks["found"]


def test_a_wrong_sum_is_seen() -> None:
    """Rank 1 brings other numbers than it should."""
    code = (
        "import os, torch\n"
        "from vae_ds.cluster import allreduce\n"
        "allreduce.DISTINCT -= int(os.environ['RANK'])\n"
        "print(allreduce.try_group([], 60.0).check.found, flush=True)\n"
        "os._exit(0)\n"
    )
    finished = launch(["-c", code])
    for output in finished.outputs:
        assert "wrong sum on rank 0, 1" in output


@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGSTOP, "not joined: rank 1"), (signal.SIGKILL, "rank 1 exited with code -9")],
)
def test_a_process_of_the_doctor_that_hangs_or_dies(tmp_path: Path, number: signal.Signals, told: str) -> None:
    """Told within the time, and none of its processes is left."""
    command = [sys.executable, *DOCTOR, "--json", "--run-dir", str(tmp_path), "--timeout", "3"]
    with (tmp_path / "out").open("w+") as out:
        doctor = subprocess.Popen(command, env=clean_environment(tmp_path), stdout=out, stderr=subprocess.DEVNULL)
        ranks = ranks_of(doctor)
        ranks[1].send_signal(number)
        assert doctor.wait(timeout=STARTUP_S) == 1
        out.seek(0)
        check = by_name(json.load(out))["ranks"]
    assert check["state"] == "fail"
    assert told in check["found"]
    assert not any(rank.is_running() for rank in ranks.values())


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_two_nodes_of_a_slurm_job(tmp_path: Path) -> None:
    """Each node is checked by one of its ranks, and the ranks talk from node to node."""
    with contextlib.closing(Cluster(tmp_path)) as cluster:
        env = {**clean_environment(tmp_path), **cluster.env}
        command = ["srun", "-N2", "-n2", "--export=ALL", sys.executable, *DOCTOR, "--json", "--run-dir", str(tmp_path)]
        finished = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads(finished.stdout)
    assert report["host"] == "n1"
    assert {check["host"] for check in report["checks"] if check["name"] == "slurm job"} == {"n1", "n2"}
    found = by_name(report)
    assert found["slurm"]["state"] == "ok"
    assert "is UP" in found["slurm"]["found"]
    assert found["ranks"]["found"].startswith("2 ranks on n1, n2 over gloo, the sum is correct")
    assert report["facts"]["slurm_job"]["SLURM_STEP_NUM_TASKS"] == "2"


def cli_code(*words: object) -> int:
    """The exit code of a command run in this process."""
    try:
        return cli.run([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def report_in(finished: Finished) -> dict[str, Any]:
    """Rank 0's JSON; `launch` keeps its standard error in the same file."""
    text = finished.outputs[0]
    assert "\n{\n" in f"\n{text}", finished.report()
    report, _ = json.JSONDecoder().raw_decode(f"\n{text}".split("\n{\n", 1)[1].join(("{\n", "")))
    return dict(report)


def ranks_of(doctor: subprocess.Popen[str] | subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The two processes that it starts, as soon as they are there."""
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline:
        found: dict[int, psutil.Process] = {}
        for child in psutil.Process(doctor.pid).children():
            with contextlib.suppress(psutil.Error):
                env = child.environ()
                if "RANK" in env:
                    found[int(env["RANK"])] = child
        if len(found) == 2:
            return found
        time.sleep(0.02)
    raise AssertionError("the doctor started no ranks")
