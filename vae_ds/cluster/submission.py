"""Training as a SLURM job: write, show and submit the batch file for a recipe and a site."""

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
from vae_ds.data import limits_of
from vae_ds.errors import ConfigError

# SLURM's formats: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, and so on.
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
SAVE_WITHIN_S = 180


@dataclass(frozen=True)
class Wanted:
    """The resources that a job requests: nodes, GPUs and ranks per node (default: one per GPU), and a time limit."""

    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int | None = None
    time: str | None = None

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1


@dataclass(frozen=True)
class Submitted:
    """A job in the queue: its number, its log, and the log of rank 0."""

    job: str
    log: Path
    rank_log: Path


def site(path: str | None) -> SiteConfig:
    """Load the settings of the site from `path`, otherwise $VAE_DS_SITE, otherwise ~/.config/vae_ds/site.yaml.

    Without any of these files, the settings have their default values.
    """
    chosen = path or os.environ.get("VAE_DS_SITE")
    default = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "vae_ds" / "site.yaml"
    if chosen is None and not default.is_file():
        return SiteConfig()
    found = configuration.load(SiteConfig, chosen or str(default))
    _check_image(found.container, chosen or str(default))
    return found


def launchers_dir() -> Path:
    """The directory of the SLURM launchers. Raises ConfigError if the package was installed without them."""
    folder = Path(__file__).resolve().parents[2] / "launchers" / "slurm"
    if not (folder / "train.sbatch").is_file():
        raise ConfigError(f"{folder}: no launchers here; run vae-ds from a checkout (pip install -e .)")
    return folder


def batch_file(
    config: RunConfig,
    train: Sequence[str],
    run_dir: Path,
    resources: Wanted,
    site_config: SiteConfig,
    extra: Sequence[str] = (),
) -> str:
    """The text of the batch file: the options of sbatch, the environment of the site, and the call of train.sbatch.

    `train` are the arguments of `vae-ds train` that produced `config`; `extra` are additional options of sbatch. Raises
    ConfigError if the global batch has fewer sentences than the job has ranks, or if a batch file cannot contain an
    option.
    """
    limits_of(config.batch, resources.nodes * resources.ranks_per_node, config.data.max_tokens)
    return _text("train.sbatch", train, _options(config.name, run_dir, resources, site_config, extra), site_config)


def array_file(
    name: str,
    study: Sequence[str],
    numbers: Sequence[int],
    root: Path,
    resources: Wanted,
    site_config: SiteConfig,
    parallel: int,
    extra: Sequence[str] = (),
) -> str:
    """The text of the batch file for runs of a study, as a job array of which `parallel` tasks run at a time.

    `study` are the arguments of `vae-ds study`, and `numbers` are those of the runs. The runs and the logs are below
    `root`.
    """
    array = f"--array={','.join(map(str, numbers))}%{parallel}"
    options = _options(name, root, resources, site_config, [array, *extra], log="slurm-%A_%a.log")
    return _text("sweep.sbatch", study, options, site_config)


def _text(script: str, arguments: Sequence[str], options: Sequence[str], site_config: SiteConfig) -> str:
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in options), "set -euo pipefail"]
    call = f"exec bash {shlex.quote(str(launchers_dir() / script))} {shlex.join(arguments)}"
    return "\n".join([*lines, *_environment(site_config), call]) + "\n"


def submit(text: str, run_dir: Path, name: str = "submit.sbatch", after: str | None = None) -> Submitted:
    """Write RUN/`name` and submit it with sbatch. The job starts after the job `after` has ended in any state.

    Raises ConfigError with the message of sbatch if it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("no sbatch here; run this on a login node, or print the batch file with --dry-run")
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    file = run_dir / name
    file.write_text(text, encoding="utf-8")
    dependency = [] if after is None else [f"--dependency=afterany:{after}"]
    done = subprocess.run(["sbatch", "--parsable", *dependency, str(file)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ConfigError(f"sbatch refused {file}: {done.stderr.strip()}")
    job = done.stdout.split(";")[0].strip()
    log = run_dir / "logs" / f"slurm-{job}.log"
    return Submitted(job, log, log.with_suffix("") / "rank-0.log")


def _options(
    name: str,
    run_dir: Path,
    resources: Wanted,
    site_config: SiteConfig,
    extra: Sequence[str],
    log: str = "slurm-%j.log",
) -> list[str]:
    if resources.time is not None and not TIME.fullmatch(resources.time):
        raise ConfigError(f"--time {resources.time}: use SLURM's format, such as 24:00:00 or 2-00:00:00")
    options = [f"--job-name={re.sub('[^!-~]+', '-', name)}", f"--nodes={resources.nodes}"]
    options.append(f"--ntasks-per-node={resources.ranks_per_node}")
    if resources.gpus_per_node:
        options.append(f"--gpus-per-node={resources.gpus_per_node}")
    if resources.time is not None:
        options.append(f"--time={resources.time}")
    named = {"partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint"}
    named |= {"reservation": "reservation", "mem": "memory", "cpus-per-task": "cpus_per_task"}
    options += [f"--{word}={value}" for word, key in named.items() if (value := getattr(site_config, key)) is not None]
    options += ["--requeue", "--open-mode=append", f"--signal=USR1@{SAVE_WITHIN_S}"]
    options += [f"--output={run_dir.absolute() / 'logs' / log}", *site_config.options, *extra]
    for option in options:
        if not option.startswith("--") or re.search(r"[^!-~]", option):
            raise ConfigError(f"a batch file cannot contain {option!r}; write --option=value, without spaces")
    return options


def _check_image(container: str | None, source: str) -> None:
    """Raise ConfigError if an Apptainer image is not there. An image without a file is found by pyxis."""
    if container is None or not container.endswith(".sif"):
        return
    if not Path(container).is_absolute():
        raise ConfigError(f"{source}: container: write an absolute path, not {container!r}")
    if not Path(container).is_file():
        raise ConfigError(f"{source}: container: no such image file {container}; see launchers/README.md")


def _environment(site_config: SiteConfig) -> list[str]:
    variables = dict(site_config.environment)
    if site_config.interface is not None:
        variables |= {"NCCL_SOCKET_IFNAME": site_config.interface, "GLOO_SOCKET_IFNAME": site_config.interface}
    chosen = {
        "VAE_DS_CONTAINER": site_config.container,
        "VAE_DS_CONTAINER_MOUNTS": ",".join(site_config.container_mounts) or None,
    }
    chosen["VAE_DS_PYTHON"] = site_config.python
    variables |= {name: value for name, value in chosen.items() if value is not None}
    lines = [f"module load {shlex.join(site_config.modules)}"] if site_config.modules else []
    return lines + [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
