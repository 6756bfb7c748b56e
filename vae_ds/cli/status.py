"""`vae-ds status`: the state of one run or of many."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ds.cli.options import above_zero, add_command, add_json, add_run
from vae_ds.cli.outcome import validation_terms
from vae_ds.errors import CheckpointError
from vae_ds.runtime import EXIT_FAULT, EXIT_STOPPED, records

if TYPE_CHECKING:
    from rich.table import Table

Status = Mapping[str, Any]
UNREADABLE = "unreadable"
WIDE = 10_000  # columns: a table in a file or a pipe is not cut


def add(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = add_command(
        subparsers,
        "status",
        status,
        "show the state of a run, or of all runs in a directory",
        "The exit code is 0 if the run is done, 75 if it is stopped, 1 if it is running or failed; for several runs, 0 "
        "if all are done, 75 if the others are stopped.",
        ["vae-ds status runs/demo", "vae-ds status runs/demo --watch", "vae-ds status runs"],
    )
    add_run(parser, "a run directory, or a directory of runs", name="runs", nargs="+")
    add_json(parser, "one JSON object per run, each on one line")
    parser.add_argument("--watch", action="store_true", help="show changes until no run is running")
    parser.add_argument(
        "--interval",
        type=above_zero,
        default=2.0,
        metavar="SECONDS",
        help="time between two looks with --watch (default: %(default)g)",
    )


def status(arguments: argparse.Namespace) -> None:
    folders, is_one = _folders([Path(path) for path in arguments.runs])
    show = _Watch(is_one, arguments.json) if arguments.watch else None
    try:
        found = _read(folders, is_one)
        while show is not None:
            show.update(found)
            if not _is_any_running(found):
                break
            time.sleep(arguments.interval)
            found = _read(folders, is_one) or found
    except KeyboardInterrupt:
        # Ctrl-C ends the watching, not the run.
        pass
    finally:
        if show is not None:
            show.close()
    if show is None:
        _print(found, is_one, arguments.json)
    code = exit_code([state["state"] for state in found.values()])
    if code:
        sys.stdout.flush()
        sys.exit(code)


def exit_code(states: Sequence[str]) -> int:
    """0 if all are done; 75 if the others are stopped; else 1."""
    others = {state for state in states if state != "done"}
    return 0 if not others else EXIT_STOPPED if others == {"stopped"} else EXIT_FAULT


def facts(status: Status) -> list[tuple[str, str]]:
    """The facts of a status as (name, words), in the order in which they are shown. What it lacks is left out."""
    when = f"{status.get('updated_at', '')}".replace("T", " ").replace("+00:00", " UTC")
    writer = f", process {status['pid']} on {status.get('host')}" if status.get("pid") is not None else ""
    validation = status.get("validation")
    left = status.get("seconds_left")
    epoch = status.get("epoch")
    found = {
        "state": status["state"],
        "phase": _phase(status),
        "step": _steps(status),
        "epoch": None if epoch is None else f"{epoch:.2f}",
        "time left": None if left is None else str(timedelta(seconds=round(left))),
        "validation": validation and f"step {validation['step']:,}: {validation_terms(validation)}",
        "export": (status.get("export") or {}).get("reason"),
        "checkpoint": status.get("checkpoint"),
        "bad lines": f"{bad:,} skipped" if (bad := status.get("bad_lines")) else None,
        "reason": status.get("reason"),
        "exit code": status.get("exit_code"),
        "updated": f"{when}{writer}",
    }
    return [(name, str(words)) for name, words in found.items() if words not in (None, "")]


def line(status: Status) -> str:
    """The facts that change during a run, on one line."""
    kept = [words for name, words in facts(status) if name in ("state", "phase", "step", "reason")]
    left = [f"{words} left" for name, words in facts(status) if name == "time left"]
    nelbo = (status.get("validation") or {}).get("nelbo")
    return "  ".join([*kept, *left, *([f"nelbo {nelbo:.2f}"] if nelbo is not None else [])])


def _phase(status: Status) -> str | None:
    """The phase by its name. Version 0.1 has its number alone, counted from 0."""
    phase = status.get("phase")
    if isinstance(phase, int):
        return f"number {phase + 1}"
    if phase is None or status.get("phases") is None:
        return phase
    return f"{phase} ({status.get('phase_number')} of {status['phases']})"


def _steps(status: Status) -> str | None:
    """The step of the phase and of the run. In version 0.1, `step` counts within the phase."""
    step, total = status.get("step"), status.get("total_steps")
    if step is None:
        return None
    of_all = "" if total is None else f" of {total:,}"
    if isinstance(status.get("phase"), int):
        return f"{step:,} of the phase" + ("" if total is None else f"; the run has {total:,}")
    share = f" ({step / total:.0%})" if total else ""
    within = f"; {status['phase_step']:,} of {status['phase_steps']:,} in the phase" if "phase_step" in status else ""
    return f"{step:,}{of_all}{share}{within}"


def _folders(paths: Sequence[Path]) -> tuple[list[Path], bool]:
    """The run directories that are named or contained in a directory of runs, and whether it is one named run."""
    found: dict[Path, Path] = {}
    is_one = len(paths) == 1
    for path in paths:
        if (path / "status.json").exists():
            found.setdefault(path.resolve(), path)
            continue
        # A directory of runs, or of studies.
        inside = sorted(file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/status.json"))
        is_one = False
        if not inside:
            what = "has no status.json, nor has a directory in it; name a run directory or a directory of runs"
            raise CheckpointError(f"{path} {what}" if path.exists() else f"{path}: no such directory")
        for folder in inside:
            found.setdefault(folder.resolve(), folder)
    return list(found.values()), is_one


def _read(folders: Sequence[Path], is_one: bool) -> dict[Path, Status]:
    """The status of each run. Among several, a broken file is a status of its own; of one run it is an error."""
    found: dict[Path, Status] = {}
    for folder in folders:
        try:
            status = records.read_status(folder)
        except CheckpointError as error:
            if is_one:
                raise
            status = {"state": UNREADABLE, "reason": str(error)}
        if status is not None:
            found[folder] = status if status["state"] == UNREADABLE else records.of_the_living(status)
    return found


def _is_any_running(found: Mapping[Path, Status]) -> bool:
    return any(status["state"] == "running" for status in found.values())


def _print(found: Mapping[Path, Status], is_one: bool, as_json: bool) -> None:
    if as_json:
        for path, status in found.items():
            print(json.dumps(status if is_one else {"run": str(path), **status}), flush=True)
    elif is_one:
        print("\n".join(_block(found)))
    else:
        from rich.console import Console

        console = Console()
        # Rich cuts the cells of a table that is wider than a pipe's 80 columns.
        console.width = console.width if console.is_terminal else WIDE
        console.print(_table(found))


def _block(found: Mapping[Path, Status]) -> list[str]:
    ((path, status),) = found.items()
    return [str(path), *(f"  {name:10}  {words}" for name, words in facts(status))]


def _table(found: Mapping[Path, Status]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    heads = ("state", "phase", "step", "time left", "validation", "reason")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("run", no_wrap=True)
    for head in heads:
        table.add_column(head, overflow="fold")
    for path, status in found.items():
        words = dict(facts(status))
        # The step within the phase and all metrics would be too long for a row.
        words["step"] = words.get("step", "").partition(";")[0]
        validation = status.get("validation") or {}
        nelbo = [f"nelbo {validation['nelbo']:.2f}"] if validation.get("nelbo") is not None else []
        words["validation"] = ", ".join(filter(None, [*nelbo, validation.get("verdict")]))
        table.add_row(escape(str(path)), *(escape(words.get(head, "")) for head in heads))
    return table


class _Watch:
    """Shows the runs again and again: in place on a terminal, elsewhere a line for each change."""

    def __init__(self, is_one: bool, as_json: bool) -> None:
        self._is_one, self._as_json = is_one, as_json
        self._last: dict[Path, str] = {}
        self._live: Any = None
        if sys.stdout.isatty() and not as_json:
            from rich.live import Live

            self._live = Live(auto_refresh=False)
            self._live.start()

    def update(self, found: Mapping[Path, Status]) -> None:
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text("\n".join(_block(found))) if self._is_one else _table(found), refresh=True)
            return
        for path, status in found.items():
            shown = line(status)
            if self._last.get(path) == shown:
                continue
            self._last[path] = shown
            if self._as_json:
                _print({path: status}, self._is_one, True)
            else:
                print(f"{path}  {shown}", flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
