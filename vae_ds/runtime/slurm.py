"""Which rank a SLURM task is and where its ranks meet, from the variables that `srun` sets for each task."""

import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from vae_ds.errors import ConfigError

# Below the ports that Linux gives to outgoing connections, above those of well-known services.
FIRST_PORT, PORTS = 10000, 20000


@dataclass(frozen=True)
class Task:
    """One task of a job step: its numbers, how many tasks its node runs, and where rank 0 listens."""

    rank: int
    local_rank: int
    world: int
    local_world: int
    master_addr: str
    master_port: int


def task(env: Mapping[str, str]) -> Task | None:
    """The task that `env` describes; None outside a job step, as in a batch script or in salloc's shell.

    MASTER_ADDR and MASTER_PORT are taken where they are set. Else rank 0 is on the step's first node, and the port
    comes from the numbers of job and step. Raises ConfigError if the first node has no address.
    """
    # srun alone sets it: a batch script has a process number too, and no peers.
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env:
        return None
    node, world = int(env.get("SLURM_NODEID", "0")), int(env["SLURM_STEP_NUM_TASKS"])
    port = env.get("MASTER_PORT") or port_of(int(env["SLURM_JOB_ID"]), int(env.get("SLURM_STEP_ID", "0")))
    return Task(
        rank=int(env["SLURM_PROCID"]),
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        world=world,
        local_world=tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", str(world)))[node],
        master_addr=env.get("MASTER_ADDR") or address_of(first_host(env["SLURM_STEP_NODELIST"])),
        master_port=int(port),
    )


def port_of(job: int, step: int) -> int:
    """A port that jobs on the same node, and steps of the same job, do not share."""
    return FIRST_PORT + (job + 4099 * step) % PORTS


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list, such as `gpu-[07-09,12],login1`: `gpu-07`."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])+", nodes)
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST: no node in {nodes!r}")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0])


def tasks_per_node(counts: str) -> list[int]:
    """SLURM's short form, such as `2(x3),1`, written out: [2, 2, 2, 1]."""
    whole = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE: {counts!r} has no such form as 2(x3),1")
        whole += [int(match[1])] * int(match[2] or 1)
    return whole


def address_of(node: str) -> str:
    """A node's name where it resolves, else the address that SLURM itself uses for it: names may differ.

    A name that means this machine's loopback here means another machine there, so SLURM is asked then, too.
    """
    try:
        if not socket.gethostbyname(node).startswith("127."):
            return node
    except OSError:
        pass
    try:
        shown = subprocess.run(
            ["scontrol", "show", "node", node, "--oneliner"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        shown = ""
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    try:
        return socket.gethostbyname(found[1] if found else node)
    except OSError:
        raise ConfigError(f"the node {node} has no address; set MASTER_ADDR to one that all nodes reach") from None
