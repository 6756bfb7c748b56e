"""Run a vae-ds command on all devices through the deepspeed launcher: `ranks.py -n N train RECIPE ...`.

Adds what the launcher lacks: a free port, a thread count per rank, the devices in CUDA_VISIBLE_DEVICES, and signals.
SIGINT, SIGTERM and SIGHUP go only to the ranks, to all at once, so that they save at the same step and this process
exits with their exit code. A second SIGINT, or the end of the grace period, kills the remaining processes. No process
outlives this one.

Several nodes (multinode.sh): with a hostfile, the launcher and the signals reach the nodes by ssh. With --no-ssh or
without a hostfile, each node starts its own ranks. Exit codes: 0 done, 1 a fault, 2 wrong input, 69 a rank or its
machine is gone, 75 stopped. After 69 and 75 the same command resumes.
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
# For launchers, and connections to other nodes, to end by themselves after the ranks have ended.
WIND_UP_S = 15.0
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def common_environment() -> dict[str, str]:
    """The part of the environment of the launcher and the ranks that is the same on all machines."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # Use the package of this checkout, installed or not, from any working directory.
    if IN_CHECKOUT:
        env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [env.get("PYTHONPATH")])])
    return env


def environment(processes: int, gpus: int) -> dict[str, str]:
    """The environment of the launcher and its ranks on this machine."""
    env = common_environment()
    # The launcher sets no thread count, and then each rank would use all cores.
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    if not gpus:
        env["DS_ACCELERATOR"] = "cpu"
        # By default glibc returns each large tensor to the system and maps new pages: 1/8 of the time of a CPU step.
        env.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
        env.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
        # Without this number, DeepSpeed counts NUMA nodes as CPU devices.
        env["LOCAL_SIZE"] = str(processes)
    return env


def read_exit_code(exit_file: Path) -> int | None:
    """The exit code that a rank left in `exit_file`, None if it was killed."""
    try:
        return int(exit_file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def job_exit_code(launcher_code: int, rank_code: int | None, stop_requested: bool) -> int:
    """The exit code of the job. The rank's code has priority: DeepSpeed's launcher exits with 0 after some failures.

    `rank_code` is None if the rank was killed, or if it had not started when the job was asked to stop.
    """
    if rank_code:
        return rank_code
    if rank_code is None and stop_requested:
        return EXIT_STOPPED
    if rank_code is None and not launcher_code:
        print("error: the ranks ended without an exit code; see their output above", file=sys.stderr, flush=True)
        return EXIT_FAULT
    known = (0, EXIT_FAULT, EXIT_USER, EXIT_LOST, EXIT_STOPPED)
    return launcher_code if launcher_code in known else EXIT_LOST


def command_line(options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The deepspeed command, with the launcher's `options`, that runs `vae-ds ARGUMENTS` on devices of this machine."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not chosen:
        return [launcher(), "-q", *options, "--module", "vae_ds", *arguments]
    # The launcher would renumber the devices from 0, and it cannot parse UUIDs and MIG slices.
    python = ["env", f"CUDA_VISIBLE_DEVICES={chosen}", sys.executable, "-u", "-m", "vae_ds"]
    return [launcher(), "-q", *options, "--no_python", "--no_local_rank", *python, *arguments]


def on_node(action: str, job: str, interface: str) -> int:
    """Run an action of `Nodes` on this node.

    `probe` prints an address and a free port. `stop` lets the ranks of the job save and end, and kills them after the
    grace period. `end` does the same and prints the exit code that rank 0 left. `kill` is `end` without a grace period.
    """
    if action == "probe":
        addresses = psutil.net_if_addrs()
        if interface and interface not in addresses:
            wrong(f"no network interface {interface} on the node; found: {', '.join(addresses)}")
        chosen = [one.address for one in addresses.get(interface, []) if one.family == socket.AF_INET]
        chosen += subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
        print(f"address {chosen[0] if chosen else '127.0.0.1'} port {free_port()}", flush=True)
        return 0

    def members() -> list[psutil.Process]:
        return [one for one in psutil.process_iter() if _variable(one, "VAE_DS_JOB") == job]

    deadline = time.monotonic() + (0 if action == "kill" else GRACE_S)
    ask_to_stop(members())
    while members() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    kill(members())
    exit_file = Nodes((), job, "").exit_file()
    code = read_exit_code(exit_file)
    if action != "stop" and code is not None:
        print(f"exit code {code}", flush=True)
        exit_file.unlink(missing_ok=True)
    return 0


# A job and its end


def ask_to_stop(members: Sequence[psutil.Process]) -> None:
    """Send SIGTERM to all ranks, or to all processes if no rank has started yet."""
    # The children of a rank (workers that read the corpus) have its variables too. The rank ends them.
    ranks = [one for one in members if _variable(one, "RANK") and not _variable(_parent(one), "RANK")]
    for process in ranks or members:
        _send(process, signal.SIGTERM)


def kill(members: Sequence[psutil.Process]) -> None:
    for process in members:
        _send(process, signal.SIGKILL)


class Job:
    """A launcher and its ranks, in a separate session: Ctrl-C in a terminal reaches them only through this process."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], exit_file: Path, nodes: Nodes | None = None
    ) -> None:
        """Start the launcher.

        Rank 0, or the first rank of this node, leaves its exit code in `exit_file`. With `nodes`, the ranks run there.
        """
        self.launcher = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        self.exit_file = exit_file
        self.nodes = nodes
        self.stop_command: subprocess.Popen[str] | None = None
        self.interrupts = 0
        self.stop_requested = False
        self.deadline: float | None = None
        for number in STOPS:
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the ranks to stop. They save and exit."""
        self.interrupts += number == signal.SIGINT
        if not self.stop_requested:
            self.stop_requested = True
            print("\nstopping: the ranks save and exit; press Ctrl-C again to kill them", file=sys.stderr, flush=True)
            self.ask_to_stop()

    def members(self) -> list[psutil.Process]:
        """The processes of the session, without zombies."""
        living = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.launcher.pid and process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
            except (psutil.Error, OSError):
                continue
        return living

    def ask_to_stop(self) -> None:
        """Ask the ranks to stop, here or on their nodes. The first call starts the grace period; others do nothing."""
        if self.deadline is not None:
            return
        self.deadline = time.monotonic() + GRACE_S
        if self.nodes is None:
            ask_to_stop(self.members())
        else:
            self.stop_command = self.nodes.start("stop")

    def wait(self) -> int:
        """Wait until all processes have ended; kill those that do not end in time. Returns the exit code of the job."""
        while self.launcher.poll() is None and not self._expired():
            time.sleep(POLL_S)
        # The launcher can end before its ranks. The ranks get the same time to save.
        if self.members():
            self.ask_to_stop()
        while self.members() and not self._expired():
            time.sleep(POLL_S)
        killed = self.interrupts > 1
        kill(self.members())
        code = self.launcher.wait()
        if self.nodes is None:
            return job_exit_code(code, read_exit_code(self.exit_file), self.stop_requested)
        return job_exit_code(code, self.nodes.end("kill" if killed else "end"), self.stop_requested)

    def _expired(self) -> bool:
        if self.interrupts > 1:
            return True
        if self.stop_command is not None and self.stop_command.poll() is not None and self.deadline is not None:
            # The nodes have no processes of the job. The local processes have not noticed this, or had not started any.
            self.deadline = min(self.deadline, time.monotonic() + WIND_UP_S)
            self.stop_command = None
        return self.deadline is not None and time.monotonic() > self.deadline


def _variable(process: psutil.Process | None, name: str) -> str | None:
    """A variable of another process. None if it is not set, or if the process has ended or belongs to another user."""
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
    """Reports wrong arguments in one line."""

    def error(self, message: str) -> NoReturn:
        wrong(f"{message}; see --help")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. With --multinode, missing options come from the environment, as orchestrators set it."""
    env = os.environ if "--multinode" in words[:1] else {}
    parser = Parser(description="Run a vae-ds command on all devices.", allow_abbrev=False)
    parser.add_argument(
        "-n",
        "--processes",
        "--gpus-per-node",
        type=_count,
        help="number of processes, with several nodes on each node (default: one per GPU; without GPUs, 2)",
    )
    several = parser.add_argument_group("several nodes (launchers/multinode.sh)")
    several.add_argument(
        "--multinode",
        action="store_true",
        help="first argument: read missing options from NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT",
    )
    names = several.add_mutually_exclusive_group()
    names.add_argument("--hostfile", type=Path, metavar="FILE", help="the nodes, in lines `host slots=PROCESSES`")
    names.add_argument("--nodes", type=_count, default=env.get("NNODES"), help="number of nodes, without a hostfile")
    several.add_argument(
        "--no-ssh", action="store_true", help="start only the ranks of this node; run this command on each node"
    )
    several.add_argument("--node-rank", type=int, default=env.get("NODE_RANK"), help="the rank of this node, from 0")
    several.add_argument("--master-addr", default=env.get("MASTER_ADDR"), help="the address of the first node")
    several.add_argument(
        "--master-port", type=_count, default=env.get("MASTER_PORT"), help="a free port of the first node"
    )
    several.add_argument("--interface", default="", help="the network interface between the nodes, such as eth0")
    parser.add_argument("--on-node", choices=("probe", "stop", "end", "kill"), help=argparse.SUPPRESS)
    parser.add_argument("--job", default="", help=argparse.SUPPRESS)
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="COMMAND", help="a vae-ds command with its arguments"
    )
    given = parser.parse_args(words)
    if not given.arguments and not given.on_node:
        parser.error("name a vae-ds command, for example: train demo --run-dir runs/demo")
    if given.hostfile and given.processes:
        parser.error("the hostfile already sets the number of processes per node; omit -n")
    if (given.multinode or given.no_ssh) and not given.hostfile and not given.nodes:
        parser.error(
            "no nodes given; use --hostfile FILE, or set --nodes N or NNODES and run this command on each node"
        )
    return given


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"found {text}; expected an integer of at least 1")
    return int(text)


def start(given: argparse.Namespace, folder: Path) -> Job:
    """Start the job that the arguments describe. `folder` contains its files until it ends."""
    if given.interface:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = given.interface
    slots = read_hostfile(given.hostfile) if given.hostfile else {}
    if slots and not given.no_ssh:
        return start_by_ssh(given, slots, folder)
    is_multinode = bool(slots or given.nodes)
    if is_multinode:
        check_no_ssh(given, len(slots) or given.nodes)
    import torch

    gpus = torch.cuda.device_count()
    processes = given.processes or gpus or 2
    slots = slots or {f"node-{number}": processes for number in range(given.nodes or 1)}
    options, first = ["--num_gpus", str(processes), "--master_port", str(free_port())], 0
    if is_multinode:
        options = no_ssh_options(given, slots, folder)
        counts = list(slots.values())
        processes, first = counts[given.node_rank], sum(counts[: given.node_rank])
    exit_file = folder / "exit_code"
    env = environment(processes, gpus) | {"VAE_DS_EXIT_FILE": str(exit_file), "VAE_DS_EXIT_RANK": str(first)}
    return Job(command_line(options, given.arguments), env, exit_file)


def start_by_ssh(given: argparse.Namespace, slots: Mapping[str, int], folder: Path) -> Job:
    """Start a job on the nodes of a hostfile. Wrong input, such as unreachable nodes, exits with one line."""
    if not shutil.which("pdsh"):
        wrong("pdsh is not installed; install it, or start this command on each node with --no-ssh")
    for path in (str(Path.cwd()), sys.executable):
        if not re.fullmatch(r"[\w@+=:,./-]+", path):
            wrong(f"{path}: DeepSpeed's launcher cannot pass on a path with special characters; use another directory")
    nodes = Nodes(tuple(slots), uuid.uuid4().hex, given.interface)
    address, port = nodes.probe()
    address, port = given.master_addr or address, str(given.master_port or port)
    command = nodes.command_line(given.hostfile, address, port, given.arguments)
    return Job(command, nodes.environment(common_environment(), folder), nodes.exit_file(), nodes)


def main() -> int:
    given = parse(sys.argv[1:])
    if given.on_node:
        return on_node(given.on_node, given.job, given.interface)
    # Before the ranks start, there is nothing to save.
    for number in STOPS:
        signal.signal(number, lambda number, frame: sys.exit(EXIT_STOPPED))
    with tempfile.TemporaryDirectory(prefix="vae_ds_ranks_") as folder:
        return start(given, Path(folder)).wait()


if __name__ == "__main__":
    sys.exit(main())
