"""Load recipes: one YAML file, dotted overrides, and an error with a suggestion for each unknown key.

The settings classes are in `settings`.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from vae_ds.config.data_settings import Settings
from vae_ds.config.settings import SCHEDULES, PretrainConfig, RunConfig, SiteConfig, StudyConfig
from vae_ds.config.yaml_tree import override, parse_yaml
from vae_ds.errors import ConfigError

Config = TypeVar("Config", RunConfig, PretrainConfig, StudyConfig, SiteConfig)


def reference(kind: type[Settings] = RunConfig, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every setting of a recipe as (dotted key, default as YAML, description), in the order of the classes."""
    rows: list[tuple[str, str, str]] = []
    for name, field in kind.model_fields.items():
        key = prefix + (field.alias or name)
        inner = sorted(_settings_in(field.annotation), key=lambda one: SCHEDULES.index(_schedule(one) or SCHEDULES[0]))
        if not inner:
            default = "" if field.is_required() else json.dumps(field.get_default())
            rows.append((key, (name == "schedule" and _schedule(kind)) or default, _describe(field)))
        dotted = f"{key}.N." if name == "phases" else f"{key}."
        rows += [row for one in inner for row in reference(one, dotted)]
    return rows


def _describe(field: FieldInfo) -> str:
    options = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    choice = " or ".join(f"`{option}`" for option in options if len(options) > 1)
    return ": ".join(filter(None, (field.description, choice)))


def _schedule(kind: type[Settings]) -> str | None:
    field = kind.model_fields.get("schedule")
    options = get_args(field.annotation) if field else ()
    return str(options[0]) if len(options) == 1 else None


def shipped_recipes(folder: str = "recipes") -> list[str]:
    """Sorted names of the shipped recipes, or of the shipped studies if `folder` is `studies`."""
    entries = (resources.files("vae_ds.config") / folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def read_recipe(recipe: str, folder: str = "recipes") -> tuple[str, str]:
    """The YAML text of a recipe, and its source. `recipe` is a file, or a name shipped in `folder` of the package.

    Raises ConfigError if neither exists, or if the file is not UTF-8.
    """
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"} and not path.is_file():
        raise ConfigError(f"{recipe}: no such recipe file")
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    names = shipped_recipes(folder)
    if recipe not in names:
        what = {"recipes": "recipe", "studies": "study"}[folder]
        raise ConfigError(
            f"no {what} `{recipe}`{_suggest(recipe, names)}; shipped: {', '.join(names)}; or give a YAML file"
        )
    return (resources.files("vae_ds.config") / folder / f"{recipe}.yaml").read_text(encoding="utf-8"), f"{recipe}.yaml"


def load(kind: type[Config], recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe (a file or a shipped name), apply `KEY=VALUE` overrides, and validate the result.

    Raises ConfigError with the file, the key and the value that was found.
    """
    text, source = read_recipe(recipe, "studies" if kind is StudyConfig else "recipes")
    tree = parse_yaml(text, source)
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: a recipe is a mapping of keys; found {type(tree).__name__}")
    return build(kind, override(tree, overrides), source, overrides if _is_valid(kind, tree) else ())


def build(kind: type[Config], tree: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Validate a parsed recipe against its settings class. Raises ConfigError.

    `overrides` are the KEY=VALUE items in `tree` if the recipe is valid without them: an error names the one at fault.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        # For an error inside a list, pydantic also reports the list. Keep only the innermost errors.
        inner = [one for one in errors if not any(one is not other and _within(other, one) for other in errors)]
        told: dict[str, list[str]] = {}
        for item in inner:
            who, path = _culprit(item["loc"], overrides) or source, _dotted(item["loc"])
            # An override that names the key already need not be followed by it.
            message = _explain(kind, item)
            told.setdefault(who, []).append(
                message.removeprefix(f"`{path}`: ") if who.startswith(f"--set {path}=") else message
            )
        raise ConfigError("; ".join(f"{who}: {'; '.join(what)}" for who, what in told.items())) from None


def dump(config: Settings) -> str:
    """The complete configuration as YAML, defaults included, in the order of the classes."""
    tree = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _within(inner: Any, outer: Any) -> bool:
    return len(inner["loc"]) > len(outer["loc"]) and inner["loc"][: len(outer["loc"])] == outer["loc"]


def _is_valid(kind: type[Settings], tree: dict[str, Any]) -> bool:
    try:
        kind.model_validate(tree)
    except ValidationError:
        return False
    return True


def _culprit(location: Sequence[int | str], overrides: Sequence[str]) -> str | None:
    """The overrides that an error at this location comes from, as the user wrote them. None without overrides."""
    where = _dotted(location)
    keys = [text.partition("=")[0].strip() for text in overrides]
    related = [
        text
        for key, text in zip(keys, overrides, strict=True)
        if f"{key}.".startswith(f"{where}.") or f"{where}.".startswith(f"{key}.")
    ]
    # An error of the whole recipe can come from any of them.
    return f"--set {' '.join(related or overrides)}" if overrides else None


def _dotted(location: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in location if part not in SCHEDULES)


def _explain(kind: type[Settings], item: Any) -> str:
    path = _dotted(item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key `{path}`{_suggest(str(item['loc'][-1]), _keys_at(kind, item['loc'][:-1]))}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"`{path}` is missing"
    if item["type"] == "value_error":
        return f"`{path}`: {message}" if path else message
    return f"`{path}`: {message[0].lower()}{message[1:]}; found {item['input']!r}"


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [key for key in known if key != name], n=1, cutoff=0.6)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _keys_at(kind: type[Settings], location: Iterable[int | str]) -> set[str]:
    """The valid keys at a location in the recipe. pydantic gives the location."""
    classes = {kind}
    for part in location:
        if part in SCHEDULES:
            classes = {one for one in classes if part in get_args(one.model_fields["schedule"].annotation)}
        elif isinstance(part, str):
            fields = [
                field for one in classes for name, field in one.model_fields.items() if part in (name, field.alias)
            ]
            classes = set().union(*(_settings_in(field.annotation) for field in fields))
    return {field.alias or name for one in classes for name, field in one.model_fields.items()}


def _settings_in(annotation: Any) -> set[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return {annotation}
    return set().union(*(_settings_in(part) for part in get_args(annotation)))
