"""Run a vae-ds command on all devices through the deepspeed launcher: `ranks.py -n N train RECIPE ...`.

Adds what the launcher lacks: a free port, threads per rank, its own devices under CUDA_VISIBLE_DEVICES, and signals.
SIGINT, SIGTERM and SIGHUP go to the ranks alone and all at once, so that they save at the same step and their exit
code comes back; a second SIGINT, or the end of the grace period, kills whatever is left. No process outlives this one.

Several nodes (multinode.sh): with a hostfile the launcher reaches them by ssh, and so do the signals; with --no-ssh,
or without a hostfile, each node starts its own. Exit codes: 0 done, 1 a fault, 2 wrong input, 69 a rank or its machine
is gone, 75 stopped; after the last two the same command resumes.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil
from nodes import IN_CHECKOUT, REPOSITORY, Nodes, check_no_ssh, launcher, no_ssh_options, read_hostfile, wrong

from vae_ds.runtime import EXIT_FAULT, EXIT_LOST, EXIT_STOPPED, EXIT_USER, cores, free_port

GRACE_S = 120.0
POLL_S = 0.2
# What ends by itself once the ranks have: launchers, and connections to other nodes.
WIND_UP_S = 15.0
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def common_environment() -> dict[str, str]:
    """The environment of the launcher and the ranks, whatever the machine."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # This checkout's package, installed or not, from any directory.
    if IN_CHECKOUT:
        env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [env.get("PYTHONPATH")])])
    return env


def environment(processes: int, gpus: int) -> dict[str, str]:
    """The environment of the launcher and its ranks on this machine."""
    env = common_environment()
    # The launcher sets no thread count: each rank would take all cores.
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    if not gpus:
        env["DS_ACCELERATOR"] = "cpu"
        # Glibc gives each large tensor back to the system and faults its pages in anew: an eighth of a CPU step's time.
        env.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
        env.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
        # DeepSpeed counts NUMA nodes as CPU devices unless told how many there are.
        env["LOCAL_SIZE"] = str(processes)
    return env


def read_word(told: Path) -> int | None:
    """The exit code that a rank left in `told`, None if it was killed."""
    try:
        return int(told.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def own_exit_code(code: int, word: int | None, asked_to_stop: bool) -> int:
    """The job's exit code, given the launcher's: DeepSpeed's is 0 after some failures, so a rank's own `word` counts.

    Where there is none, the rank was killed, or there was no rank yet when the job was asked to stop.
    """
    if word:
        return word
    if word is None and asked_to_stop:
        return EXIT_STOPPED
    if word is None and not code:
        print("error: the ranks ended without a word", file=sys.stderr, flush=True)
        return EXIT_FAULT
    return code if code in (0, EXIT_FAULT, EXIT_USER, EXIT_LOST, EXIT_STOPPED) else EXIT_LOST


def command_line(options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The deepspeed command, with its own `options`, that runs `vae-ds ARGUMENTS` on devices of this machine."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not chosen:
        return [launcher(), "-q", *options, "--module", "vae_ds", *arguments]
    # The launcher would number the devices from 0 again; UUIDs and MIG slices it cannot read at all.
    python = ["env", f"CUDA_VISIBLE_DEVICES={chosen}", sys.executable, "-u", "-m", "vae_ds"]
    return [launcher(), "-q", *options, "--no_python", "--no_local_rank", *python, *arguments]


def on_node(what: str, job: str, interface: str) -> int:
    """On a node, for `Nodes`: `probe` it; `stop` a job, whose ranks save; `end` or `kill` what is left, and tell."""
    if what == "probe":
        addresses = psutil.net_if_addrs()
        if interface and interface not in addresses:
            wrong(f"no network interface {interface} there; there are: {', '.join(addresses)}")
        chosen = [one.address for one in addresses.get(interface, []) if one.family == socket.AF_INET]
        chosen += subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
        print(f"address {chosen[0] if chosen else '127.0.0.1'} port {free_port()}", flush=True)
        return 0

    def members() -> list[psutil.Process]:
        return [one for one in psutil.process_iter() if _variable(one, "VAE_DS_JOB") == job]

    deadline = time.monotonic() + (0 if what == "kill" else GRACE_S)
    ask_to_stop(members())
    while members() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    kill(members())
    told = Nodes((), job, "").told()
    word = read_word(told)
    if what != "stop" and word is not None:
        print(f"word {word}", flush=True)
        told.unlink(missing_ok=True)
    return 0


# A job and its end


def ask_to_stop(members: Sequence[psutil.Process]) -> None:
    """SIGTERM to every rank at once; while there are none yet, to all."""
    # A rank's own children (workers that read the corpus) have its variables too; they are the rank's to end.
    ranks = [one for one in members if _variable(one, "RANK") and not _variable(_parent(one), "RANK")]
    for process in ranks or members:
        _send(process, signal.SIGTERM)


def kill(members: Sequence[psutil.Process]) -> None:
    for process in members:
        _send(process, signal.SIGKILL)


class Job:
    """A launcher and its ranks, in a session of their own: a terminal's Ctrl-C reaches them through us alone."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], told: Path, nodes: Nodes | None = None) -> None:
        """`told` is where rank 0, or this node's first rank, leaves its exit code; `nodes`: the ranks are there."""
        self.launcher = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        self.told = told
        self.nodes = nodes
        self.asking: subprocess.Popen[str] | None = None
        self.interrupts = 0
        self.heard = False
        self.deadline: float | None = None
        for number in STOPS:
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the ranks to stop; they save and exit with a code of their own."""
        self.interrupts += number == signal.SIGINT
        if not self.heard:
            self.heard = True
            print("\nstopping: the ranks save and exit; Ctrl-C again kills them", file=sys.stderr, flush=True)
            self.ask_to_stop()

    def members(self) -> list[psutil.Process]:
        """The living processes of the session; a zombie is dead."""
        living = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.launcher.pid and process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
            except (psutil.Error, OSError):
                continue
        return living

    def ask_to_stop(self) -> None:
        """Ask the ranks, here or on their nodes, unless that was done; from now they have the grace period."""
        if self.deadline is not None:
            return
        self.deadline = time.monotonic() + GRACE_S
        if self.nodes is None:
            ask_to_stop(self.members())
        else:
            self.asking = self.nodes.start("stop")

    def wait(self) -> int:
        """Wait for all of it to end, and see that it does. Returns the job's exit code."""
        while self.launcher.poll() is None and not self._expired():
            time.sleep(POLL_S)
        # The launcher can end before its ranks do; they get the same chance to save.
        if self.members():
            self.ask_to_stop()
        while self.members() and not self._expired():
            time.sleep(POLL_S)
        impatient = self.interrupts > 1
        kill(self.members())
        code = self.launcher.wait()
        if self.nodes is None:
            return own_exit_code(code, read_word(self.told), self.heard)
        return own_exit_code(code, self.nodes.end("kill" if impatient else "end"), self.heard)

    def _expired(self) -> bool:
        if self.interrupts > 1:
            return True
        if self.asking is not None and self.asking.poll() is not None and self.deadline is not None:
            # The nodes have nothing left that runs; what waits for them here has not noticed, or had not begun.
            self.deadline = min(self.deadline, time.monotonic() + WIND_UP_S)
            self.asking = None
        return self.deadline is not None and time.monotonic() > self.deadline


def _variable(process: psutil.Process | None, name: str) -> str | None:
    """A variable of another process, None where it has none, is dead or is not ours."""
    try:
        return None if process is None else process.environ().get(name)
    except (psutil.Error, OSError):
        return None


def _parent(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.Error:
        return None


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return


# The command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        wrong(f"{message}; see --help")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; for several nodes what they leave out stands in the environment, as orchestrators set it."""
    env = os.environ if "--multinode" in words[:1] else {}
    parser = Parser(description="Run a vae-ds command on this machine's devices.", allow_abbrev=False)
    parser.add_argument(
        "-n",
        "--processes",
        "--gpus-per-node",
        type=_count,
        help="default: one a GPU; without GPUs, 2; with several nodes, on each",
    )
    several = parser.add_argument_group("several nodes (launchers/multinode.sh)")
    several.add_argument("--multinode", action="store_true", help="read NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT")
    names = several.add_mutually_exclusive_group()
    names.add_argument("--hostfile", type=Path, metavar="FILE", help="lines `host slots=PROCESSES`")
    names.add_argument("--nodes", type=_count, default=env.get("NNODES"), help="how many; without a hostfile")
    several.add_argument("--no-ssh", action="store_true", help="start this command on each node")
    several.add_argument("--node-rank", type=int, default=env.get("NODE_RANK"), help="of this node; the first is 0")
    several.add_argument("--master-addr", default=env.get("MASTER_ADDR"), help="of the first node")
    several.add_argument("--master-port", type=_count, default=env.get("MASTER_PORT"), help="of the first node")
    several.add_argument("--interface", default="", help="the network interface that joins the nodes, such as eth0")
    parser.add_argument("--on-node", choices=("probe", "stop", "end", "kill"), help=argparse.SUPPRESS)
    parser.add_argument("--job", default="", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND", help="as after `vae-ds`")
    given = parser.parse_args(words)
    if not given.arguments and not given.on_node:
        parser.error("name a vae-ds command, for example: train demo --run-dir runs/demo")
    if given.hostfile and given.processes:
        parser.error("the hostfile says how many processes each node has; leave -n out")
    if (given.multinode or given.no_ssh) and not given.hostfile and not given.nodes:
        parser.error("which nodes? --hostfile FILE; or --nodes N, or NNODES, and this command on each node")
    return given


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def start(given: argparse.Namespace, folder: Path) -> Job:
    """The job that the arguments ask for; `folder` holds its files until its end."""
    if given.interface:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = given.interface
    slots = read_hostfile(given.hostfile) if given.hostfile else {}
    if slots and not given.no_ssh:
        return start_by_ssh(given, slots, folder)
    several = bool(slots or given.nodes)
    if several:
        check_no_ssh(given, len(slots) or given.nodes)
    import torch

    gpus = torch.cuda.device_count()
    processes = given.processes or gpus or 2
    slots = slots or {f"node-{number}": processes for number in range(given.nodes or 1)}
    options, first = ["--num_gpus", str(processes), "--master_port", str(free_port())], 0
    if several:
        options = no_ssh_options(given, slots, folder)
        counts = list(slots.values())
        processes, first = counts[given.node_rank], sum(counts[: given.node_rank])
    told = folder / "exit_code"
    env = environment(processes, gpus) | {"VAE_DS_EXIT_FILE": str(told), "VAE_DS_EXIT_RANK": str(first)}
    return Job(command_line(options, given.arguments), env, told)


def start_by_ssh(given: argparse.Namespace, slots: Mapping[str, int], folder: Path) -> Job:
    """A job on the nodes of a hostfile. Wrong input, unreachable nodes above all, ends with one line."""
    if not shutil.which("pdsh"):
        wrong("pdsh is not installed; install it, or start this command on each node with --no-ssh")
    for path in (str(Path.cwd()), sys.executable):
        if not re.fullmatch(r"[\w@+=:,./-]+", path):
            wrong(f"{path}: DeepSpeed's launcher cannot pass on a path with such characters; work in another place")
    nodes = Nodes(tuple(slots), uuid.uuid4().hex, given.interface)
    address, port = nodes.probe()
    address, port = given.master_addr or address, str(given.master_port or port)
    command = nodes.command_line(given.hostfile, address, port, given.arguments)
    return Job(command, nodes.environment(common_environment(), folder), nodes.told(), nodes)


def main() -> int:
    given = parse(sys.argv[1:])
    if given.on_node:
        return on_node(given.on_node, given.job, given.interface)
    # Until there are ranks to ask, nothing is lost.
    for number in STOPS:
        signal.signal(number, lambda number, frame: sys.exit(EXIT_STOPPED))
    with tempfile.TemporaryDirectory(prefix="vae_ds_ranks_") as folder:
        return start(given, Path(folder)).wait()


if __name__ == "__main__":
    sys.exit(main())
