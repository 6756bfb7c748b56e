"""`vae-ds bench`: measurements of the package itself."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vae_ds.cli.options import add_command, add_overrides, overrides_of, positive


def add(subparsers: Any) -> None:
    """Add the commands of this family."""
    benches = subparsers.add_parser("bench", help="measure; see `vae-ds bench --help`").add_subparsers(
        required=True, metavar="BENCH"
    )
    one = add_command(
        benches, "soak", soak, "train while ranks are killed repeatedly; checkpoints must come faster than the kills"
    )
    one.add_argument("recipe", nargs="?", default="demo")
    one.add_argument("--run-dir", default="runs/soak")
    add_overrides(one)
    one.add_argument("--processes", type=positive, default=2)
    one.add_argument("--kill-every-minutes", type=float, default=3.0)
    one.add_argument("--minutes", type=float, help="end with the next kill after this time, done or not")
    one.add_argument("--seed", type=int, default=0, help="decides which rank is killed and when")
    one.add_argument("--no-compare", action="store_true", help="skip the undisturbed run whose weights are compared")


def soak(arguments: argparse.Namespace) -> None:
    from vae_ds.bench import soak

    result = soak.soak(
        arguments.recipe,
        Path(arguments.run_dir),
        overrides=overrides_of(arguments),
        processes=arguments.processes,
        kill_every_s=60 * arguments.kill_every_minutes,
        minutes=arguments.minutes,
        seed=arguments.seed,
        compare=not arguments.no_compare,
    )
    print(json.dumps(asdict(result), indent=2))
    if result.same_weights is False:
        raise RuntimeError("the run that was killed ended with other weights than the undisturbed one")
