"""`vae-ds recipes`."""

import argparse
from typing import Any

from vae_ds.cli.options import add_command
from vae_ds.errors import ConfigError


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_command(
        subparsers,
        "recipes",
        recipes,
        "list the shipped recipes, show one, or list all settings",
        examples=["vae-ds recipes", "vae-ds recipes show demo > mine.yaml", "vae-ds recipes keys"],
    )
    parser.add_argument(
        "action",
        choices=("list", "show", "keys"),
        nargs="?",
        default="list",
        help="list the recipes, show one, or list all settings with their defaults (default: %(default)s)",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe for `show`: a shipped name or a YAML file")


def recipes(arguments: argparse.Namespace) -> None:
    from vae_ds import config as configuration

    if arguments.action == "keys":
        print("\n".join(f"| `{key}` | {default} | {text} |" for key, default, text in configuration.reference()))
        return
    if arguments.action == "show":
        if not arguments.name:
            raise ConfigError(
                "the name of the recipe is missing: vae-ds recipes show NAME; `vae-ds recipes` lists the names"
            )
        print(configuration.read_recipe(arguments.name)[0], end="")
        return
    for name in configuration.shipped_recipes():
        first = configuration.read_recipe(name)[0].splitlines()[0].removeprefix("# ")
        print(f"{name:16} {first}")
