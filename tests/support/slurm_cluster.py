"""A real SLURM on this machine: munged, slurmctld and two slurmd, on free ports and in a separate directory.

With `apart`, each node has its own network namespace and address behind a bridge, and its link can be cut.
"""

import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from support.processes import no_rank
from vae_ds.runtime.machine import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODES = ("n1", "n2")
EXPIRE_S = 5
CONFIGURATION = """\
ClusterName=vaeds
SlurmctldHost={host}({controller})
SlurmctldPort={port}
AuthType=auth/munge
# Requeued jobs wait until their old credentials expire, by default after two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire={expire}
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=30
FirstJobId={first_job}
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
GPUS = "NodeName=n[1-2] Name=gpu Count=2 File=/dev/tty[1-2]\n"


def why_not() -> str | None:
    """The reason why no cluster can run here, None if one can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed; on Debian: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "starting the daemons of SLURM needs root"


class Cluster:
    """Two nodes, n1 and n2, configured with 4 cores and 2 devices each on any machine. `close` ends everything."""

    def __init__(self, folder: Path, apart: bool = False) -> None:
        self.folder = folder
        self.env = no_rank() | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._network = Network() if apart else None
        self._configure()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def submit(self, *words: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run `sbatch WORDS`. Returns the job number."""
        done = self.run("sbatch", "--parsable", *words, env=env, cwd=cwd)
        return done.split(";")[0].strip()

    def run(
        self, *words: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None, timeout_s: float = 60
    ) -> str:
        """Run a command with the environment of this cluster. Returns its standard output."""
        done = subprocess.run(
            list(map(str, words)),
            env=self.env | (env or {}),
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """The state of the job in SLURM: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """A field of the record of the job."""
        found = re.search(rf"\b{name}=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job))
        assert found is not None, name
        return found[1]

    def wait(self, job: str, *states: str, limit_s: float = 240) -> str:
        """Wait until the job is in one of the states, by default until it has ended. Returns the state."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        deadline = time.monotonic() + limit_s
        while (state := self.state(job)) not in wanted:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {wanted}, after {limit_s} s\n{self.logs()}"
            time.sleep(0.3)
        return state

    def processes(self) -> list[psutil.Process]:
        """The processes of all jobs of this cluster, without zombies."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                env = process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
                if env.get("SLURM_CONF") == self.env["SLURM_CONF"] and "SLURM_JOB_ID" in env:
                    found.append(process)
        return found

    def ranks(self, job: str) -> dict[int, psutil.Process]:
        """The running ranks of a job, by rank, without their child processes."""
        found: dict[int, psutil.Process] = {}
        for process in self.processes():
            with suppress(psutil.Error):
                env, parent = process.environ(), process.parent()
                is_rank = env.get("SLURM_JOB_ID") == job and "SLURM_STEP_NUM_TASKS" in env
                if is_rank and parent is not None and parent.name() == "slurmstepd":
                    found[int(env["SLURM_PROCID"])] = process
        return found

    def cut(self, node: str) -> None:
        """Take the link of the node down."""
        assert self._network is not None
        self._network.link(node, "down")

    def mend(self, node: str) -> None:
        """Take the link of the node up again.

        The daemons of the steps that the cut has ended try once a minute to report this to the controller. Until they
        succeed, SLURM kills whatever runs on the node under the number of their job. A requeued job, which waits two
        minutes by default, starts after that. Here it waits EXPIRE_S, so these daemons end first.
        """
        assert self._network is not None
        for process in self._daemons("slurmstepd"):
            with suppress(psutil.Error):
                if self._network.has(node, process):
                    process.kill()
        self._network.link(node, "up")

    def logs(self) -> str:
        """The last lines of the logs of the ranks, of the jobs, and of the daemons: the cause mostly stands first."""
        files = [*self.folder.rglob("rank-*.log"), *self.folder.rglob("*-*.log"), *self.folder.glob("slurm*.log")]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-2000:]}" for file in dict.fromkeys(files))

    def close(self) -> None:
        """End all jobs, the daemons, and the namespaces."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        for process in self._daemons("slurmd", "slurmctld", "munged", "slurmstepd"):
            with suppress(psutil.Error):
                process.kill()
        if self._network is not None:
            self._network.close()

    def _daemons(self, *names: str) -> list[psutil.Process]:
        """The daemons of this cluster. slurmstepd hides its arguments and its environment, but not its directory."""
        found, mine = [], str(self.folder)
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name() in names and any(mine in word for word in [*process.cmdline(), process.cwd()]):
                    found.append(process)
        return found

    def _configure(self) -> None:
        host, network = os.uname().nodename, self._network
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr={network.address(node) if network else '127.0.0.1'} "
            f"Port={free_port()} CPUs=4 RealMemory=4000 Gres=gpu:2"
            for node in NODES
        ]
        controller = network.gateway if network else "127.0.0.1"
        # Ports are computed from job numbers, so clusters on one machine need different first numbers.
        first_job = random.randrange(1, 10**6)
        text = CONFIGURATION.format(
            first_job=first_job,
            expire=EXPIRE_S,
            host=host,
            controller=controller,
            port=free_port(),
            folder=self.folder,
            nodes="\n".join(lines),
        )
        (self.folder / "slurm.conf").write_text(text, encoding="ascii")
        (self.folder / "gres.conf").write_text(GPUS, encoding="ascii")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n", encoding="ascii")
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)

    def _start(self) -> None:
        """Start the daemons, which go to the background themselves, and wait until both nodes are idle."""
        folder, conf = self.folder, self.env["SLURM_CONF"]
        own = {name: folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        self.run(
            *("munged", "--force", f"--key-file={folder / 'munge.key'}", f"--socket={own['socket']}"),
            *(f"--pid-file={own['pid']}", f"--log-file={own['log']}", f"--seed-file={own['seed']}"),
        )
        self.run("slurmctld", "-f", conf, "-i")
        for node in NODES:
            inside: Sequence[str] = ("nsenter", f"--net=/run/netns/{self._network.name(node)}") if self._network else ()
            self.run(*inside, "slurmd", "-f", conf, "-N", node)
        deadline = time.monotonic() + 60
        while self.run("sinfo", "--noheader", "--format=%T %D").split() != ["idle", "2"]:
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.3)


class Network:
    """A bridge on this machine with one network namespace per node behind it, on private addresses."""

    def __init__(self) -> None:
        self._mark = f"v{os.getpid() % 100000}"
        self._subnet = f"10.213.{os.getpid() % 250}"
        self.gateway = f"{self._subnet}.254"
        self._ip("link", "add", "name", self._mark, "type", "bridge")
        self._ip("address", "add", f"{self.gateway}/24", "dev", self._mark)
        self._ip("link", "set", self._mark, "up")
        for node in NODES:
            name = self.name(node)
            self._ip("netns", "add", name)
            self._ip("link", "add", f"{name}o", "type", "veth", "peer", "name", f"{name}i", "netns", name)
            self._ip("link", "set", f"{name}o", "master", self._mark)
            self._ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", f"{name}i")
            self._ip("-n", name, "link", "set", f"{name}i", "up")
            self._ip("-n", name, "link", "set", "lo", "up")
            self.link(node, "up")

    def name(self, node: str) -> str:
        return f"{self._mark}{node}"

    def address(self, node: str) -> str:
        return f"{self._subnet}.{NODES.index(node) + 1}"

    def has(self, node: str, process: psutil.Process) -> bool:
        """Whether a process runs in the network of the node."""
        return Path(f"/proc/{process.pid}/ns/net").samefile(f"/run/netns/{self.name(node)}")

    def link(self, node: str, state: str) -> None:
        self._ip("link", "set", f"{self.name(node)}o", state)

    def close(self) -> None:
        for node in NODES:
            with suppress(subprocess.CalledProcessError):
                self._ip("netns", "delete", self.name(node))
        with suppress(subprocess.CalledProcessError):
            self._ip("link", "delete", self._mark)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
