"""What `vae-ds train` prints at its end: the validations, the model, and commands to try next."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ds.errors import CheckpointError
from vae_ds.runtime import records

if TYPE_CHECKING:
    from vae_ds.config import RunConfig

NATS = ("nelbo", "rec", "kl", "mi", "z_gain")
UNKNOWN_COST = "unknown without a yardstick"  # what `evaluation.verdict.cost` says without one


def lines(run_dir: Path, config: "RunConfig", was_done: bool) -> list[str]:
    """The lines about a run that is done. `was_done`: it was done before this command."""
    found = [f"{run_dir} was done already; nothing is trained"] if was_done else []
    rows = _validations(run_dir)
    if rows:
        found.append(f"last validation: {_validation(rows[-1])}")
    # A run of version 0.2 does not say what it exported.
    exported = (records.read_status(run_dir) or {}).get("export")
    if exported is not None:
        of_export = [row for row in rows[:-1] if row["step"] == exported["step"]]
        found += [f"exported validation: {_validation(row)}" for row in of_export]
        found.append(exported["reason"])
    found.append(f"model: {run_dir / 'model'}")
    run = shlex.quote(str(run_dir))
    if config.model.injection == "none":
        commands = [f"evaluate {run}", f"sample {run} --temperature 1"]
    else:
        commands = [f"evaluate {run}", f'reconstruct {run} "A sentence to encode and decode."', f"sample {run}"]
    return [*found, "next:", *(f"  vae-ds {command}" for command in commands)]


def validation_terms(row: Mapping[str, Any]) -> str:
    """The metrics of a validation with their units: `nelbo 63.95, ... nats per sentence, 32 active units, uses z`.

    With a yardstick, the cost of the code follows.
    """
    nats = ", ".join(f"{key} {row[key]:.2f}" for key in NATS if row.get(key) is not None)
    units = f"{row['au']} active units" if row.get("au") is not None else ""
    cost = f"cost: {row['cost']}" if row.get("cost") not in (None, UNKNOWN_COST) else ""
    return ", ".join(filter(None, (f"{nats} nats per sentence" if nats else "", units, row.get("verdict"), cost)))


def _validation(row: Mapping[str, Any]) -> str:
    return f"step {row['step']:,}: {validation_terms(row)}"


def _validations(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of evaluations.jsonl that have a finite nelbo. None without the file: its absence is no fault here."""
    try:
        rows = records.read_rows(run_dir / "evaluations.jsonl")
    except (OSError, CheckpointError):
        return []
    return [row for row in rows if isinstance(row.get("nelbo"), int | float) and math.isfinite(row["nelbo"])]
