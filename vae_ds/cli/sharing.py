"""`vae-ds push`: publish a model on the Hugging Face hub."""

import argparse
from pathlib import Path
from typing import Any

from vae_ds.cli.options import add_command, add_run
from vae_ds.runtime import run_dirs


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_command(
        subparsers,
        "push",
        push,
        "publish a model on the Hugging Face hub",
        "Sends the exported model, its tokenizer and its card as one commit, and prints the address. It needs a token "
        "(`hf auth login`, or HF_TOKEN).",
        ["vae-ds push runs/demo someone/demo", "vae-ds push runs/demo someone/demo --private --revision trial"],
    )
    add_run(parser, "a run directory or an exported model")
    parser.add_argument("name", metavar="OWNER/NAME", help="the name of the model on the hub")
    parser.add_argument("--private", action="store_true", help="only the owner can read it (default: everybody can)")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="the branch, which is created if there is none (default: main)"
    )


def push(arguments: argparse.Namespace) -> None:
    from vae_ds.config import hub

    hub.check_name(arguments.name)
    run_dirs.model_of(Path(arguments.run))
    from vae_ds import sharing

    print(sharing.push(Path(arguments.run), arguments.name, private=arguments.private, revision=arguments.revision))
