"""Checks of a machine before a run: cores, memory, disks, limits, network, SLURM.

A check changes nothing, except for probe files that it deletes before it returns. 1 GB is 10^9 bytes.
"""

import ipaddress
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from vae_ds import distributed, runtime

State = Literal["ok", "warn", "fail", "skipped"]

GB = 10**9
LEAST_DISK_GB, LEAST_SHM_GB, LEAST_MEMORY_GB = 5.0, 1.0, 2.0
LEAST_FILES = 1024
PROBE_BYTES = 2**20
COMMAND_S = 15.0
MOST_NAMED = 8
SLURM_COMMANDS = ("sinfo", "sbatch", "srun")
# The variables that `runtime` and the launchers read.
SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_NODEID",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_CPUS_PER_TASK",
    "SLURM_RESTART_COUNT",
)


@dataclass(frozen=True)
class Check:
    """The result of one check.

    `found` describes the result, `advice` says what to do if the state is not ok, and `facts` are the plain values.
    `host` is the checked machine.
    """

    name: str
    state: State
    found: str
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    host: str = ""


def cores() -> Check:
    """Compare the cores that this process may use with those that the SLURM job requested."""
    usable, requested = runtime.cores(), int(os.environ.get("SLURM_CPUS_PER_TASK", "0"))
    found = f"{usable} of {os.cpu_count()} usable, {_processor()}"
    facts = {"cores": {"usable": usable, "all": os.cpu_count()}}
    if requested > usable:
        advice = "srun does not inherit --cpus-per-task from sbatch: pass it to srun too, or set SRUN_CPUS_PER_TASK"
        return Check("cores", "warn", f"{found}; the job requested {requested} per task", advice, facts)
    return Check("cores", "ok", found, facts=facts)


def memory() -> Check:
    """The memory available to this process, limited by the machine and by its control groups (version 2)."""
    machine = psutil.virtual_memory()
    free = min([machine.available, *_free_in_control_groups()]) / GB
    found = f"{free:.1f} of {machine.total / GB:.1f} GB available"
    facts = {"memory_gb": {"available": free, "all": machine.total / GB}}
    if free < LEAST_MEMORY_GB:
        advice = "end other processes, or raise the limit of the container or the job (docker --memory, sbatch --mem)"
        return Check("memory", "warn", found, advice, facts)
    return Check("memory", "ok", found, facts=facts)


def disk(name: str, folder: Path, alternative: str, least_gb: float = LEAST_DISK_GB) -> Check:
    """Check that a directory, or its nearest existing parent, is writable and has `least_gb` GB free.

    `alternative` is advice for using another directory.
    """
    title, place = f"disk: {name}", folder.absolute()
    place = next(one for one in (place, *place.parents) if one.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        advice = f"make {place} writable, or free space there, or {alternative}"
        return Check(title, "fail", f"{place}: {error.strerror}", advice)
    usage = shutil.disk_usage(place)
    found = f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB free in {place}"
    facts = {"disks_gb": {name: {"free": usage.free / GB, "all": usage.total / GB, "path": str(place)}}}
    if usage.free < least_gb * GB:
        return Check(title, "warn", found, f"have {least_gb:g} GB free: clear {place}, or {alternative}", facts)
    return Check(title, "ok", found, facts=facts)


def shared_memory() -> Check:
    """The free space in /dev/shm, through which the ranks of one machine communicate."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Check("disk: shared memory", "skipped", f"this machine has no {place}")
    return disk("shared memory", place, "start the container with `docker run --shm-size=8g`", LEAST_SHM_GB)


def open_files() -> Check:
    """The number of files and connections that a process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found, facts = f"{_limit(soft)}, at most {_limit(hard)}", {"open_files": soft}
    if 0 <= soft < LEAST_FILES:
        raised = LEAST_FILES if hard < 0 else min(hard, LEAST_FILES)
        return Check("limit: open files", "warn", found, f"first run `ulimit -n {raised}`", facts)
    return Check("limit: open files", "ok", found, facts=facts)


def locked_memory() -> Check:
    """The limit of locked memory, which InfiniBand transfers need. Skipped without an InfiniBand device."""
    folder = Path("/sys/class/infiniband")
    devices = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    if not devices:
        return Check("limit: locked memory", "skipped", "no InfiniBand device")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found, facts = f"{_limit(soft)} bytes, for {', '.join(devices)}", {"infiniband": devices}
    if soft >= 0:
        advice = "first run `ulimit -l unlimited`; for SLURM, set PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
        return Check("limit: locked memory", "warn", found, advice, facts)
    return Check("limit: locked memory", "ok", found, facts=facts)


@dataclass(frozen=True)
class Interface:
    """A network interface: whether it is up, its IP addresses, its speed in Mbit/s (0 if unknown)."""

    name: str
    is_up: bool
    addresses: tuple[str, ...]
    speed: int

    @property
    def leads_out(self) -> bool:
        """Whether it can reach other machines: it is up and has an address other than the loopback."""
        return self.is_up and any(not ipaddress.ip_address(one).is_loopback for one in self.addresses)

    def __str__(self) -> str:
        state = ("up" if self.is_up else "down") + (f", {self.speed} Mbit/s" if self.speed else "")
        return f"{self.name} {' '.join(self.addresses) or 'without an address'} ({state})"


def read_interfaces() -> list[Interface]:
    """The interfaces of this machine, without link-local addresses."""
    stats, families = psutil.net_if_stats(), (socket.AF_INET, socket.AF_INET6)
    made = []
    for name, addresses in psutil.net_if_addrs().items():
        own = tuple(one.address.partition("%")[0] for one in addresses if one.family in families)
        own = tuple(one for one in own if not ipaddress.ip_address(one).is_link_local)
        known = stats.get(name)
        made.append(Interface(name, bool(known and known.isup), own, known.speed if known else 0))
    return made


def network(on_gpu: bool) -> Check:
    """The interfaces of this machine, and those that gloo and, on GPUs, NCCL use.

    An interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names must exist and be up.
    """
    every = read_interfaces()
    usable = [one.name for one in every if one.is_up and one.addresses]
    facts = {
        "interfaces": [
            {"name": one.name, "up": one.is_up, "addresses": one.addresses, "mbit_s": one.speed} for one in every
        ]
    }
    described = [str(one) for one in every if one.is_up]
    wrong: list[str] = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable)
        if not value:
            continue
        named = set(value.split(",")) <= set(usable) if variable.startswith("GLOO") else chosen(value, usable)
        (described if named else wrong).append(
            f"{variable}={value}" + ("" if named else " names no interface that is up")
        )
    if wrong:
        names = ", ".join(usable) or "none is up"
        return Check("network", "fail", "; ".join([*wrong, *described]), f"unset it, or choose from: {names}", facts)
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        described.append(f"gloo uses {_interface_of_gloo()}")
    if on_gpu and "NCCL_SOCKET_IFNAME" not in os.environ:
        out = [one.name for one in every if one.leads_out and not one.name.startswith(("docker", "virbr"))]
        described.append(f"NCCL uses {out[0] if out else 'lo'}, or InfiniBand if present")
    return Check("network", "ok", "; ".join(described), facts=facts)


def chosen(value: str, names: Sequence[str]) -> list[str]:
    """The interfaces that NCCL_SOCKET_IFNAME selects: by prefix; after `=` by exact name; `^` inverts it."""
    excludes, value = value.startswith("^"), value.removeprefix("^")
    whole, value = value.startswith("="), value.removeprefix("=")
    given = [one for one in value.split(",") if one]
    return [
        name for name in names if any(name == one or (not whole and name.startswith(one)) for one in given) != excludes
    ]


def host_name() -> Check:
    """Check that the host name resolves to an address of this machine that other machines can use."""
    name, interfaces = socket.gethostname(), read_interfaces()
    out = [one for one in interfaces if one.leads_out]
    address = next((one for way in out for one in way.addresses if ":" not in one), "its address")
    interface = out[0].name if out else "the interface that reaches the other machines"
    advice = (
        "not needed on one machine or in SLURM jobs; for other runs on several machines set "
        f"MASTER_ADDR={address} if rank 0 is here, and GLOO_SOCKET_IFNAME={interface} (NCCL_SOCKET_IFNAME too), "
        "or correct the name in /etc/hosts or DNS"
    )
    try:
        found = sorted({str(one[4][0]).partition("%")[0] for one in socket.getaddrinfo(name, None)})
    except OSError as error:
        return Check("host name", "warn", f"{name} does not resolve ({error.strerror})", advice)
    own = {address for one in interfaces for address in one.addresses}
    described, facts = f"{name} resolves to {', '.join(found)}", {"host_addresses": found}
    external = [one for one in found if not ipaddress.ip_address(one).is_loopback]
    if not external:
        return Check("host name", "warn", f"{described}: only the loopback", advice, facts)
    if not own & set(external):
        return Check("host name", "warn", f"{described}: not an address of this machine", advice, facts)
    return Check("host name", "ok", described, facts=facts)


def scheduler() -> Check:
    """SLURM's commands and version, and whether its controller answers."""
    installed = [name for name in SLURM_COMMANDS if shutil.which(name)]
    if not installed:
        return Check("slurm", "skipped", "no SLURM commands on the PATH")
    missing = [name for name in SLURM_COMMANDS if name not in installed]
    if missing:
        advice = "install all of SLURM's client commands, or add them to the PATH"
        return Check("slurm", "warn", f"found {', '.join(installed)}, but not {', '.join(missing)}", advice)
    version, answer = _output("sinfo", "--version"), _output("scontrol", "ping")
    facts = {"slurm": {"version": version if version.startswith("slurm") else None, "controller": answer}}
    # `scontrol ping` prints one line per controller. A backup that is down does not matter.
    if " UP" not in answer:
        advice = "start slurmctld and munged, or set SLURM_CONF; not needed for runs without SLURM"
        reason = answer.split("; ")[-1] or "no output"
        return Check("slurm", "warn", f"the commands are installed, but no controller answers: {reason}", advice, facts)
    return Check("slurm", "ok", f"{version}; {answer}", facts=facts)


def job() -> Check:
    """The SLURM job of this process, and its task in the job."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return Check("slurm job", "skipped", "not inside a job")
    found = f"job {env['SLURM_JOB_ID']} on {env.get('SLURM_JOB_NUM_NODES', '?')} nodes"
    if "SLURM_STEP_NUM_TASKS" in env:
        found += f", task {env.get('SLURM_PROCID', '?')} of {env['SLURM_STEP_NUM_TASKS']}, step {env['SLURM_STEP_ID']}"
    else:
        found += ", outside its steps: not started by srun"
    return Check("slurm job", "ok", found, facts={"slurm_job": {key: env.get(key) for key in SLURM_VARIABLES}})


def this_host() -> str:
    """The name of this machine. In a SLURM job it is the name of the node, which may differ."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def output_of(*command: str) -> tuple[int, str]:
    """Run a command. Returns its exit code and all output in one line; 127 if it cannot start, 124 after a time-out."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=COMMAND_S
        )
    except OSError as error:
        return 127, f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return 124, f"`{' '.join(command)}` did not answer within {COMMAND_S:g} s"
    return done.returncode, "; ".join(done.stdout.decode(errors="replace").split("\n")).strip("; ")


def some(things: Sequence[object]) -> str:
    """The first items of a list as text, and the number of the others."""
    rest = len(things) - MOST_NAMED
    return ", ".join(map(str, things[:MOST_NAMED])) + (f" and {rest} more" if rest > 0 else "")


def merged(checks: Sequence[Check]) -> dict[str, Any]:
    """Merge the facts of all checks into one tree."""
    tree: dict[str, Any] = {}
    for check in checks:
        for key, value in check.facts.items():
            before = tree.get(key)
            tree[key] = {**before, **value} if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return tree


def _output(*command: str) -> str:
    return output_of(*command)[1]


def _interface_of_gloo() -> str:
    """The interface that `distributed` selects for gloo: with the route to MASTER_ADDR; on one machine the loopback."""
    address = os.environ.get("MASTER_ADDR")
    if not address:
        return "the interface with the route to MASTER_ADDR"
    return distributed.interface_to(address) or f"no interface: none has a route to MASTER_ADDR {address}"


def _free_in_control_groups() -> Iterator[int]:
    """The bytes that the control group of this process and each of its parents still allow.

    Inactive file cache counts as free.
    """
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    own = next((root / line[len("0::/") :] for line in lines if line.startswith("0::/")), root)
    for folder in (own, *own.parents):
        if folder != root and root not in folder.parents:
            return
        try:
            limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            if limit != "max":
                yield max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0)))
        except (OSError, ValueError):
            continue


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)
