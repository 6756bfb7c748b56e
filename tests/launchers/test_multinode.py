"""Several nodes without SLURM: the real deepspeed launcher on this machine, which plays all of them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from support import ROOT, tiny
from support.processes import STARTUP_S, kill_all, new_job, processes_of, rows, start, state_of, wait_until
from vae_ds.runtime.machine import free_port

LAUNCHERS = ROOT / "launchers"
MULTINODE = ["bash", str(LAUNCHERS / "multinode.sh"), "--no-setup"]
ENDLESS = ["phases.0.steps=1000000"]
END_S = 90.0
# Both nodes would take the same one.
without_gpu = pytest.mark.skipif("os.environ.get('DS_ACCELERATOR') != 'cpu'", reason="two nodes on one machine's GPU")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that make the demo's recipe tiny: a random base, a few sentences, three steps a phase."""
    folder = tmp_path_factory.mktemp("multinode")
    settings = tiny.demo_settings(folder, num_layers=1, num_decoder_layers=1)
    return [*settings, "phases.0.steps=3", "phases.1.steps=3", "logging.tensorboard=false"]


@pytest.fixture
def job() -> Iterator[dict[str, str]]:
    env = new_job()
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ENV_FILE"):
        env.pop(name, None)
    yield env
    kill_all(env)


def write_hosts(folder: Path, *names: str) -> Path:
    """A hostfile with one process a node."""
    hosts = folder / "hosts"
    hosts.write_text("# two nodes\n\n" + "".join(f"{name} slots=1\n" for name in names), encoding="utf-8")
    return hosts


def nothing_left(job: dict[str, str]) -> bool:
    deadline = time.monotonic() + 10
    while processes_of(job) and time.monotonic() < deadline:
        time.sleep(0.1)
    return processes_of(job) == []


def rank(job: dict[str, str], number: int) -> psutil.Process:
    ranks = [one for one in processes_of(job) if one.environ().get("RANK") == str(number)]
    return next(one for one in ranks if one.parent() not in ranks)


# Without ssh: each node starts its own


@dataclass
class Pair:
    """Two nodes, each with its own launcher and its own output."""

    folder: Path
    job: dict[str, str]

    def begin(self, options: list[list[str]], words: list[str], env: list[dict[str, str]]) -> None:
        self.outputs = [self.folder / "node-0", self.folder / "node-1"]
        self.processes = [
            start([*MULTINODE, *options[node], *words], {**self.job, **env[node]}, self.outputs[node])
            for node in (0, 1)
        ]

    def codes(self, limit_s: float) -> list[int]:
        return [process.wait(timeout=limit_s) for process in self.processes]

    def said(self) -> str:
        return "\n".join(output.read_text(encoding="utf-8") for output in self.outputs)

    def wait_for_step(self, run: Path, step: int) -> None:
        def reached() -> bool:
            return bool(rows(run)) and rows(run)[-1]["step"] >= step

        wait_until(reached, self.processes[0], self.outputs[0], STARTUP_S)


@without_gpu
@pytest.mark.timeout(900)
def test_two_nodes_compute_what_one_does(job: dict[str, str], settings: list[str], tmp_path: Path) -> None:
    """Found through the environment alone, as in a container; nothing is installed that ssh could reach."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    one_node = [sys.executable, str(LAUNCHERS / "ranks.py"), "-n", "2", "train", "demo", "--run-dir", str(alone)]
    pair = Pair(tmp_path, job)
    common = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = ["--gpus-per-node", "1", "train", "demo", "--run-dir", str(run), "--set", *settings]
    pair.begin([[], []], words, [{**common, "NODE_RANK": str(node)} for node in (0, 1)])
    subprocess.run([*one_node, "--set", *settings], env=job, check=True, timeout=STARTUP_S, capture_output=True)
    assert pair.codes(STARTUP_S) == [0, 0], pair.said()
    assert state_of(run) == state_of(alone) == "done"
    expected, found = rows(alone), rows(run)
    assert [row["step"] for row in found] == list(range(1, 7))
    for name in ("rec", "kl", "loss", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-6, abs=1e-6)
    assert nothing_left(job)


@without_gpu
@pytest.mark.timeout(900)
def test_a_signal_and_a_loss_on_one_node_end_both(job: dict[str, str], settings: list[str], tmp_path: Path) -> None:
    run, hosts = tmp_path / "run", write_hosts(tmp_path, "first", "second")
    pair = Pair(tmp_path, job)
    common = ["--hostfile", str(hosts), "--no-ssh", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    options = [[*common, "--node-rank", str(node), "--interface", "lo"] for node in (0, 1)]
    words = ["train", "demo", "--run-dir", str(run), "--set", *settings, *ENDLESS]
    pair.begin(options, words, [{}, {}])
    pair.wait_for_step(run, 3)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.codes(END_S) == [75, 75], pair.said()
    assert state_of(run) == "stopped"
    assert nothing_left(job)

    stopped_at = rows(run)[-1]["step"]
    pair.begin(options, words, [{}, {}])
    pair.wait_for_step(run, int(stopped_at) + 2)
    rank(job, 1).kill()
    codes = pair.codes(END_S)
    assert set(codes) <= {1, 69}, f"{codes}\n{pair.said()}"
    assert state_of(run) == "failed"
    assert nothing_left(job)


NO_COMMAND = "(no command)"
NO_SSH = ["--no-ssh", "--master-addr", "127.0.0.1", "--node-rank", "0"]


@pytest.mark.parametrize(
    ("options", "hosts", "said"),
    [
        ([], None, "no nodes given; use --hostfile FILE"),
        (["--hostfile", "absent"], None, "absent: cannot read the hostfile (No such file or directory)"),
        (["--hostfile", "hosts"], "# none\n", "hosts: no host in the hostfile"),
        (["--hostfile", "hosts"], "a slots=1\nb 2\n", "hosts, line 2: found `b 2`; expected a host"),
        (["--hostfile", "hosts"], "a slots=1\n\na slots=2\n", "hosts, line 3: the host a is already listed"),
        (["--hostfile", "hosts"], "a;b slots=1\n", "hosts, line 1: found `a;b slots=1`"),
        (["--hostfile", "hosts", "-n", "2", *NO_SSH], "a slots=1\n", "omit -n"),
        (["--nodes", "0", *NO_SSH], None, "found 0; expected an integer of at least 1"),
        (["--nodes", "2", "--node-rank", "0"], None, "no address of the first node; set --master-addr"),
        (["--nodes", "2", "--master-addr", "127.0.0.1"], None, "no rank of this node; set --node-rank"),
        (["--nodes", "2", *NO_SSH, "--node-rank", "2"], None, "found node rank 2; with 2 nodes it is 0 to 1"),
        (["--nodes", "2", *NO_SSH, "--interface", "eth77"], None, "no network interface eth77 on this node; found: "),
        (["--nodes", "2", *NO_SSH, "--node-ranks", "1"], None, "unrecognized arguments: --node-ranks"),
        (["--nodes", "2", *NO_SSH, NO_COMMAND], None, "name a vae-ds command"),
    ],
)
def test_wrong_arguments(job: dict[str, str], tmp_path: Path, options: list[str], hosts: str | None, said: str) -> None:
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts, encoding="utf-8")
    command = options[:-1] if options[-1:] == [NO_COMMAND] else [*options, "recipes"]
    done = subprocess.run([*MULTINODE, *command], env=job, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


# Over ssh


@pytest.fixture(scope="module")
def ssh_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PATH whose `ssh` reaches this machine under 127.0.0.1 and 127.0.0.2, by a server and a key of our own.

    Its login shell writes to the error output, as those of many users do.
    """
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None or not shutil.which("pdsh"):
        pytest.skip("needs pdsh and openssh-server")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    server = f"""
        Port {port}
        ListenAddress 127.0.0.1
        ListenAddress 127.0.0.2
        HostKey {folder}/host
        AuthorizedKeysFile {folder}/user.pub
        PidFile none
        UsePAM no
        PasswordAuthentication no
        StrictModes no
        PermitRootLogin prohibit-password
        ForceCommand echo "a word of the login shell" >&2; eval "$SSH_ORIGINAL_COMMAND"
    """
    client = f"""
        Port {port}
        IdentityFile {folder}/user
        IdentitiesOnly yes
        BatchMode yes
        StrictHostKeyChecking no
        UserKnownHostsFile /dev/null
        LogLevel ERROR
    """
    (folder / "server").write_text(server, encoding="utf-8")
    (folder / "client").write_text(client, encoding="utf-8")
    if os.geteuid() == 0:
        # Where no service has made it, sshd refuses to start as root without it.
        Path("/run/sshd").mkdir(exist_ok=True)
    # Stands for the user's ~/.ssh/config, which ssh finds whatever $HOME says.
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/client "$@"\n', encoding="utf-8")
    ssh.chmod(0o755)
    daemon = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "server")], stderr=subprocess.DEVNULL)
    try:
        for _ in range(50):
            if subprocess.run([str(ssh), "127.0.0.2", "true"], capture_output=True, timeout=30).returncode == 0:
                break
            time.sleep(0.1)
        else:
            pytest.skip("no ssh server of our own comes up here")
        yield f"{ssh.parent}:{os.environ['PATH']}"
    finally:
        daemon.terminate()
        daemon.wait()


@without_gpu
@pytest.mark.timeout(900)
def test_ssh_starts_stops_and_loses_nodes(
    job: dict[str, str], settings: list[str], ssh_path: str, tmp_path: Path
) -> None:
    """A stop reaches the ranks on their nodes, and so does the end of what connects them with us."""
    odd = tmp_path / 'my $HOME 100%n "run"'
    hosts, output = write_hosts(tmp_path, "127.0.0.1", "127.0.0.2"), tmp_path / "output"
    (tmp_path / "users_env").write_text("VAE_DS_USERS=own\n\n", encoding="utf-8")
    env = {**job, "PATH": ssh_path, "DS_ENV_FILE": str(tmp_path / "users_env"), "VAE_DS_ODD": 'a "$b" \\ %n'}
    command = [*MULTINODE, "--hostfile", str(hosts), "--interface", "lo", "train", "demo", "--run-dir", str(odd)]
    command += ["--set", *settings, *ENDLESS]

    def begin(step: int) -> subprocess.Popen[bytes]:
        process = start(command, env, output)
        wait_until(lambda: bool(rows(odd)) and rows(odd)[-1]["step"] >= step, process, output, STARTUP_S)
        return process

    process = begin(3)
    for number in (0, 1):
        has = rank(job, number).environ()
        assert (has["GLOO_SOCKET_IFNAME"], has["NCCL_SOCKET_IFNAME"], has["VAE_DS_USERS"]) == ("lo", "lo", "own")
        assert has["VAE_DS_ODD"] == env["VAE_DS_ODD"]
        assert has["MASTER_ADDR"] == "127.0.0.1"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=END_S) == 75, output.read_text(encoding="utf-8")
    assert state_of(odd) == "stopped"
    assert nothing_left(job)

    stopped_at = int(rows(odd)[-1]["step"])
    process = begin(stopped_at + 2)
    (pdsh,) = [one for one in processes_of(job) if one.name().startswith("pdsh")]
    pdsh.kill()
    assert process.wait(timeout=END_S) == 75, output.read_text(encoding="utf-8")
    assert state_of(odd) == "stopped"
    assert rows(odd)[-1]["step"] > stopped_at
    assert nothing_left(job)
    assert not list(Path("/tmp").glob("vae_ds_exit_*"))


def test_ssh_tells_which_node_it_cannot_use(job: dict[str, str], ssh_path: str, tmp_path: Path) -> None:
    env = {**job, "PATH": ssh_path}

    def said(name: str, *options: str) -> str:
        hosts = write_hosts(tmp_path, "127.0.0.1", name)
        command = [*MULTINODE, "--hostfile", str(hosts), *options, "recipes"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert said("127.0.0.3").startswith("error: cannot start on 127.0.0.3: ssh: connect to host 127.0.0.3")
    on_first = said("127.0.0.2", "--interface", "eth77")
    assert on_first.startswith("error: cannot start on 127.0.0."), on_first
    assert ": no network interface eth77 on the node; found: lo" in on_first
    assert nothing_left(job)
