"""Find the keys of a ds_config that DeepSpeed does not know: run its own parser on a dict that records all look-ups.

At the top level and in some sections, DeepSpeed silently ignores a misspelt key. The other sections are strict classes.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from vae_ds.errors import ConfigError


class Reader(dict[str, Any]):
    """A dict that records the keys that are looked up, also in its sections."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        super().__init__({key: Reader(value) if isinstance(value, dict) else value for key, value in tree.items()})
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        # A view of the keys would not record `in`.
        return self

    def __iter__(self) -> Iterator[str]:
        # Overridden so that `f(**section)` looks up each key. Python copies a dict without an own `__iter__` directly,
        # without a record. The strict class behind `f` reports unknown keys itself.
        return super().__iter__()

    def __copy__(self) -> "Reader":
        return self

    def unknown(self, prefix: str = "") -> Iterator[tuple[str, str, set[str]]]:
        """Keys that were not looked up, as (dotted key, last part, keys that were looked up in the same section)."""
        for key, value in self.items():
            # A section without any look-up is read later, or not at all.
            if self.asked and key not in self.asked:
                yield f"{prefix}{key}", key, self.asked
            elif isinstance(value, Reader):
                yield from value.unknown(f"{prefix}{key}.")


def check_known(tree: Mapping[str, Any], source: str, parser: Callable[[Any], Any], strict: type[BaseModel]) -> None:
    """Check a complete ds_config with DeepSpeed's `parser`. `strict` is the base class of its settings classes.

    Raises ConfigError for a key that DeepSpeed does not know, with the most similar known key, and for a value that
    DeepSpeed rejects.
    """
    reader = Reader(tree)
    try:
        parser(reader)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, tree, strict)}") from None
    except Exception as error:  # the parser raises many types, from AssertionError to AttributeError
        raise ConfigError(f"{source}: DeepSpeed refuses it: {error}") from None
    for dotted, key, known in reader.unknown():
        raise ConfigError(f"{source}: DeepSpeed knows no key `{dotted}`{_suggest(key, known)}")


def _explain(error: ValidationError, tree: Mapping[str, Any], strict: type[BaseModel]) -> str:
    item = error.errors()[0]
    key = str(item["loc"][-1]) if item["loc"] else error.title
    dotted = next((path for path in _paths(tree) if path.split(".")[-1] == key), key)
    if item["type"] != "extra_forbidden":
        return f"`{dotted}`: {item['msg']}; found {item['input']!r}"
    kinds = list(_classes(strict))
    near = [kind for kind in kinds if kind.__name__ == error.title and len(item["loc"]) == 1] or kinds
    names = {field.alias or name for kind in near for name, field in kind.model_fields.items()}
    return f"DeepSpeed knows no key `{dotted}`{_suggest(key, names)}"


def _classes(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for child in kind.__subclasses__():
        yield child
        yield from _classes(child)


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" (did you mean `{close[0]}`?)" if close else ""
