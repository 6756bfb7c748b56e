"""`vae-ds bench`: measurements of the package itself."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vae_ds.cli.options import add_command, add_json, add_overrides, add_set, overrides_of, positive
from vae_ds.runtime import outlive_terminal, run_dirs


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    summary = "measure the package itself"
    benches = subparsers.add_parser(
        "bench", help=f"{summary}; see `vae-ds bench --help`", description=f"{summary.capitalize()}."
    ).add_subparsers(required=True, metavar="BENCH")
    parser = add_command(
        benches,
        "soak",
        soak,
        "train while random ranks are killed, and compare with an undisturbed run",
        "Checkpoints must be more frequent than kills. Prints one JSON object; exit code 1 if the weights differ.",
        [
            "vae-ds bench soak demo --run-dir runs/soak \\\n      --set phases.1.steps=5000 checkpoint.every_steps=50",
        ],
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        default="demo",
        metavar="RECIPE",
        help="a YAML file, or the name of a shipped recipe (default: %(default)s)",
    )
    parser.add_argument(
        "--run-dir", default="runs/soak", metavar="DIR", help="a new directory for the runs (default: %(default)s)"
    )
    add_overrides(parser)
    parser.add_argument(
        "--processes", type=positive, default=2, metavar="N", help="number of ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--kill-every-minutes",
        type=float,
        default=3.0,
        metavar="MINUTES",
        help="mean time between two kills (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="end with the first kill after this time, even if the run is not done (default: no limit)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the choice of ranks and times (default: %(default)s)"
    )
    parser.add_argument(
        "--no-compare", action="store_true", help="skip the undisturbed run and the comparison of the weights"
    )
    _add_memory(benches)
    _add_speed(benches)
    _add_latents(benches)
    _add_gpu(benches)


def _add_speed(benches: Any) -> None:
    parser = add_command(
        benches,
        "speed",
        speed,
        "measure the speed of training, evaluation and data beside what they are compared with, on CPUs",
        "Measures in turns and prints a table with medians; --run-dir gets speed.json. Takes about 30 minutes on two"
        " idle cores and 8 GB of memory.",
        ["vae-ds bench speed --run-dir runs/speed", "vae-ds bench speed --only loop mfu"],
    )
    parser.add_argument(
        "--run-dir", default="runs/speed", metavar="DIR", help="a directory for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="MEASURE", help="measures: see docs/speed.md (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the smallest size: shows in seconds that the measures work"
    )
    parser.add_argument(
        "--lines",
        type=positive,
        default=1_000_000,
        metavar="N",
        help="lines of the longest text (default: %(default)s)",
    )
    add_json(parser)


def speed(arguments: argparse.Namespace) -> None:
    run_dirs.check_writable(Path(arguments.run_dir))
    from vae_ds.bench import speed

    facts, rows = speed.speed(
        Path(arguments.run_dir), only=arguments.only, is_quick=arguments.quick, lines=arguments.lines
    )
    if arguments.json:
        print(json.dumps({"facts": facts, "rows": [speed.as_json(row) for row in rows]}, default=str))
        return
    print(speed.table(facts, rows))


def _add_memory(benches: Any) -> None:
    parser = add_command(
        benches,
        "memory",
        memory,
        "measure the memory of a rank in each part of a run, on CPUs",
        "Trains a T5 with random weights for a few steps per ds_config, and prints a table beside the estimate of"
        " `vae-ds plan`. t5-base needs about 10 GB of memory and 3 GB of disk per ds_config.",
        [
            "vae-ds bench memory --run-dir runs/memory",
            "vae-ds bench memory --size t5-base --ds-configs zero0 zero1 --processes 1",
        ],
    )
    parser.add_argument(
        "--run-dir", default="runs/memory", metavar="DIR", help="a directory for the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        choices=("tiny", "t5-small", "t5-base", "t5-large"),
        default="t5-small",
        help="the shape of the T5 (default: %(default)s)",
    )
    parser.add_argument(
        "--ds-configs",
        nargs="+",
        default=["zero0", "zero1", "zero2", "zero3"],
        metavar="NAME",
        help="ds_configs without the precision (default: zero0 zero1 zero2 zero3)",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="the number format (default: %(default)s)"
    )
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="number of ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=positive, default=8, metavar="N", help="sentences per step on all ranks (default: %(default)s)"
    )
    add_set(parser, "settings of the recipe `demo`, such as data.max_tokens=128 (default: none)")
    add_json(parser, "one JSON list instead of a table")


def _add_latents(benches: Any) -> None:
    parser = add_command(
        benches,
        "latents",
        latents,
        "measure encode, decode and log_prob in sentences a second, beside the stock T5 doing the same work",
        "Both are in one process and take turns. A ratio is of two neighbours in time.",
        ["vae-ds bench latents", "vae-ds bench latents --base google-t5/t5-base --device cuda --batch 256"],
    )
    parser.add_argument(
        "--base", default="tiny", help="a T5: tiny, a hub name or a directory (default: %(default)s)", metavar="BASE"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: %(default)s)"
    )
    numbers = {
        "--sentences": (256, "sentences in a round"),
        "--new-tokens": (24, "tokens that each text is decoded to"),
        "--samples": (8, "importance samples of log_prob"),
        "--rounds": (7, "rounds that count"),
    }
    for name, (default, what) in numbers.items():
        parser.add_argument(name, type=positive, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="most sentences in one forward pass (default: 64, on a GPU 256)"
    )
    add_json(parser, "one JSON object instead of a table")


def latents(arguments: argparse.Namespace) -> None:
    from vae_ds.bench import latents

    result = latents.latents(
        arguments.base,
        device=arguments.device,
        sentences=arguments.sentences,
        batch=arguments.batch,
        new_tokens=arguments.new_tokens,
        samples=arguments.samples,
        rounds=arguments.rounds,
    )
    print(json.dumps(asdict(result)) if arguments.json else latents.table(result))


def memory(arguments: argparse.Namespace) -> None:
    run_dirs.check_writable(Path(arguments.run_dir))
    from vae_ds.bench import memory

    rows = memory.memory(
        Path(arguments.run_dir),
        size=arguments.size,
        ds_configs=arguments.ds_configs,
        precision=arguments.precision,
        processes=arguments.processes,
        batch=arguments.batch,
        overrides=arguments.set or (),
    )
    print(json.dumps([asdict(row) for row in rows]) if arguments.json else memory.table(rows))


def _add_gpu(benches: Any) -> None:
    parser = add_command(
        benches,
        "gpu",
        gpu,
        "check what only a GPU can prove, and measure speed and memory there",
        "Compares the losses of all DeepSpeed configurations with those of the CPU, measures speed, memory, copies and"
        " waits, and writes DIR/gpu.json and the tables DIR/gpu.md. A second call continues with what is missing. Exit"
        " code 1 if a cell has failed.",
        [
            "vae-ds bench gpu --dry-run",
            "vae-ds bench gpu --minutes 10 --to runs/gpu",
            "vae-ds bench gpu --only curves-bf16 speed",
        ],
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="begin nothing that is not expected to end within this time (default: %(default)g)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="parts, as --dry-run lists them (default: all)",
    )
    parser.add_argument(
        "--to", default="runs/gpu", metavar="DIR", help="a directory for the results (default: %(default)s)"
    )
    parser.add_argument("--cpu", action="store_true", help="run the small half on the CPU, in about a minute")
    parser.add_argument("--dry-run", action="store_true", help="list the parts with their expected time")


def gpu(arguments: argparse.Namespace) -> None:
    if not arguments.dry_run:
        run_dirs.check_writable(Path(arguments.to))
    from vae_ds.bench import gpu
    from vae_ds.errors import Failed

    if arguments.dry_run:
        print(gpu.listing(arguments.only, arguments.cpu))
        return
    found = gpu.check(Path(arguments.to), arguments.minutes, arguments.only, arguments.cpu)
    print(f"results: {Path(arguments.to) / 'gpu.json'}, {Path(arguments.to) / 'gpu.md'}")
    failed = [name for name, result in found.items() if result["state"] == "failed"]
    if failed:
        raise Failed(f"{len(failed)} of {len(found)} cells have failed, the first is {failed[0]}; run it again")


def soak(arguments: argparse.Namespace) -> None:
    run_dirs.check_writable(Path(arguments.run_dir))
    outlive_terminal(Path(arguments.run_dir))
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
        raise RuntimeError(
            f"the weights of {arguments.run_dir}/soak, whose ranks were killed, differ from those of the undisturbed "
            f"run {arguments.run_dir}/quiet"
        )
