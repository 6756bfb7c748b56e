"""`vae-ds recipes`."""

import argparse
import json
from typing import Any

from vae_ds.cli.options import add_command, add_json
from vae_ds.errors import ConfigError


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_command(
        subparsers,
        "recipes",
        recipes,
        "list the shipped recipes, show one, or list all settings",
        examples=[
            "vae-ds recipes",
            "vae-ds recipes show demo > mine.yaml",
            "vae-ds recipes keys",
            "vae-ds recipes --json",
        ],
    )
    parser.add_argument(
        "action",
        choices=("list", "show", "keys"),
        nargs="?",
        default="list",
        help="list the recipes, show one, or list all settings with their defaults (default: %(default)s)",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe for `show`: a shipped name or a YAML file")
    add_json(parser, "`list` and `keys` as one JSON list, and the recipe of `show` as one JSON object")


def recipes(arguments: argparse.Namespace) -> None:
    from vae_ds import config as configuration

    if arguments.action == "keys":
        rows = configuration.reference()
        if arguments.json:
            print(json.dumps([{"key": key, "default": default, "description": text} for key, default, text in rows]))
        else:
            print("\n".join(f"| `{key}` | {default} | {text} |" for key, default, text in rows))
        return
    if arguments.action == "show":
        if not arguments.name:
            raise ConfigError(
                "the name of the recipe is missing: vae-ds recipes show NAME; `vae-ds recipes` lists the names"
            )
        text, source = configuration.read_recipe(arguments.name)
        print(f"{json.dumps(configuration.parse_yaml(text, source))}\n" if arguments.json else text, end="")
        return
    firsts = {
        name: configuration.read_recipe(name)[0].splitlines()[0].removeprefix("# ")
        for name in configuration.shipped_recipes()
    }
    if arguments.json:
        print(json.dumps([{"name": name, "summary": first} for name, first in firsts.items()]))
        return
    for name, first in firsts.items():
        print(f"{name:16} {first}")
