"""Reads run directories and compares them: their settings, their metrics, and the settings in which they differ.

A setting's key is the dotted key of the recipe, with the name of a phase instead of its number: `phases.full.denoise`.
So the phase `full` of a run with a warm-up is compared with the phase `full` of a run without one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_ds import config as configuration
from vae_ds.config import RunConfig
from vae_ds.runtime import evaluations, records, run_dirs
from vae_ds.studies import metric_tables, setting_words

# Settings that change neither the optimisation nor the text.
QUIET = (
    *("name", "data.cache_dir", "batch.micro", "batch.tokens"),
    *("logging.", "checkpoint.", "timeouts.", "validation.", "evaluation."),
)
NO_LATENT = "none"
SEED = "seed"
DIGITS = 6  # of a fingerprint, where it is the name of a tokenizer or a text


@dataclass(frozen=True)
class Run:
    """A run directory. `settings` by dotted key, with the defaults; `metrics` is None if the run was not evaluated."""

    name: str
    path: Path
    config: RunConfig
    settings: dict[str, Any]
    state: str
    metrics: dict[str, Any] | None

    @property
    def is_yardstick(self) -> bool:
        """Whether the run is a plain language model, without a latent code."""
        return self.config.model.injection == NO_LATENT

    @property
    def data(self) -> dict[str, Any]:
        """The settings of the data. They are equal for runs whose nats per sentence can be compared."""
        return {key: value for key, value in self.settings.items() if key.startswith("data.")}

    @property
    def fingerprint(self) -> dict[str, str] | None:
        """What the evaluation says of its data; None if the run was not evaluated."""
        return self.metric(evaluations.FINGERPRINT)

    def metric(self, key: str) -> Any:
        """A metric of the evaluation, or None."""
        return (self.metrics or {}).get(key)


def read_runs(paths: Sequence[str | Path], split: str = "test") -> list[Run]:
    """Read the run directories among `paths`, and all runs in those paths that are directories of runs (a study's).

    A run's name is that of its folder, or its path if two folders have the same name. Raises CheckpointError for a
    path that is neither, for a broken file, and for an evaluation that does not name its data; ConfigError for a
    `config.yaml` that is not the recipe of a run.
    """
    return [_read(folder, label, split) for label, folder in metric_tables.by_label(run_dirs.runs_in(paths)).items()]


def validations(run: Run) -> dict[int, list[dict[str, Any]]]:
    """The validations of each phase, by its number from 1, in order. `step` counts from the start of the phase.

    Raises CheckpointError for a broken file.
    """
    # A validation has only its step. The last steps of the phases are in the rows of the training.
    ends: dict[str, int] = {}
    for row in records.read_rows(run.path / "metrics.jsonl"):
        ends[row["phase"]] = row["step"]
    numbers = {phase.name: number for number, phase in enumerate(run.config.phases, 1)}
    found: dict[int, list[dict[str, Any]]] = {}
    for row in records.read_rows(run.path / "evaluations.jsonl"):
        begin = 0
        for position, (phase, end) in enumerate(ends.items()):
            if row["step"] <= end or position == len(ends) - 1:
                found.setdefault(numbers[phase], []).append({**row, "step": row["step"] - begin})
                break
            begin = end
    return found


def by_data(every: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by the name of their data. Runs of a group have the same settings of the data, and the same sentences.

    The name has the corpus, the settings that differ between data sets of one corpus, and, between runs with equal
    settings, the tokenizer or the text. An unevaluated run is in the group of the evaluated ones with its settings.
    """
    by_settings: dict[str, list[Run]] = {}
    for run in every:
        by_settings.setdefault(json.dumps(run.data, sort_keys=True), []).append(run)
    firsts = [members[0].data for members in by_settings.values()]
    found: dict[str, list[Run]] = {}
    for data, members in zip(firsts, by_settings.values(), strict=True):
        corpus = data["data.corpus"]
        keys = differing([other for other in firsts if other["data.corpus"] == corpus])
        name = ", ".join(filter(None, (corpus, setting_words.label(data, keys))))
        found |= {", ".join(filter(None, (name, more))): runs for more, runs in _by_fingerprint(members).items()}
    return found


def _by_fingerprint(members: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs with equal data settings by what their evaluations say of the data, "" if that is the same for all."""
    groups: dict[str, list[Run]] = {}
    for run in members:
        if run.fingerprint is not None:
            groups.setdefault(json.dumps(run.fingerprint, sort_keys=True), []).append(run)
    if len(groups) < 2:
        return {"": list(members)}
    prints = [runs[0].fingerprint or {} for runs in groups.values()]
    differ = [part for part in evaluations.PARTS if len({one[part] for one in prints}) > 1]
    # The kept lengths follow from the tokenizer and the texts.
    parts = [part for part in differ if part != "lengths"] or differ
    names = [", ".join(f"{part} {one[part][:DIGITS]}" for part in parts) for one in prints]
    bases = [Path(runs[0].config.model.base).name for runs in groups.values()]
    if parts == ["tokenizer"] and len(set(bases)) == len(bases):
        names = [f"tokenizer of {base}" for base in bases]
    found = dict(zip(names, groups.values(), strict=True))
    for run in members:
        if run.fingerprint is None:
            # The tokenizer is that of the base.
            same = [runs for runs in found.values() if runs[0].config.model.base == run.config.model.base]
            (same or list(found.values()))[0].append(run)
    return found


def labels(every: Sequence[Run]) -> dict[str, str]:
    """A label for each run, by its name: the settings that differ, or the name if another run has the same label."""
    keys = differing([run.settings for run in every])
    words = {run.name: setting_words.label(run.settings, keys) for run in every}
    unique = {text for text in words.values() if text and list(words.values()).count(text) == 1}
    return {name: text if text in unique else name for name, text in words.items()}


def up_to_phase(run: Run, number: int) -> dict[str, Any]:
    """The settings that have an effect up to the end of a phase, counted from 1."""
    names = [phase.name for phase in run.config.phases]
    later = tuple(f"phases.{name}." for name in names[number:])
    kept = {key: value for key, value in run.settings.items() if not key.startswith(later)}
    return kept | {"phases": names[:number]}


def differing(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ between runs, in order, without the keys that change no result.

    A key that only some runs have is compared among these. If a setting has the same value in two phases of every run,
    only the first key is returned.
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
    """The runs in groups that differ only in the seed, with their common name. A group has each seed once.

    A run that repeats settings and seed of another begins a further group.
    """
    groups: dict[str, list[list[Run]]] = {}
    for run in every:
        kept = {key: value for key, value in run.settings.items() if key != SEED and not key.startswith(QUIET)}
        same = groups.setdefault(json.dumps(kept, sort_keys=True), [])
        free = [members for members in same if run.config.seed not in {other.config.seed for other in members}]
        if free:
            free[0].append(run)
        else:
            same.append([run])
    return [(_common_name(members), members) for same in groups.values() for members in same]


def _common_name(members: Sequence[Run]) -> str:
    first = members[0]
    return first.name if len(members) == 1 else first.name.replace(f"+{SEED}={first.config.seed}", "")


def by_topic(every: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of runs by the topic in which their settings differ from the most common settings, except for the seed.

    A topic is a setting, or a section of settings such as `free_bits`. "" has the runs that differ in nothing, `phases`
    those with other phases, and `several` those that differ in several topics.
    """
    keys = [key for key in differing(list(every.values())) if key != SEED]
    usual: dict[str, str] = {}
    for key in keys:
        values = [json.dumps(settings[key], sort_keys=True) for settings in every.values() if key in settings]
        usual[key] = max(values, key=values.count)
    found: dict[str, list[str]] = {"": []}
    for name, settings in every.items():
        changed = [k for k in keys if k in settings and json.dumps(settings[k], sort_keys=True) != usual[k]]
        topics = {setting_words.topic(key) for key in changed}
        topic = topics.pop() if len(topics) == 1 else "phases" if "phases" in topics else "several" if topics else ""
        found.setdefault(topic, []).append(name)
    return found


def _read(folder: Path, name: str, split: str) -> Run:
    config = configuration.load(RunConfig, str(folder / "config.yaml"))
    status = records.read_status(folder)
    metrics = None
    if (folder / f"eval-{split}.json").is_file():
        metrics = evaluations.read(folder, split)
        evaluations.fingerprint_of(folder, split, metrics)
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
