"""Checks of a machine before a run: cores, memory, disks, limits, network, SLURM.

A check looks and changes nothing, but for probe files that are gone when it returns. GB are 10^9 bytes.
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
# What runtime and the launchers read of them.
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
    """What one check found, in words; `advice` says what to do where it is not ok; `facts` are its plain numbers.

    `host` is the machine that it speaks of.
    """

    name: str
    state: State
    found: str
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    host: str = ""


def cores() -> Check:
    """The cores that this process may use, against those that a SLURM job asked for."""
    usable, asked = runtime.cores(), int(os.environ.get("SLURM_CPUS_PER_TASK", "0"))
    found = f"{usable} of {os.cpu_count()} usable, {_processor()}"
    facts = {"cores": {"usable": usable, "all": os.cpu_count()}}
    if asked > usable:
        advice = "srun does not pass --cpus-per-task on from sbatch: give it to srun too, or set SRUN_CPUS_PER_TASK"
        return Check("cores", "warn", f"{found}; the job asked for {asked} a task", advice, facts)
    return Check("cores", "ok", found, facts=facts)


def memory() -> Check:
    """The memory that this process can still have: of the machine, and of its control groups (version 2)."""
    machine = psutil.virtual_memory()
    free = min([machine.available, *_rooms_of_groups()]) / GB
    found = f"{free:.1f} of {machine.total / GB:.1f} GB available"
    facts = {"memory_gb": {"available": free, "all": machine.total / GB}}
    if free < LEAST_MEMORY_GB:
        advice = "end what else runs here, or ask the container or the job for more (docker --memory, sbatch --mem)"
        return Check("memory", "warn", found, advice, facts)
    return Check("memory", "ok", found, facts=facts)


def disk(name: str, folder: Path, instead: str, least_gb: float = LEAST_DISK_GB) -> Check:
    """Whether a folder, or where it would be made, can be written, and what is free there; `instead` says how to go
    elsewhere.
    """
    title, place = f"disk: {name}", folder.absolute()
    place = next(one for one in (place, *place.parents) if one.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        advice = f"make {place} writable, or free space there, or {instead}"
        return Check(title, "fail", f"{place}: {error.strerror}", advice)
    usage = shutil.disk_usage(place)
    found = f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB free in {place}"
    facts = {"disks_gb": {name: {"free": usage.free / GB, "all": usage.total / GB, "path": str(place)}}}
    if usage.free < least_gb * GB:
        return Check(title, "warn", found, f"have {least_gb:g} GB free: clear {place}, or {instead}", facts)
    return Check(title, "ok", found, facts=facts)


def shared_memory() -> Check:
    """What is free in /dev/shm, through which the ranks of a machine talk."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Check("disk: shared memory", "skipped", f"this machine has no {place}")
    return disk("shared memory", place, "start the container with `docker run --shm-size=8g`", LEAST_SHM_GB)


def open_files() -> Check:
    """How many files and connections a process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found, facts = f"{_limit(soft)}, at most {_limit(hard)}", {"open_files": soft}
    if 0 <= soft < LEAST_FILES:
        raised = LEAST_FILES if hard < 0 else min(hard, LEAST_FILES)
        return Check("limit: open files", "warn", found, f"`ulimit -n {raised}` before the run", facts)
    return Check("limit: open files", "ok", found, facts=facts)


def locked_memory() -> Check:
    """InfiniBand transfers need memory that is locked; asked only where there is such a device."""
    folder = Path("/sys/class/infiniband")
    devices = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    if not devices:
        return Check("limit: locked memory", "skipped", "no InfiniBand device")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found, facts = f"{_limit(soft)} bytes, for {', '.join(devices)}", {"infiniband": devices}
    if soft >= 0:
        advice = "`ulimit -l unlimited` before the run; in SLURM, PropagateResourceLimitsExcept=MEMLOCK"
        return Check("limit: locked memory", "warn", found, advice, facts)
    return Check("limit: locked memory", "ok", found, facts=facts)


@dataclass(frozen=True)
class Interface:
    """A network interface: whether it is up, its IP addresses, its speed in Mbit/s (0: it does not say)."""

    name: str
    is_up: bool
    addresses: tuple[str, ...]
    speed: int

    @property
    def leads_out(self) -> bool:
        """Whether other machines may be reached through it."""
        return self.is_up and any(not ipaddress.ip_address(one).is_loopback for one in self.addresses)

    def __str__(self) -> str:
        state = ("up" if self.is_up else "down") + (f", {self.speed} Mbit/s" if self.speed else "")
        return f"{self.name} {' '.join(self.addresses) or 'without an address'} ({state})"


def read_interfaces() -> list[Interface]:
    """Those of this machine, without link-local addresses."""
    stats, families = psutil.net_if_stats(), (socket.AF_INET, socket.AF_INET6)
    made = []
    for name, addresses in psutil.net_if_addrs().items():
        own = tuple(one.address.partition("%")[0] for one in addresses if one.family in families)
        own = tuple(one for one in own if not ipaddress.ip_address(one).is_link_local)
        known = stats.get(name)
        made.append(Interface(name, bool(known and known.isup), own, known.speed if known else 0))
    return made


def network(on_gpu: bool) -> Check:
    """The interfaces, and those that gloo, and NCCL on GPUs, take: a variable's, which must be here and up."""
    every = read_interfaces()
    usable = [one.name for one in every if one.is_up and one.addresses]
    facts = {
        "interfaces": [
            {"name": one.name, "up": one.is_up, "addresses": one.addresses, "mbit_s": one.speed} for one in every
        ]
    }
    told = [str(one) for one in every if one.is_up]
    wrong: list[str] = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable)
        if not value:
            continue
        named = set(value.split(",")) <= set(usable) if variable.startswith("GLOO") else chosen(value, usable)
        (told if named else wrong).append(f"{variable}={value}" + ("" if named else " names no interface that is up"))
    if wrong:
        names = ", ".join(usable) or "none is up"
        return Check("network", "fail", "; ".join([*wrong, *told]), f"unset it, or choose of: {names}", facts)
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        told.append(f"gloo takes {_interface_of_gloo()}")
    if on_gpu and "NCCL_SOCKET_IFNAME" not in os.environ:
        out = [one.name for one in every if one.leads_out and not one.name.startswith(("docker", "virbr"))]
        told.append(f"NCCL takes {out[0] if out else 'lo'}, or InfiniBand where there is some")
    return Check("network", "ok", "; ".join(told), facts=facts)


def chosen(value: str, names: Sequence[str]) -> list[str]:
    """The interfaces that NCCL_SOCKET_IFNAME selects: starts of names, `=` for whole names, `^` for all but these."""
    excludes, value = value.startswith("^"), value.removeprefix("^")
    whole, value = value.startswith("="), value.removeprefix("=")
    given = [one for one in value.split(",") if one]
    return [
        name for name in names if any(name == one or (not whole and name.startswith(one)) for one in given) != excludes
    ]


def host_name() -> Check:
    """Whether this machine's name leads to it, for other machines too."""
    name, interfaces = socket.gethostname(), read_interfaces()
    out = [one for one in interfaces if one.leads_out]
    address = next((one for way in out for one in way.addresses if ":" not in one), "its address")
    interface = out[0].name if out else "the one that leads to the others"
    advice = (
        "one machine alone and SLURM's jobs can do without; for other runs over several machines set "
        f"MASTER_ADDR={address} if rank 0 is here, and GLOO_SOCKET_IFNAME={interface} (NCCL_SOCKET_IFNAME too), "
        "or mend the name in /etc/hosts or DNS"
    )
    try:
        found = sorted({str(one[4][0]).partition("%")[0] for one in socket.getaddrinfo(name, None)})
    except OSError as error:
        return Check("host name", "warn", f"{name} does not resolve ({error.strerror})", advice)
    own = {address for one in interfaces for address in one.addresses}
    described, facts = f"{name} is {', '.join(found)}", {"host_addresses": found}
    away = [one for one in found if not ipaddress.ip_address(one).is_loopback]
    if not away:
        return Check("host name", "warn", f"{described}: the loopback alone", advice, facts)
    if not own & set(away):
        return Check("host name", "warn", f"{described}: no address of this machine", advice, facts)
    return Check("host name", "ok", described, facts=facts)


def scheduler() -> Check:
    """SLURM's commands, its version, and whether its controller answers."""
    here = [name for name in SLURM_COMMANDS if shutil.which(name)]
    if not here:
        return Check("slurm", "skipped", "no SLURM: none of its commands is on the PATH")
    missing = [name for name in SLURM_COMMANDS if name not in here]
    if missing:
        advice = "install the whole of SLURM's client commands, or put them on the PATH"
        return Check("slurm", "warn", f"{', '.join(here)}, but no {', '.join(missing)}", advice)
    version, told = _output("sinfo", "--version"), _output("scontrol", "ping")
    facts = {"slurm": {"version": version if version.startswith("slurm") else None, "controller": told}}
    # Each controller has a line; a backup that is down does no harm.
    if " UP" not in told:
        advice = "start slurmctld and munged, or set SLURM_CONF; needless where runs do not go through SLURM"
        reason = told.split("; ")[-1] or "no word"
        return Check("slurm", "warn", f"the commands are here, no controller answers: {reason}", advice, facts)
    return Check("slurm", "ok", f"{version}; {told}", facts=facts)


def job() -> Check:
    """The SLURM job that this process belongs to, and its place in it."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return Check("slurm job", "skipped", "not inside a job")
    found = f"job {env['SLURM_JOB_ID']} on {env.get('SLURM_JOB_NUM_NODES', '?')} nodes"
    if "SLURM_STEP_NUM_TASKS" in env:
        found += f", task {env.get('SLURM_PROCID', '?')} of {env['SLURM_STEP_NUM_TASKS']}, step {env['SLURM_STEP_ID']}"
    else:
        found += ", outside its steps: no srun"
    return Check("slurm job", "ok", found, facts={"slurm_job": {key: env.get(key) for key in SLURM_VARIABLES}})


def this_host() -> str:
    """This machine's name; inside a SLURM job the node's, which may differ."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def output_of(*command: str) -> tuple[int, str]:
    """The exit code and all output of a command, in one line; 127 where there is none and 124 after a time-out."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=COMMAND_S
        )
    except OSError as error:
        return 127, f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return 124, f"`{' '.join(command)}` gave no answer in {COMMAND_S:g} s"
    return done.returncode, "; ".join(done.stdout.decode(errors="replace").split("\n")).strip("; ")


def some(things: Sequence[object]) -> str:
    """The first of a list in words, and how many more there are."""
    rest = len(things) - MOST_NAMED
    return ", ".join(map(str, things[:MOST_NAMED])) + (f" and {rest} more" if rest > 0 else "")


def merged(checks: Sequence[Check]) -> dict[str, Any]:
    """The facts of all checks as one tree."""
    whole: dict[str, Any] = {}
    for check in checks:
        for key, value in check.facts.items():
            before = whole.get(key)
            whole[key] = {**before, **value} if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return whole


def _output(*command: str) -> str:
    return output_of(*command)[1]


def _interface_of_gloo() -> str:
    """What runtime would choose; for one machine the loopback."""
    address = os.environ.get("MASTER_ADDR")
    if not address:
        return "the one that leads to MASTER_ADDR"
    return distributed.interface_to(address) or f"none that leads to MASTER_ADDR {address}"


def _rooms_of_groups() -> Iterator[int]:
    """What each control group above this process still allows, in bytes: files that it has cached can go."""
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
