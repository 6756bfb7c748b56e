"""Checks of a machine, or of all nodes of a job, before a run. Prints a table, or JSON for a support ticket."""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import torch

from vae_ds import distributed
from vae_ds.cluster import allreduce, checks, installation
from vae_ds.cluster.checks import Check
from vae_ds.data import cache_dir
from vae_ds.runtime import EXIT_FAULT, note_exit, own_rank, records

SCHEMA_VERSION = 1
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


def examine(run_dir: Path, *, with_ranks: bool = True, timeout_s: float = 60.0, as_json: bool = False) -> bool:
    """Run all checks, print them, and return True if none failed.

    In a group of ranks, every rank must call it: one rank per node checks its node, all ranks run the all-reduce, and
    rank 0 prints. Outside a group, it starts processes for the all-reduce. Without `with_ranks`, each process checks
    only its machine. If the group is broken, this function ends the process with the exit code of a fault.
    """
    with _own_stdout() as out:
        if not with_ranks:
            skipped = Check(allreduce.NAME, "skipped", "disabled by --no-ranks")
            found = _on_host(checks.this_host(), [*of_this_node(run_dir), skipped])
        elif not allreduce.in_group():
            found = _on_host(checks.this_host(), [*of_this_node(run_dir), allreduce.start_group(timeout_s)])
        else:
            local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
            own = _on_host(checks.this_host(), of_this_node(run_dir)) if local_rank == "0" else []
            outcome = allreduce.try_group(own, timeout_s)
            found = [*outcome.gathered, *_on_host(checks.this_host(), [outcome.check])]
            _leave(outcome.broken, lambda: _show(found, out, as_json))
            return _passed(found)
        _show(found, out, as_json)
    return _passed(found)


def work(timeout_s: float) -> None:
    """Run one rank of a group that `examine` has started. Rank 0 prints the check of the group as JSON."""
    with _own_stdout() as out:
        outcome = allreduce.try_group([], timeout_s)
        _leave(outcome.broken, lambda: print(json.dumps(asdict(outcome.check)), file=out, flush=True))


def of_this_node(run_dir: Path) -> list[Check]:
    """All checks except the all-reduce. A check that raises counts as failed."""
    each: dict[str, Callable[[], Check | list[Check]]] = {
        "versions": installation.versions,
        "driver": installation.driver,
        "gpus": installation.gpus,
        "collectives": installation.collectives,
        "deepspeed": installation.deepspeed,
        "compiler": installation.compiler,
        "built operators": installation.built_operators,
        "cores": checks.cores,
        "memory": checks.memory,
        "disk: run": lambda: checks.disk("run", run_dir, "choose another --run-dir"),
        "disk: corpora": lambda: checks.disk("corpora", cache_dir(), "set VAE_DS_CACHE to another directory"),
        "disk: temporary": lambda: checks.disk(
            "temporary", Path(tempfile.gettempdir()), "set TMPDIR to another directory"
        ),
        "disk: shared memory": checks.shared_memory,
        "limit: open files": checks.open_files,
        "limit: locked memory": checks.locked_memory,
        "network": lambda: checks.network(torch.cuda.is_available()),
        "host name": checks.host_name,
        "slurm": checks.scheduler,
        "slurm job": checks.job,
    }
    found: list[Check] = []
    for name, check in each.items():
        try:
            result = check()
        except Exception as error:  # a fault in one check must not hide the results of the others
            result = Check(name, "fail", f"the check raised {type(error).__name__}: {error}", "please report this")
        found += result if isinstance(result, list) else [result]
    return found


def _on_host(host: str, found: Sequence[Check]) -> list[Check]:
    return [replace(check, host=host) for check in found]


def _passed(found: Sequence[Check]) -> bool:
    return not any(check.state == "fail" for check in found)


def _leave(broken: bool, show: Callable[[], None]) -> None:
    """Print on rank 0 and leave the group. If it is broken, end the process: a thread may block in it forever."""
    if own_rank() == "0":
        show()
    if not broken:
        device = distributed.start().device
        if device.type == "cuda":
            # Another thread joined the group, and each thread has its own current device.
            torch.cuda.set_device(device)
        distributed.finish()
        return
    if own_rank() != "0":
        time.sleep(allreduce.REPORT_S)
    note_exit(EXIT_FAULT)
    sys.stderr.flush()
    os._exit(EXIT_FAULT)


def _show(found: Sequence[Check], out: TextIO, as_json: bool) -> None:
    if as_json:
        print(records.strict_json(report(found), indent=2), file=out, flush=True)
    else:
        _print_table(found, out)
        out.flush()


def report(found: Sequence[Check]) -> dict[str, Any]:
    """The output of `--json`: the checks and the facts of this host.

    It contains no environment variables except a fixed list.
    """
    host = checks.this_host()
    here = records.environment(1, "cuda" if torch.cuda.is_available() else "cpu")
    shown = [{key: value for key, value in asdict(check).items() if key != "facts"} for check in found]
    return {
        "schema_version": SCHEMA_VERSION,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": host,
        "passed": _passed(found),
        "checks": shown,
        "facts": here | checks.merged([check for check in found if check.host == host]),
    }


def _print_table(found: Sequence[Check], out: TextIO) -> None:
    """Print one row per check, from other nodes only distinct problems. Below, print the advice in unwrapped lines."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    host = checks.this_host()
    rows: dict[str, Check] = {check.name: check for check in found if check.host == host}
    elsewhere: dict[tuple[str, str, str], list[Check]] = {}
    for check in found:
        if check.host != host and check.state in ("warn", "fail"):
            elsewhere.setdefault((check.name, check.state, check.found), []).append(check)
    rows |= {f"{same[0].name} @ {checks.some([one.host for one in same])}": same[0] for same in elsewhere.values()}
    console, table = Console(file=out), Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("check", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    for title, check in rows.items():
        table.add_row(escape(title), f"[{COLOURS[check.state]}]{check.state}[/]", escape(check.found))
    console.print(table)
    for title, check in rows.items():
        if check.advice:
            console.print(f" {title}: {check.advice}", markup=False, highlight=False, soft_wrap=True)
    counts = {state: sum(check.state == state for check in found) for state in COLOURS}
    summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    nodes = len({check.host for check in found})
    console.print(f"\n {summary}" + (f", on {nodes} nodes" if nodes > 1 else ""), highlight=False)


@contextlib.contextmanager
def _own_stdout() -> Iterator[TextIO]:
    """Reserve standard output for this command: output of libraries, native ones too, goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(os.dup(kept), "w", encoding="utf-8") as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
