"""The results of an evaluation in a run directory: `eval-<split>.json`, and the values of each sentence beside it.

`eval-<split>.safetensors` has one float32 array per quantity, in nats, in the order of the split: `rec`, `kl`,
`rec_swapped` (rec with the z of another sentence) and `iw_nll`, which may have only the first sentences. They allow
comparisons that are paired by sentence. A model without a quantity has no array for it.

Shapes: N sentences.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vae_ds.errors import CheckpointError, DataError
from vae_ds.runtime import records

if TYPE_CHECKING:
    import numpy as np

FINGERPRINT = "data_fingerprint"
# The parts of a fingerprint, in the order in which a difference is explained.
PARTS = {
    "tokenizer": "another tokenizer",
    "texts": "other sentences",
    "lengths": "other lengths of the kept text (data.max_tokens)",
}


class Estimate(NamedTuple):
    """A mean and its standard error. The error is None for fewer than two values."""

    mean: float
    se: float | None

    def __str__(self) -> str:
        return with_error(self.mean, self.se)


def estimate(values_N: Any) -> Estimate:
    """The mean of N values and its standard error, sd / sqrt(N) with N - 1 degrees of freedom; float64."""
    import numpy as np

    values_N = np.asarray(values_N, dtype=np.float64)
    count = len(values_N)
    if not count:
        raise ValueError("no values to average")
    error = float(values_N.std(ddof=1)) / math.sqrt(count) if count > 1 else None
    return Estimate(float(values_N.mean()), error)


def with_error(value: float, se: float | None) -> str:
    """`63.9 ± 0.4`: two decimals, or fewer if the standard error says so. It has one digit, two from 1 to 1.9.

    Without a standard error: the value with two decimals.
    """
    if se is None or not math.isfinite(se) or not math.isfinite(value):
        return f"{value:.2f}"
    decimals = 2
    if se > 0:
        place = math.floor(math.log10(se))
        leading = round(se / 10.0**place, 6)
        decimals = min(2, max(0, -place + (1 if leading < 1.95 else 0)))
    return f"{value:.{decimals}f} ± {se:.{decimals}f}"


def write(run_dir: Path, split: str, metrics: Mapping[str, Any], sentences: Mapping[str, np.ndarray]) -> None:
    """Write both files, each atomically, the values of the sentences first. Call it on rank 0 only."""
    import numpy as np
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in sentences.items()}
    note = {FINGERPRINT: json.dumps(metrics[FINGERPRINT], sort_keys=True)}
    records.replace_file(values_file(run_dir, split), save(arrays, metadata=note))
    records.write_json(metrics_file(run_dir, split), metrics)


def metrics_file(run_dir: Path, split: str) -> Path:
    """The JSON file of an evaluation."""
    return run_dir / f"eval-{split}.json"


def values_file(run_dir: Path, split: str) -> Path:
    """The file with the values of each sentence."""
    return run_dir / f"eval-{split}.safetensors"


def read(run_dir: Path, split: str) -> dict[str, Any]:
    """The metrics of an evaluated run or model. Raises CheckpointError for a missing or broken file."""
    path = metrics_file(run_dir, split)
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not run_dir.exists():
            raise CheckpointError(f"{run_dir}: no such directory") from None
        raise CheckpointError(f"{path}: no such file; write it with {command(run_dir, split)}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not an evaluation: {error}") from None
    if not isinstance(metrics, dict):
        raise CheckpointError(f"{path}: not an evaluation: a {type(metrics).__name__}, not an object of metrics")
    return metrics


def of_other_priors(run_dir: Path, prior: str | None) -> list[str]:
    """The splits of the evaluations in a run directory under another prior than this one; None: of all of them."""
    splits = sorted(path.stem.removeprefix("eval-") for path in run_dir.glob("eval-*.json"))
    return [split for split in splits if prior_of(read(run_dir, split)) != prior]


def prior_of(metrics: Mapping[str, Any]) -> str:
    """The prior of an evaluation. Only that of a learned prior names it."""
    return str(metrics.get("prior") or "normal")


def read_values(run_dir: Path, split: str) -> dict[str, np.ndarray]:
    """The values of each sentence of an evaluated run or model, float64 arrays by name.

    Raises CheckpointError for a missing or broken file, or one of another evaluation than the JSON file's.
    """
    import numpy as np
    from safetensors import SafetensorError, safe_open

    metrics, path = read(run_dir, split), values_file(run_dir, split)
    fingerprint_of(run_dir, split, metrics)
    try:
        with safe_open(path, framework="numpy") as file:
            note = (file.metadata() or {}).get(FINGERPRINT)
            values = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; write it with {command(run_dir, split)}") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not the values of an evaluation: {error}") from None
    is_same_data = note == json.dumps(metrics[FINGERPRINT], sort_keys=True)
    if not (is_same_data and _fits(values, metrics)):
        raise CheckpointError(
            f"{path}: belongs to another evaluation than {metrics_file(run_dir, split).name}; write both with"
            f" {command(run_dir, split)}"
        )
    return values


def _fits(values: Mapping[str, np.ndarray], metrics: Mapping[str, Any]) -> bool:
    """Whether the values are those of the metrics: their number, and their mean up to the rounding to float32."""
    rec_N = values.get("rec")
    if rec_N is None or len(rec_N) != metrics.get("sentences") or len(values.get("kl", rec_N)) != len(rec_N):
        return False
    if metrics.get("rec") is None:  # a mean that is not finite is null in JSON
        return not math.isfinite(rec_N.mean())
    return math.isclose(rec_N.mean(), metrics["rec"], rel_tol=1e-5)


def fingerprint_of(run_dir: Path, split: str, metrics: Mapping[str, Any]) -> dict[str, str]:
    """What an evaluation says of its data. Raises CheckpointError if it says nothing, as before version 0.2."""
    found = metrics.get(FINGERPRINT)
    if not isinstance(found, dict) or set(found) != set(PARTS):
        raise CheckpointError(
            f"{metrics_file(run_dir, split)}: has no {FINGERPRINT}, so it may be of other data; write it again with"
            f" {command(run_dir, split)}"
        )
    return found


def require_same_data(one: Mapping[str, str], other: Mapping[str, str], label: str, than: str) -> None:
    """Raise DataError, which says what differs, unless two fingerprints are equal: `label` has other data than `than`.

    Nats per sentence compare only on the same sentences, cut at the same place by the same tokenizer.
    """
    differing = [part for part in PARTS if one[part] != other[part]]
    # Other sentences or another tokenizer give other lengths, too. That is no further reason.
    reasons = [PARTS[part] for part in differing if part != "lengths" or len(differing) == 1]
    if reasons:
        raise DataError(f"{label} cannot be compared with {than}: it has {', '.join(reasons)}")


def paired(one_N: np.ndarray, other_N: np.ndarray) -> Estimate:
    """The mean of one - other over the sentences that both have, which are the first ones of the split."""
    count = min(len(one_N), len(other_N))
    return estimate(one_N[:count] - other_N[:count])


def nll_of(values: Mapping[str, np.ndarray], quantity: str) -> np.ndarray | None:
    """`rec`, `nelbo` or `iw_nll` of each sentence. A model without `kl` is a plain language model.

    Its `rec` is its exact negative log-likelihood. Returns None if the model has no such values.
    """
    if "kl" not in values:
        return values["rec"]
    return values["rec"] + values["kl"] if quantity == "nelbo" else values.get(quantity)


def command(run_dir: Path, split: str) -> str:
    """The command that writes an evaluation, for messages."""
    return f"`vae-ds evaluate {shlex.quote(str(run_dir))} --split {split}`"
