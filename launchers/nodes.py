"""The nodes of a job without SLURM, for ranks.py: the hostfile, and commands over ssh and through DeepSpeed's launcher.

Wrong input ends the process with one line and exit code 2.
"""

import argparse
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
IN_CHECKOUT = (REPOSITORY / "vae_ds").is_dir()
if IN_CHECKOUT:
    # Use the package of this checkout, installed or not. The scripts of a wheelhouse use the installed package.
    sys.path.insert(0, str(REPOSITORY))

from vae_ds.runtime import EXIT_USER  # noqa: E402

# The default port if each node has its own launcher: these cannot agree on a free port.
PORT = 29500
# Variables passed on to other nodes, in addition to DeepSpeed's PYTHON... . Access tokens are not passed on.
PASSED_ON = re.compile(
    r"(VAE_DS|NCCL|GLOO|OMP|MALLOC|TORCH)_\w+|DS_ACCELERATOR|TOKENIZERS_PARALLELISM"
    r"|HF_HOME|HF_ENDPOINT|HF_HUB_OFFLINE|HF_DATASETS_OFFLINE|TRANSFORMERS_OFFLINE"
)


def wrong(message: str) -> NoReturn:
    """Exit with one line and the exit code for wrong input."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER)


def launcher() -> str:
    """The path of DeepSpeed's launcher in this environment."""
    return str(Path(sys.executable).with_name("deepspeed"))


def read_hostfile(path: Path) -> dict[str, int]:
    """Read lines `host slots=N`. Returns the number of processes by host, in order. Wrong input exits with one line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        wrong(f"{path}: cannot read the hostfile ({getattr(error, 'strerror', 'not text')})")
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = re.match(r"([\w@.:][\w@.:-]*)\s+slots=([1-9]\d*)(\s|$)", line)
        if found is None:
            wrong(f"{path}, line {number}: found `{line}`; expected a host and its processes, such as `name slots=8`")
        if found[1] in slots:
            wrong(f"{path}, line {number}: the host {found[1]} is already listed")
        slots[found[1]] = int(found[2])
    if not slots:
        wrong(f"{path}: no host in the hostfile; expected lines such as `name slots=8`")
    return slots


def check_no_ssh(given: argparse.Namespace, nodes: int) -> None:
    """Check the arguments of a node that starts its own ranks, one of `nodes`. Wrong input exits with one line."""
    if not given.master_addr:
        wrong("no address of the first node; set --master-addr A or MASTER_ADDR, the same on every node")
    if given.node_rank is None:
        wrong("no rank of this node; set --node-rank K or NODE_RANK, where the first node is 0")
    if not 0 <= given.node_rank < nodes:
        wrong(f"found node rank {given.node_rank}; with {nodes} nodes it is 0 to {nodes - 1}")
    names = [name for _, name in socket.if_nameindex()]
    if given.interface and given.interface not in names:
        wrong(f"no network interface {given.interface} on this node; found: {', '.join(names)}")


def no_ssh_options(given: argparse.Namespace, slots: Mapping[str, int], folder: Path) -> list[str]:
    """The launcher's options on a node that starts its own ranks. Writes a hostfile to `folder`."""
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{host} slots={count}\n" for host, count in slots.items()), encoding="utf-8")
    # With the address given, the launcher does not use ssh to ask the first node for it.
    options = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(given.node_rank)]
    return [*options, "--master_addr", given.master_addr, "--master_port", str(given.master_port or PORT)]


@dataclass(frozen=True)
class Nodes:
    """The hosts of a job, reached by ssh. They have this Python and this file at the same paths as this machine."""

    hosts: tuple[str, ...]
    job: str
    interface: str

    def start(self, action: str) -> subprocess.Popen[str]:
        """Start `ranks.on_node(action)` on all hosts. Each line of output begins with the host."""
        words = [sys.executable, str(Path(__file__).with_name("ranks.py")), "--on-node", action, "--job", self.job]
        words += ["--interface", self.interface] if self.interface else []
        command = ["pdsh", "-S", "-R", "ssh", "-f", str(len(self.hosts)), "-w", ",".join(self.hosts)]
        command.append(shlex.join(words).replace("%", "%%"))
        # Without a terminal ssh does not ask for a password.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def probe(self) -> tuple[str, str]:
        """The address of the first host, and a free port on it. Exits with one line if a host cannot be used."""
        probe = self.start("probe")
        output, errors = probe.communicate()
        if probe.returncode:
            wrong(f"cannot start on {_cause(errors)}")
        found = re.search(rf"^{re.escape(self.hosts[0])}: address (\S+) port (\d+)$", output, re.MULTILINE)
        if found is None:
            wrong(f"{self.hosts[0]} did not report its address; set --master-addr A")
        return found[1], found[2]

    def end(self, action: str) -> int | None:
        """`end` or `kill` the remaining processes of the job. Returns the exit code that rank 0 left, None if none."""
        output, _ = self.start(action).communicate()
        found = re.search(r"^\S+: exit code (\d+)$", output, re.MULTILINE)
        return int(found[1]) if found else None

    def exit_file(self) -> Path:
        """The file on its own node in which rank 0 leaves its exit code."""
        return Path("/tmp") / f"vae_ds_exit_{self.job}"

    def command_line(self, hostfile: Path, address: str, port: str, arguments: Sequence[str]) -> list[str]:
        """The deepspeed command that runs `vae-ds ARGUMENTS` on all hosts."""
        options = ["-q", "--hostfile", str(hostfile), "--launcher", "pdsh", "--force_multi", "--no_ssh_check"]
        options += ["--master_addr", address, "--master_port", port, "--module", "vae_ds"]
        return [launcher(), *options, *map(_for_remote_shell, arguments)]

    def environment(self, env: Mapping[str, str], folder: Path) -> dict[str, str]:
        """The environment of the launcher, from `env`. It reads the variables of the ranks from a file in `folder`."""
        passed = {"VAE_DS_JOB": self.job, "VAE_DS_EXIT_FILE": str(self.exit_file())}
        passed |= {name: value for name, value in env.items() if PASSED_ON.fullmatch(name) and "\n" not in value}
        file = folder / "deepspeed_env"
        name = env.get("DS_ENV_FILE", ".deepspeed_env")
        # The user's own files come last, so that they override.
        user_files = [
            place.read_text(encoding="utf-8") for place in (Path.home() / name, Path(name)) if place.is_file()
        ]
        lines = [f"{name}={_in_double_quotes(value)}" for name, value in passed.items()]
        lines += [line for text in user_files for line in text.splitlines() if "=" in line]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {**env, "DS_ENV_FILE": str(file)}


def _cause(errors: str) -> str:
    """The line of pdsh's error output that tells why a host cannot be used.

    A login shell may write other lines there. pdsh names the hosts that failed; ssh or Python write their message last.
    """
    lines = errors.splitlines()
    failed = {found[1] for line in lines if (found := re.match(r"pdsh@\S+: (\S+): ", line))}
    of_failed = [line for line in lines if line.split(": ")[0] in failed]
    return (of_failed or lines or ["the nodes"])[-1].replace(": error: ", ": ", 1)


def _in_double_quotes(text: str) -> str:
    """Escape `text` for double quotes in a shell, and for pdsh, which replaces %n, %h and %u."""
    return re.sub(r'([\\"$`])', r"\\\1", text).replace("%", "%%")


def _for_remote_shell(word: str) -> str:
    """Escape an argument so that it arrives unchanged through DeepSpeed, pdsh and a shell."""
    # DeepSpeed puts an argument with a space between double quotes, and escapes double quotes inside it.
    word = re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)
    return word.replace("%", "%%")
