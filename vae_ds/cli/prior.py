"""`vae-ds prior`: fit a learned prior to a finished run, or choose among the priors of an export."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from vae_ds.cli.options import PRIORS, above_zero, add_command, add_json, add_run, positive
from vae_ds.errors import ConfigError
from vae_ds.runtime import evaluations, outlive_terminal, own_rank, records, run_dirs


def add(subparsers: Any) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "prior",
        prior,
        "fit a learned prior to a finished run, or choose one of its priors",
        "Encodes training sentences once, fits the prior to their codes, and adds it to the exported model, which then "
        "uses it. Encoder and decoder stay as they are. Without --kind and --use, prints the priors of the model.",
        ["vae-ds prior runs/demo --kind flow", "vae-ds prior runs/demo --use normal"],
    )
    add_run(parser, "a run directory, or an exported model together with --recipe")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kind", choices=PRIORS[1:], help="fit a prior of this kind")
    what.add_argument("--use", choices=PRIORS, help="let the model use this one of its priors; fits nothing")
    parser.add_argument("--replace", action="store_true", help="replace the model's prior of this kind")
    parser.add_argument(
        "--sentences",
        type=positive,
        default=50_000,
        metavar="N",
        help="training sentences to encode, drawn at random (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=positive, default=3000, metavar="N", help="steps of the fit (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=positive, default=512, metavar="N", help="codes per step (default: %(default)s)"
    )
    parser.add_argument("--lr", type=above_zero, default=2e-3, help="learning rate of the fit (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the fit (default: %(default)s)")
    for name, words in (
        ("components", "components of a mixture"),
        ("couplings", "couplings of a flow"),
        ("width", "width of the hidden layers of a coupling"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, metavar="N", help=f"{words} (default: model.prior_{name} of the recipe)"
        )
    parser.add_argument("--recipe", help="the recipe whose data is used (default: the recipe of the run)")
    add_json(parser, "the result as one JSON object")


def prior(arguments: argparse.Namespace) -> None:
    run = Path(arguments.run)
    export = run_dirs.model_of(run)
    if arguments.kind is not None:
        return _fit(arguments, run)
    from vae_ds.model import prior_in_use, read_export, select_prior, stored_priors

    if arguments.use is not None:
        select_prior(export, arguments.use)
    used = prior_in_use(read_export(export))
    if arguments.json:
        print(records.strict_json({"prior": used, "priors": stored_priors(export)}))
    else:
        print(f"{export} uses the prior {used}; it has {', '.join(stored_priors(export))}")
        _name_old_evaluations(run, used)


def _name_old_evaluations(run: Path, prior: str | None) -> None:
    """Say which stored evaluations are not of this prior; None: all of them."""
    for split in evaluations.of_other_priors(run, prior):
        print(
            f"{evaluations.metrics_file(run, split)} is of another prior; {evaluations.command(run, split)} writes it"
            " anew"
        )


def _fit(arguments: argparse.Namespace, run: Path) -> None:
    is_run = run_dirs.is_run(run)
    if not is_run and arguments.recipe is None:
        raise ConfigError(f"{run} is an exported model, which has no data settings; select the data with --recipe")
    outlive_terminal(run)
    if own_rank() == "0":
        # The libraries take seconds to load.
        print(f"fitting the prior {arguments.kind} to {run}", file=sys.stderr, flush=True)
    from vae_ds import distributed, evaluation, training

    names = ("kind", "sentences", "steps", "batch", "lr", "seed", "components", "couplings", "width", "replace")
    how = evaluation.FitSettings(**{name: getattr(arguments, name) for name in names})
    # A training would replace the export.
    with training.hold(run, distributed.start()) if is_run else nullcontext():
        found = evaluation.fit_prior(run, how, arguments.recipe)
    if found is None:
        return
    if arguments.json:
        print(records.strict_json(found))
        return
    print(f"{run_dirs.model_of(run)} uses the prior {found['prior']}, fitted to {found['sentences']:,} sentences")
    print(f"mean KL of {found['held_out']:,} sentences of the valid split, nats:")
    for name, words in (("kl_normal", "from N(0, I)"), ("kl_before", "from the prior before"), ("kl", "from this one")):
        print(f"  {words:<22} {evaluations.with_error(found[name], found[f'{name}_se'])}")
    print(f"  {'saved of N(0, I)':<22} {evaluations.with_error(found['saved'], found['saved_se'])}")
    _name_old_evaluations(run, None)
