"""Finished and unfinished runs on the disk, side by side: what was set, what was measured, and in what they differ.

A setting's key is the recipe's dotted key, but a phase goes by its name: `phases.full.denoise`. So the phase `full` of
a run with a warm-up is compared with that of a run without one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_ds import config as configuration
from vae_ds.config import EXCLUSIVE, RunConfig
from vae_ds.errors import CheckpointError
from vae_ds.runtime import records
from vae_ds.studies import metric_tables

# What changes neither the optimisation nor the text.
QUIET = ("name", "data.cache_dir", "batch.micro", "logging.", "checkpoint.", "timeouts.", "validation.", "evaluation.")
NO_LATENT = "none"
SEED = "seed"
_BEFORE = {"phases": 2}  # parts of a key that say where it stands and not what it is


@dataclass(frozen=True)
class Run:
    """A run directory: `settings` by dotted key, defaults included; `metrics` is None where it was not evaluated."""

    name: str
    path: Path
    config: RunConfig
    settings: dict[str, Any]
    state: str
    metrics: dict[str, Any] | None

    @property
    def is_yardstick(self) -> bool:
        """Whether it is a plain language model, without a latent code."""
        return self.config.model.injection == NO_LATENT

    @property
    def data(self) -> dict[str, Any]:
        """The settings that decide its text: equal for runs whose nats per sentence can be compared."""
        return {key: value for key, value in self.settings.items() if key.startswith("data.")}

    def metric(self, key: str) -> Any:
        """A metric of its evaluation, or None."""
        return (self.metrics or {}).get(key)


def read_runs(paths: Sequence[str | Path], split: str = "test") -> list[Run]:
    """The run directories among `paths`, and those in each path that is a directory of runs, such as a study's.

    A run goes by its folder's name, or by its path where two names are the same.
    Raises CheckpointError for a path that is neither, or a broken file; ConfigError for what is no VAE's recipe.
    """
    folders = _folders([Path(path) for path in paths])
    return [
        _read(folder, label, split) for folder, label in zip(folders, metric_tables.labels_of(folders), strict=True)
    ]


def validations(run: Run) -> dict[int, list[dict[str, Any]]]:
    """The validations of each phase by its number from 1, in order; `step` counts from the phase's beginning.

    Raises CheckpointError for a broken file.
    """
    # A validation tells its step alone; the phases' ends are in the rows of the training.
    ends: dict[str, int] = {}
    for row in _rows(run.path / "metrics.jsonl"):
        ends[row["phase"]] = row["step"]
    numbers = {phase.name: number for number, phase in enumerate(run.config.phases, 1)}
    found: dict[int, list[dict[str, Any]]] = {}
    for row in _rows(run.path / "evaluations.jsonl"):
        begin = 0
        for position, (phase, end) in enumerate(ends.items()):
            if row["step"] <= end or position == len(ends) - 1:
                found.setdefault(numbers[phase], []).append({**row, "step": row["step"] - begin})
                break
            begin = end
    return found


def by_data(every: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by a name of their data: the corpus, and what differs between data sets of one corpus."""
    groups: dict[str, list[Run]] = {}
    for run in every:
        groups.setdefault(json.dumps(run.data, sort_keys=True), []).append(run)
    firsts = [members[0].data for members in groups.values()]
    found = {}
    for data, members in zip(firsts, groups.values(), strict=True):
        corpus = data["data.corpus"]
        keys = differing([other for other in firsts if other["data.corpus"] == corpus])
        found[", ".join(filter(None, (corpus, label(data, keys))))] = members
    return found


def labels(every: Sequence[Run]) -> dict[str, str]:
    """A label by a run's name: the settings that differ, or its name where these do not tell it from another."""
    keys = differing([run.settings for run in every])
    told = {run.name: label(run.settings, keys) for run in every}
    unique = {text for text in told.values() if text and list(told.values()).count(text) == 1}
    return {name: text if text in unique else name for name, text in told.items()}


def up_to_phase(run: Run, number: int) -> dict[str, Any]:
    """The settings that decide the run up to the end of a phase, counted from 1."""
    names = [phase.name for phase in run.config.phases]
    later = tuple(f"phases.{name}." for name in names[number:])
    kept = {key: value for key, value in run.settings.items() if not key.startswith(later)}
    return kept | {"phases": names[:number]}


def differing(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ between settings, in order, without those that change no result.

    A key that only some have is compared among these. One that says the same of two phases in all is named once.
    """
    kept: list[str] = []
    for key in dict.fromkeys(key for settings in every for key in settings):
        values = [settings[key] for settings in every if key in settings]
        if key.startswith(QUIET) or all(value == values[0] for value in values):
            continue
        if not any(_same_of_a_phase(key, other, every) for other in kept):
            kept.append(key)
    return kept


def by_seed(every: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """The runs that were repeated with other seeds, with their common name; those that stand alone are left out."""
    groups: dict[str, list[Run]] = {}
    for run in every:
        told = {key: value for key, value in run.settings.items() if key != SEED and not key.startswith(QUIET)}
        groups.setdefault(json.dumps(told, sort_keys=True), []).append(run)
    several = [members for members in groups.values() if len({run.config.seed for run in members}) > 1]
    return [(members[0].name.replace(f"+{SEED}={members[0].config.seed}", ""), members) for members in several]


def by_topic(every: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of runs by the one thing in which their settings differ from the most common ones, the seed apart.

    A topic is a setting, or a section of settings of a phase. "" has the runs that differ in nothing, `phases` those
    with other phases, and `several` what is left.
    """
    keys = [key for key in differing(list(every.values())) if key != SEED]
    usual: dict[str, str] = {}
    for key in keys:
        values = [json.dumps(settings[key], sort_keys=True) for settings in every.values() if key in settings]
        usual[key] = max(values, key=values.count)
    found: dict[str, list[str]] = {"": []}
    for name, settings in every.items():
        changed = [k for k in keys if k in settings and json.dumps(settings[k], sort_keys=True) != usual[k]]
        topics = {_topic(key) for key in changed}
        topic = topics.pop() if len(topics) == 1 else "phases" if "phases" in topics else "several" if topics else ""
        found.setdefault(topic, []).append(name)
    return found


def _topic(key: str) -> str:
    """`phases.full.free_bits.nats` is about free_bits, `model.pool_layers` about pooling."""
    parts = key.split(".")
    topic = parts[min(len(parts) - 1, 2 if parts[0] == "phases" else 1)]
    return "pooling" if topic == "pool_layers" else topic


def label(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """What `settings` has for `keys`, as `denoise=0.15, pooling=mean`; empty if it has none."""
    told = []
    for key in keys:
        # Of several settings one is stated and the others are null, which says nothing.
        idle = settings.get(key) is None and any(key.rpartition(".")[2] in group for group in EXCLUSIVE)
        if key in settings and not idle:
            told.append(f"{short(key, keys)}={shown(settings[key])}")
    return ", ".join(told)


def short(key: str, keys: Sequence[str]) -> str:
    """A dotted key without its section or phase, unless another of `keys` would be called the same."""
    parts = key.split(".")
    for start in range(min(_BEFORE.get(parts[0], 1), len(parts) - 1), 0, -1):
        tail = ".".join(parts[start:])
        if not any(other != key and f".{other}".endswith(f".{tail}") for other in keys):
            return tail
    return key


def shown(value: Any) -> str:
    """A setting's value in a label."""
    if isinstance(value, list):
        return "+".join(shown(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _folders(paths: Sequence[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for path in paths:
        inside = [path] if (path / "config.yaml").is_file() else sorted(p.parent for p in path.glob("*/config.yaml"))
        if not inside:
            raise CheckpointError(f"{path}: neither a run directory (config.yaml) nor a directory of runs")
        for folder in inside:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _read(folder: Path, name: str, split: str) -> Run:
    config = configuration.load(RunConfig, str(folder / "config.yaml"))
    status = records.read_status(folder)
    metrics = None
    if (folder / f"eval-{split}.json").is_file():
        (metrics,) = metric_tables.read_evaluations([folder], split).values()
    state = records.of_the_living(status)["state"] if status else "unknown"
    return Run(name, folder, config, _settings(config), state, metrics)


def _settings(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json", by_alias=True)
    phases = tree.pop("phases")
    found = _flat(tree, "") | {"phases": [phase["name"] for phase in phases]}
    for phase in phases:
        found |= _flat({key: value for key, value in phase.items() if key != "name"}, f"phases.{phase['name']}.")
    return {key: value for key, value in found.items() if key != "data.cache_dir"}


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _same_of_a_phase(key: str, other: str, every: Sequence[Mapping[str, Any]]) -> bool:
    one, two = key.split("."), other.split(".")
    if one[0] != "phases" or two[0] != "phases" or one[2:] != two[2:]:
        return False
    return all(settings.get(key) == settings.get(other) for settings in every)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none where there is no file. A last one that is still being written is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise CheckpointError(f"{path}: a row is not JSON: {error}") from None
