"""A training as a SLURM job: the batch file that fits the recipe and the site, written, shown or submitted."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vae_ds import config as configuration
from vae_ds.config import RunConfig, SiteConfig
from vae_ds.data import micro_batch
from vae_ds.errors import ConfigError

# As in SLURM: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on.
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
SAVE_WITHIN_S = 180


@dataclass(frozen=True)
class Wanted:
    """What a job asks for: nodes, GPUs and ranks on each (by default one a GPU), and SLURM's time limit."""

    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int | None = None
    time: str | None = None

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1


@dataclass(frozen=True)
class Submitted:
    """A job in the queue: its number, its log, and rank 0's."""

    job: str
    log: Path
    rank_log: Path


def site(path: str | None) -> SiteConfig:
    """The site's settings: `path`, else $VAE_DS_SITE, else ~/.config/vae_ds/site.yaml if there is one."""
    chosen = path or os.environ.get("VAE_DS_SITE")
    default = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "vae_ds" / "site.yaml"
    if chosen is None and not default.is_file():
        return SiteConfig()
    return configuration.load(SiteConfig, chosen or str(default))


def launchers_dir() -> Path:
    """The SLURM launchers of this checkout. Raises ConfigError where the package was installed without them."""
    folder = Path(__file__).resolve().parents[2] / "launchers" / "slurm"
    if not (folder / "train.sbatch").is_file():
        raise ConfigError(f"{folder}: no launchers here; run vae-ds from a checkout (pip install -e .)")
    return folder


def batch_file(
    config: RunConfig,
    train: Sequence[str],
    run_dir: Path,
    wanted: Wanted,
    place: SiteConfig,
    extra: Sequence[str] = (),
) -> str:
    """The text of the batch file: sbatch's options, the site's environment, and train.sbatch.

    `train` are the arguments of `vae-ds train` that gave `config`, `extra` further options of sbatch. Raises
    ConfigError if the global batch does not divide over the ranks, or an option cannot stand in a batch file.
    """
    micro_batch(config.batch.global_size, wanted.nodes * wanted.ranks_per_node, config.batch.micro)
    return _text("train.sbatch", train, _options(config.name, run_dir, wanted, place, extra), place)


def array_file(
    name: str,
    study: Sequence[str],
    numbers: Sequence[int],
    root: Path,
    wanted: Wanted,
    place: SiteConfig,
    parallel: int,
    extra: Sequence[str] = (),
) -> str:
    """The same for runs of a study, by number, as a job array of which `parallel` run at a time.

    `study` are the arguments of `vae-ds study`; the runs go below `root`, which has the logs too.
    """
    array = f"--array={','.join(map(str, numbers))}%{parallel}"
    options = _options(name, root, wanted, place, [array, *extra], log="slurm-%A_%a.log")
    return _text("sweep.sbatch", study, options, place)


def _text(script: str, arguments: Sequence[str], options: Sequence[str], place: SiteConfig) -> str:
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in options), "set -euo pipefail"]
    call = f"exec bash {shlex.quote(str(launchers_dir() / script))} {shlex.join(arguments)}"
    return "\n".join([*lines, *_environment(place), call]) + "\n"


def submit(text: str, run_dir: Path, name: str = "submit.sbatch", after: str | None = None) -> Submitted:
    """Write RUN/`name` and hand it to sbatch, to start when the job `after` has ended, however it did.

    Raises ConfigError with SLURM's own words if it refuses.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("no sbatch here; run this on a login node, or look at the file with --dry-run")
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    file = run_dir / name
    file.write_text(text, encoding="utf-8")
    order = [] if after is None else [f"--dependency=afterany:{after}"]
    done = subprocess.run(["sbatch", "--parsable", *order, str(file)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ConfigError(f"sbatch refused {file}: {done.stderr.strip()}")
    job = done.stdout.split(";")[0].strip()
    log = run_dir / "logs" / f"slurm-{job}.log"
    return Submitted(job, log, log.with_suffix("") / "rank-0.log")


def _options(
    name: str, run_dir: Path, wanted: Wanted, place: SiteConfig, extra: Sequence[str], log: str = "slurm-%j.log"
) -> list[str]:
    if wanted.time is not None and not TIME.fullmatch(wanted.time):
        raise ConfigError(f"--time {wanted.time}: use SLURM's form, such as 24:00:00 or 2-00:00:00")
    options = [f"--job-name={re.sub('[^!-~]+', '-', name)}", f"--nodes={wanted.nodes}"]
    options.append(f"--ntasks-per-node={wanted.ranks_per_node}")
    if wanted.gpus_per_node:
        options.append(f"--gpus-per-node={wanted.gpus_per_node}")
    if wanted.time is not None:
        options.append(f"--time={wanted.time}")
    named = {"partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint"}
    named |= {"reservation": "reservation", "mem": "memory", "cpus-per-task": "cpus_per_task"}
    options += [f"--{word}={value}" for word, key in named.items() if (value := getattr(place, key)) is not None]
    options += ["--requeue", "--open-mode=append", f"--signal=USR1@{SAVE_WITHIN_S}"]
    options += [f"--output={run_dir.absolute() / 'logs' / log}", *place.options, *extra]
    for option in options:
        if not option.startswith("--") or re.search(r"[^!-~]", option):
            raise ConfigError(f"{option!r} cannot stand in a batch file; write --option=value, without spaces")
    return options


def _environment(place: SiteConfig) -> list[str]:
    variables = dict(place.environment)
    if place.interface is not None:
        variables |= {"NCCL_SOCKET_IFNAME": place.interface, "GLOO_SOCKET_IFNAME": place.interface}
    chosen = {"VAE_DS_CONTAINER": place.container, "VAE_DS_CONTAINER_MOUNTS": ",".join(place.container_mounts) or None}
    chosen["VAE_DS_PYTHON"] = place.python
    variables |= {name: value for name, value in chosen.items() if value is not None}
    lines = [f"module load {shlex.join(place.modules)}"] if place.modules else []
    return lines + [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
