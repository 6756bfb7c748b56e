"""The rank of a SLURM task and the address of rank 0, from the variables that `srun` sets for each task."""

import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from vae_ds.errors import ConfigError

# Below the ports that Linux uses for outgoing connections, and above those of well-known services.
FIRST_PORT, PORTS = 10000, 20000


@dataclass(frozen=True)
class Task:
    """One task of a job step: its ranks, the number of tasks on its node, and the address and port of rank 0."""

    rank: int
    local_rank: int
    world: int
    local_world: int
    master_addr: str
    master_port: int


def task(env: Mapping[str, str]) -> Task | None:
    """The task that `env` describes. None outside a job step, as in a batch script or in salloc's shell.

    If MASTER_ADDR and MASTER_PORT are not set, rank 0 is on the step's first node, and the port is computed from the
    ids of the job and the step. Raises ConfigError if the first node has no address.
    """
    # Only srun sets SLURM_STEP_NUM_TASKS. A batch script has SLURM_PROCID too, but it is not one of several tasks.
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


def is_launched(env: Mapping[str, str]) -> bool:
    """Whether a launcher or srun has started this process as one of several ranks."""
    if "RANK" in env:
        return int(env.get("WORLD_SIZE", "1")) > 1
    return "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def port_of(job: int, step: int) -> int:
    """A port that differs between jobs on the same node, and between steps of the same job."""
    return FIRST_PORT + (job + 4099 * step) % PORTS


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list, such as `gpu-[07-09,12],login1`: `gpu-07`."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])+", nodes)
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST: found no node in {nodes!r}; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0])


def tasks_per_node(counts: str) -> list[int]:
    """The expansion of SLURM's short form: `2(x3),1` is [2, 2, 2, 1]."""
    whole = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE: {counts!r}: expected a form such as 2(x3),1")
        whole += [int(match[1])] * int(match[2] or 1)
    return whole


def address_of(node: str) -> str:
    """The name of a node if it resolves, else the address that SLURM uses for it: the two names can differ.

    A name that resolves to the loopback address here would mean another machine on the other nodes. In this case, the
    address also comes from SLURM.
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
        raise ConfigError(
            f"the node {node} has no address; set MASTER_ADDR to an address that all nodes reach"
        ) from None
