"""Whether a run directory can continue with a configuration: what changed since, and what may change."""

import logging
import re
from pathlib import Path
from typing import Any

from vae_ds import config as configuration
from vae_ds.config import Config, RunConfig
from vae_ds.errors import ConfigError
from vae_ds.runtime import records
from vae_ds.training import checkpoint, phases

_log = logging.getLogger(__name__)

SHOWN_CHANGES = 3
# What the training of a VAE may change on resumption: how it is watched and stored, not what it computes.
FREE = (
    *("name", "logging.", "timeouts.", "checkpoint.", "validation.", "evaluation.", "profile"),
    *("deepspeed", "batch.micro", "batch.tokens", "data.cache_dir", "data.bad_lines", "data.blank_lines"),
)


def is_done(
    run_dir: Path, config: Config, free: tuple[str, ...], ends: tuple[str, ...], resume: str, tell: bool = True
) -> bool:
    """Whether the run in `run_dir` is complete for `config`; False if there is no run yet.

    Args:
        free: prefixes of the dotted keys that a resumed run may change.
        ends: the keys that say where the run ends. They may change, too, and a run that was done then continues.
        resume: `auto`, or `never` to refuse a directory that holds a run.
        tell: whether this process logs what changed in a run that continues.

    The settings of a phase may change until the first checkpoint inside it. While there is no checkpoint at all,
    everything may. Raises ConfigError, with old and new values, if something else changed, or if `resume` is `never`.
    """
    stored = run_dir / "config.yaml"
    if not stored.is_file():
        return False
    if resume == "never":
        raise ConfigError(f"{run_dir} already holds a run; choose another --run-dir, or --resume auto")
    was_done = (records.read_status(run_dir) or {}).get("state") == "done"
    phase = _checkpointed_phase(run_dir)
    if phase is None and not was_done:
        return False
    changed = _changes(configuration.load(type(config), str(stored)), config)
    fatal = {key: values for key, values in changed.items() if not _may_change(key, free, ends, phase)}
    if fatal:
        raise ConfigError(
            f"{stored}: the run was trained with other settings: {_listed(fatal)}; choose another --run-dir, or set "
            "them back"
        )
    done = was_done and not any(key in ends for key in changed)
    if changed and not done and tell:
        _log.warning("%s: the run continues with changed settings: %s", run_dir, _listed(changed))
    return done


def ends(config: RunConfig) -> tuple[str, ...]:
    """The keys that say where a run ends: the length of its last phase."""
    last = len(config.phases) - 1
    return f"phases.{last}.steps", f"phases.{last}.epochs"


def last_phase(config: RunConfig, until: str | None) -> int:
    """The index of the last phase to train now: `until`, a name or a number from 1, else the last of all."""
    names = [phase.name for phase in config.phases]
    return len(names) - 1 if until is None else phases.number_of(until, names)


def check_length(plan: phases.PhasePlan, done: int) -> None:
    """Raise ConfigError if a phase has fewer steps than are done: a run cannot be shortened."""
    if done > plan.steps:
        raise ConfigError(
            f"phases.{plan.index}: the recipe has {plan.steps} steps, but {done} are done; a run cannot be shortened; "
            "choose another --run-dir"
        )


def _checkpointed_phase(run_dir: Path) -> int | None:
    """The phase of the newest checkpoint, from 0; None if there is no checkpoint."""
    found = checkpoint.newest(run_dir, verify=False)
    return None if found is None else int(found.manifest["progress"]["state"].get("phase", 0))


def _may_change(key: str, free: tuple[str, ...], ends: tuple[str, ...], phase: int | None) -> bool:
    match = re.match(r"phases\.(\d+)\b", key)
    is_to_come = match is not None and phase is not None and int(match[1]) > phase
    return is_to_come or key.startswith(free) or key in ends


def _changes(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """The old and new values of the leaves that differ, by dotted key; None where a tree has no such leaf."""
    old, new = (_leaves(config.model_dump(mode="json", by_alias=True)) for config in (before, after))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = {str(index): item for index, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{path}.{key}" if path else key)
    return found


def _listed(changes: dict[str, tuple[Any, Any]]) -> str:
    shown = [f"{key} was {old!r}, now {new!r}" for key, (old, new) in list(changes.items())[:SHOWN_CHANGES]]
    if len(changes) > SHOWN_CHANGES:
        shown.append(f"and {len(changes) - SHOWN_CHANGES} more")
    return "; ".join(shown)
