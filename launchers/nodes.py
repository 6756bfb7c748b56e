"""The nodes of a job without SLURM, for ranks.py: their hostfile, and how ssh and DeepSpeed's launcher reach them.

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
    # This checkout's package, installed or not; a wheelhouse's scripts have theirs installed.
    sys.path.insert(0, str(REPOSITORY))

from vae_ds.runtime import EXIT_USER  # noqa: E402

# Without a launcher in common the nodes cannot agree on a free port.
PORT = 29500
# DeepSpeed passes PYTHON... on to other nodes; these go there too, but no token.
PASSED_ON = re.compile(
    r"(VAE_DS|NCCL|GLOO|OMP|MALLOC|TORCH)_\w+|DS_ACCELERATOR|TOKENIZERS_PARALLELISM"
    r"|HF_HOME|HF_ENDPOINT|HF_HUB_OFFLINE|HF_DATASETS_OFFLINE|TRANSFORMERS_OFFLINE"
)


def wrong(message: str) -> NoReturn:
    """End with one line and the exit code for wrong input."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER)


def launcher() -> str:
    """DeepSpeed's own, of this environment."""
    return str(Path(sys.executable).with_name("deepspeed"))


def read_hostfile(path: Path) -> dict[str, int]:
    """Processes by host, in order, from lines `host slots=N`. Wrong input ends with one line."""
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
            wrong(f"{path}, line {number}: found `{line}`; expected a host and its processes, `name slots=8`")
        if found[1] in slots:
            wrong(f"{path}, line {number}: {found[1]} stands there twice")
        slots[found[1]] = int(found[2])
    if not slots:
        wrong(f"{path}: names no host; a line is `name slots=8`")
    return slots


def check_no_ssh(given: argparse.Namespace, nodes: int) -> None:
    """Whether this node knows its place among `nodes`. Wrong input ends with one line."""
    if not given.master_addr:
        wrong("which node is the first? give its address, the same on every node: --master-addr A, or MASTER_ADDR")
    if given.node_rank is None:
        wrong("which node is this? --node-rank K, or NODE_RANK; the first is 0")
    if not 0 <= given.node_rank < nodes:
        wrong(f"node rank {given.node_rank} is none of {nodes} nodes: 0 to {nodes - 1}")
    names = [name for _, name in socket.if_nameindex()]
    if given.interface and given.interface not in names:
        wrong(f"no network interface {given.interface} here; there are: {', '.join(names)}")


def no_ssh_options(given: argparse.Namespace, slots: Mapping[str, int], folder: Path) -> list[str]:
    """The launcher's options on a node that starts its own ranks; `folder` gets a hostfile."""
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{host} slots={count}\n" for host, count in slots.items()), encoding="utf-8")
    # Given the address, the launcher does not ask the first node for it by ssh.
    options = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(given.node_rank)]
    return [*options, "--master_addr", given.master_addr, "--master_port", str(given.master_port or PORT)]


@dataclass(frozen=True)
class Nodes:
    """Hosts that ssh reaches, with this Python and this file at the same places as here, and a job on them."""

    hosts: tuple[str, ...]
    job: str
    interface: str

    def start(self, what: str) -> subprocess.Popen[str]:
        """Begin `ranks.on_node(what)` on all of them; each line of output has its host in front."""
        words = [sys.executable, str(Path(__file__).with_name("ranks.py")), "--on-node", what, "--job", self.job]
        words += ["--interface", self.interface] if self.interface else []
        command = ["pdsh", "-S", "-R", "ssh", "-f", str(len(self.hosts)), "-w", ",".join(self.hosts)]
        command.append(shlex.join(words).replace("%", "%%"))
        # Without a terminal ssh asks for no password.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def probe(self) -> tuple[str, str]:
        """The first host's address, and a port free there. A host that cannot be used ends with one line."""
        asked = self.start("probe")
        said, complaints = asked.communicate()
        if asked.returncode:
            others = [line for line in complaints.splitlines() if not line.startswith("pdsh@")]
            wrong(f"cannot start on {(others or complaints.splitlines() or ['the nodes'])[0]}")
        found = re.search(rf"^{re.escape(self.hosts[0])}: address (\S+) port (\d+)$", said, re.MULTILINE)
        if found is None:
            wrong(f"{self.hosts[0]} did not tell its address; give it: --master-addr A")
        return found[1], found[2]

    def end(self, what: str) -> int | None:
        """`end` or `kill` what is left of the job. Returns rank 0's exit code, None if it left none."""
        said, _ = self.start(what).communicate()
        found = re.search(r"^\S+: word (\d+)$", said, re.MULTILINE)
        return int(found[1]) if found else None

    def told(self) -> Path:
        """Where rank 0 leaves its exit code, on its own node."""
        return Path("/tmp") / f"vae_ds_exit_{self.job}"

    def command_line(self, hostfile: Path, address: str, port: str, arguments: Sequence[str]) -> list[str]:
        """The deepspeed command that runs `vae-ds ARGUMENTS` on all of them."""
        options = ["-q", "--hostfile", str(hostfile), "--launcher", "pdsh", "--force_multi", "--no_ssh_check"]
        options += ["--master_addr", address, "--master_port", port, "--module", "vae_ds"]
        return [launcher(), *options, *map(_for_remote_shell, arguments)]

    def environment(self, env: Mapping[str, str], folder: Path) -> dict[str, str]:
        """The launcher's environment made of `env`; what the ranks need of it stands in a file that it reads."""
        mine = {"VAE_DS_JOB": self.job, "VAE_DS_EXIT_FILE": str(self.told())}
        mine |= {name: value for name, value in env.items() if PASSED_ON.fullmatch(name) and "\n" not in value}
        file = folder / "deepspeed_env"
        name = env.get("DS_ENV_FILE", ".deepspeed_env")
        # The user's own has the last word.
        theirs = [place.read_text(encoding="utf-8") for place in (Path.home() / name, Path(name)) if place.is_file()]
        lines = [f"{name}={_in_double_quotes(value)}" for name, value in mine.items()]
        lines += [line for text in theirs for line in text.splitlines() if "=" in line]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {**env, "DS_ENV_FILE": str(file)}


def _in_double_quotes(text: str) -> str:
    """What a shell reads as `text` between double quotes, after pdsh has looked for its own %n, %h and %u."""
    return re.sub(r'([\\"$`])', r"\\\1", text).replace("%", "%%")


def _for_remote_shell(word: str) -> str:
    """An argument that arrives as it is, though DeepSpeed, pdsh and a shell read it on the way."""
    # With a space in it DeepSpeed puts it between double quotes, and escapes those within.
    word = re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)
    return word.replace("%", "%%")
