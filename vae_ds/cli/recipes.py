"""`vae-ds recipes` and `plan`."""

import argparse
import json
import shlex
from typing import Any

from vae_ds.cli.options import (
    above_zero,
    add_command,
    add_json,
    add_overrides,
    add_set,
    overrides_of,
    positive,
    recipe_of,
)
from vae_ds.errors import ConfigError


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_command(
        subparsers,
        "recipes",
        recipes,
        "list the shipped recipes, show one, list all settings, or write a new recipe",
        "`new` looks at a base and at a sample of your text, and prints a recipe in which a comment gives the reason"
        " for each number. The structure of that recipe was measured with the tiny T5. Its learning rate for a"
        " larger base follows a rule that was tried with three small bases, without a comparison of rates.",
        examples=[
            "vae-ds recipes",
            "vae-ds recipes show demo > mine.yaml",
            "vae-ds recipes keys",
            "vae-ds recipes --json",
            "vae-ds recipes new --base google-t5/t5-base --data my-corpus > mine.yaml",
        ],
    )
    parser.add_argument(
        "action",
        choices=("list", "show", "keys", "new"),
        nargs="?",
        default="list",
        help="list the recipes, show one, list all settings with their defaults, or write a new recipe"
        " (default: %(default)s)",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe for `show`: a shipped name or a YAML file")
    add_json(parser, "`list` and `keys` as one JSON list, and the recipe of `show` and `new` as one JSON object")
    _add_new(parser)
    _add_plan(subparsers)


def _add_plan(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "plan",
        plan,
        "estimate the memory and the time of a recipe on some GPUs",
        "Prints the memory of each ds_config, the largest micro batch that fits beside it, and which one to take."
        " Nothing is trained: activations and operations are counted on tensors without numbers. The text is prepared"
        " as for a training. Neither the memory on a GPU nor the time was compared with a GPU yet.",
        examples=[
            "vae-ds plan recommended --gpus 8 --gpu-memory 80 --set model.base=google-t5/t5-large",
            "vae-ds plan mine.yaml --tflops 150",
        ],
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    add_overrides(parser)
    parser.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="GPUs of the training (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu-memory",
        type=above_zero,
        default=80.0,
        metavar="GB",
        help="memory of each GPU, in 10^9 bytes (default: %(default)g)",
    )
    parser.add_argument(
        "--tflops",
        type=above_zero,
        metavar="N",
        help="10^12 floating-point operations a second that one GPU reaches in training, for an estimate of the time"
        " (default: no estimate)",
    )
    add_json(parser)


def plan(arguments: argparse.Namespace) -> None:
    from vae_ds import config as configuration

    config = configuration.load(configuration.RunConfig, recipe_of(arguments), overrides_of(arguments))
    from vae_ds import authoring

    found = authoring.plan(configuration.absolute(config), arguments.gpus, arguments.gpu_memory, arguments.tflops)
    print(json.dumps(found.as_dict()) if arguments.json else authoring.text(found))


def _add_new(parser: argparse.ArgumentParser) -> None:
    """Add the options of `new`. Their default is None, so that they are noticed with another action."""
    group = parser.add_argument_group("options of `new`")
    group.add_argument("--base", metavar="BASE", help="the pretrained T5: a hub name, a directory, or tiny")
    group.add_argument(
        "--data",
        metavar="SOURCE",
        help="a directory with train.txt, valid.txt and test.txt; a text file, from which valid and test are drawn; a"
        " built-in corpus such as docstrings; or, with --column, a data set of the Hugging Face hub",
    )
    group.add_argument("--column", metavar="NAME", help="the column with the text (default: text)")
    group.add_argument(
        "--streaming",
        action="store_true",
        default=None,
        help="read the training file during the training; its length is then estimated from a sample. Without it,"
        " all of the text is read once, into the cache",
    )
    group.add_argument(
        "--percentile",
        type=_percentile,
        metavar="P",
        help="keep P %% of the training sentences whole: sets data.max_tokens (default: 99)",
    )
    group.add_argument("--latent-dim", type=positive, metavar="N", help="latent units (default: as in `recommended`)")
    group.add_argument(
        "--kl-nats",
        type=above_zero,
        metavar="NATS",
        help="floor for the mean KL of a batch from N(0, I), in nats (default: as in `recommended`)",
    )
    group.add_argument(
        "--epochs", type=above_zero, metavar="N", help="epochs (default: 1 to 10, for at least 2,600 steps)"
    )
    group.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="sentences per step (default: 32 to 512, for at most 100,000 steps)",
    )
    group.add_argument("--gpus", type=positive, metavar="N", help="GPUs of the training (default: 1)")
    group.add_argument("--gpu-memory", type=above_zero, metavar="GB", help="memory of each GPU in GB (default: 24)")
    add_set(group, "settings of the section `data`, such as data.labelled=true (default: none)")


def _percentile(text: str) -> float:
    value = above_zero(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"found {text}; expected a percentage of at most 100")
    return value


def recipes(arguments: argparse.Namespace) -> None:
    from vae_ds import config as configuration

    _check_words(arguments)
    if arguments.action == "new":
        text = _new(arguments)
        print(f"{json.dumps(configuration.parse_yaml(text, 'the new recipe'))}\n" if arguments.json else text, end="")
        return
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


# The options of `new`, as attributes of the arguments, and the names of the same in `Wishes`.
_OF_NEW = {
    "base": "base",
    "data": "data",
    "column": "column",
    "streaming": "streaming",
    "percentile": "percentile",
    "latent_dim": "latent_dim",
    "kl_nats": "kl_nats",
    "epochs": "epochs",
    "batch": "batch",
    "gpus": "gpus",
    "gpu_memory": "gpu_gb",
    "set": "settings",
}


def _check_words(arguments: argparse.Namespace) -> None:
    given = [name for name in _OF_NEW if getattr(arguments, name) is not None]
    if arguments.action != "new" and given:
        raise ConfigError(f"--{given[0].replace('_', '-')} is an option of `vae-ds recipes new`")
    if arguments.action == "new":
        if arguments.name:
            raise ConfigError(f"`recipes new` takes no name; found {arguments.name}; use --base and --data")
        for name in ("base", "data"):
            if not getattr(arguments, name):
                raise ConfigError(f"--{name} is missing: vae-ds recipes new --base BASE --data SOURCE")


def _new(arguments: argparse.Namespace) -> str:
    from vae_ds.authoring import Wishes, draft

    wishes = {key: value for name, key in _OF_NEW.items() if (value := getattr(arguments, name)) is not None}
    return draft(Wishes(**wishes), _command(arguments))


def _command(arguments: argparse.Namespace) -> str:
    """The command that was given, to repeat it."""
    words = ["vae-ds", "recipes", "new"]
    for name in _OF_NEW:
        value = getattr(arguments, name)
        if value is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [
                f"--{name.replace('_', '-')}",
                *(f"{one:g}" if isinstance(one, float) else str(one) for one in values),
            ]
    return shlex.join(words)
