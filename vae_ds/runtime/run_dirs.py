"""The directories that a command names: runs, exported models, directories of runs. Looks only at file names."""

import errno
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from vae_ds.errors import CheckpointError, ConfigError

SHIPPED = "tiny-vae"  # the name of the trained VAE that is part of the package
_SHIPPED_DIR = Path(__file__).resolve().parents[1] / "tiny_vae"


def shipped(name: str | Path) -> Path | None:
    """The directory of the trained VAE that ships with the package, for its name `tiny-vae`; None for all other names.

    A file or directory of this name comes first: then the result is None, with a warning. A `Path` is always a path.
    Raises CheckpointError if the installation lacks the model.
    """
    if name != SHIPPED:
        return None
    if Path(name).exists():
        warnings.warn(
            f"{SHIPPED}: this is the directory of this name, not the model that ships with vae_ds; rename the directory"
            " to get the other one",
            stacklevel=3,
        )
        return None
    if not (_SHIPPED_DIR / "config.json").is_file():
        raise CheckpointError(f"{SHIPPED}: missing in this installation; reinstall vae_ds")
    return _SHIPPED_DIR


def check_not_shipped(run: Path) -> None:
    """Raise ConfigError if `run` is the shipped model, which a command must not change."""
    if run.resolve() == _SHIPPED_DIR:
        raise ConfigError(
            f"{SHIPPED} is part of the installation, and nothing is written there; copy it first: `vae-ds export "
            f"{SHIPPED} --to DIR`"
        )


def is_run(path: Path) -> bool:
    """Whether a directory is a run directory."""
    return (path / "config.yaml").is_file()


def model_of(run: Path) -> Path:
    """The directory of the model of a run directory or of an exported model. Raises CheckpointError if there is none.

    It looks only at the names of files, so a command can check its RUN before it loads torch.
    """
    if is_run(run):
        if not (run / "model" / "config.json").is_file():
            raise CheckpointError(f"{run}: no model/ yet; `vae-ds status {run}` shows the progress of the run")
        return run / "model"
    if (run / "config.json").is_file():
        return run
    raise CheckpointError(_neither(run, "a run directory (config.yaml) nor an exported model (config.json)"))


def runs_in(paths: Iterable[str | Path]) -> list[Path]:
    """The run directories among `paths`, and all runs directly in those paths that are directories of runs.

    A run that is named twice is returned once. Raises CheckpointError for a path that is neither.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        inside = [path] if is_run(path) else sorted(file.parent for file in path.glob("*/config.yaml"))
        if not inside:
            raise CheckpointError(_neither(path, "a run directory (config.yaml) nor a directory of runs"))
        for folder in inside:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def evaluated_in(paths: Sequence[str | Path], split: str) -> tuple[list[Path], list[Path]]:
    """The evaluated runs or models among `paths` and in directories of runs, and the unevaluated runs in these.

    Raises CheckpointError for a path that does not exist, that is neither, or that has no evaluation of `split`.
    """
    name = f"eval-{split}.json"
    evaluated: dict[Path, Path] = {}
    missing: list[Path] = []
    for path in map(Path, paths):
        if is_run(path) or (path / "config.json").is_file() or (path / name).is_file():
            if not (path / name).is_file():
                raise CheckpointError(
                    f"{path / name}: no such file; write it with `vae-ds evaluate {path} --split {split}`"
                )
            evaluated.setdefault(path.resolve(), path)
            continue
        inside = runs_in([path])
        missing += [run for run in inside if not (run / name).is_file()]
        evaluated |= {run.resolve(): run for run in inside if (run / name).is_file()}
    if not evaluated:
        where = ", ".join(map(str, paths))
        raise CheckpointError(
            f"{where}: none of the {len(missing)} runs was evaluated on the {split} split; `vae-ds evaluate RUN --split"
            f" {split}` evaluates one"
        )
    return list(evaluated.values()), missing


def check_writable(folder: Path, option: str = "--run-dir") -> None:
    """Check that files can be made in `folder`, or that it can be made. Leaves nothing behind.

    Raises ConfigError with the reason. A full disk passes: it is a fault of the machine, not of the argument.
    """
    nearest = folder
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"{option} {folder}: {nearest} is a file; choose another directory")
    try:
        # A real attempt: the permissions alone do not say whether a file system is writable.
        tempfile.TemporaryDirectory(dir=nearest, prefix=".vae_ds-").cleanup()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(f"{option} {folder}: cannot be written ({nearest}: {error.strerror})") from None


def _neither(path: Path, what: str) -> str:
    return f"{path}: neither {what}" if path.exists() else f"{path}: no such directory"
