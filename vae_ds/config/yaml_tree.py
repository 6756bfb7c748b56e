"""Recipes as plain trees: strict, safe YAML and dotted overrides."""

import re
from collections.abc import Iterable
from typing import Any

import yaml

from vae_ds.errors import ConfigError

# A recipe states exactly one setting of each group. An override of one setting removes the others.
EXCLUSIVE = ({"epochs", "steps"}, {"over_epochs", "over_steps", "over_fraction"})


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `5e-5` as a number, as YAML 1.2 does, and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key `{key}`", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML safely. Raises ConfigError with the line number, unless `source` is an option."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark and not source.startswith("--") else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None


def override(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b.0.c=value` overrides to a parsed recipe and return a new tree. Values are YAML."""
    result = _unshared(tree)
    pairs = [split_override(text) for text in overrides]
    keys = {key for key, _ in pairs}
    for key, value in pairs:
        node: Any = result
        *parents, last = key.split(".")
        for depth, name in enumerate(parents):
            if isinstance(node, dict) and node.get(name) is None:
                node[name] = {}
            node = _child(node, name, ".".join(parents[: depth + 1]))
        if isinstance(node, list):
            node[_position(node, last, key)] = value
            continue
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}: `{'.'.join(parents)}` has no keys; found {node!r}")
        node[last] = value
        for group in EXCLUSIVE:
            for rival in (group - {last}) if last in group else ():
                if ".".join([*parents, rival]) not in keys:
                    node.pop(rival, None)
    return result


def _unshared(tree: Any) -> Any:
    """A deep copy in which YAML aliases are separate nodes, so that an override changes only one of them."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree


def split_override(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set {text}: write KEY=VALUE, for example --set batch.global=64")
    return key.strip(), parse_yaml(value, f"--set {text}")


def _child(node: Any, name: str, path: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, name, path)]
    if isinstance(node, dict):
        return node[name]
    raise ConfigError(f"--set {path}: no such key; `vae-ds recipes keys` lists all keys")


def _position(items: list[Any], name: str, path: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise ConfigError(f"--set {path}: a list of {len(items)}, so use an index from 0 to {len(items) - 1}")
    return int(name)
