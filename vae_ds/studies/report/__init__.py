"""A report of runs: tables as the paper's with its printed rows corrected, and figures. Markdown, CSV, PNG and SVG.

The same input gives the same bytes of Markdown and CSV: no date, no path of this machine beyond the given ones.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from vae_ds.errors import ConfigError
from vae_ds.runtime import records
from vae_ds.studies import runs
from vae_ds.studies.report.drawn import along_phases, information, pareto_front, rate_distortion
from vae_ds.studies.report.page import Page, Row, escape, is_number, markdown, number
from vae_ds.studies.report.printed import paper_tables
from vae_ds.studies.runs import Run

__all__ = ["pareto_front", "write"]

# In no table of metrics: paths, long lists, and what has a column of its own.
NO_METRICS = {"model", "split", "seed", "kl_per_dim", "verdict", "verdict_reason"}
HEADLINE = ("rec", "kl", "nelbo", "iw_nll", "ppl", "iw_ppl", "mi", "mi_ceiling", "au", "z_gain", "lm_gain")
METRICS_A_TABLE = 12


def write(paths: Sequence[str | Path], folder: Path, split: str = "test") -> Path:
    """Write the report of these runs, and of all in directories of runs, into `folder`; returns its report.md.

    A run that was not evaluated on `split` is listed as such. Files of an earlier report are replaced.
    Raises CheckpointError and ConfigError as `read_runs` does, ConfigError if `folder` cannot be one.
    """
    every = runs.read_runs(paths, split)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be the report's directory ({error.strerror}); name another") from None
    page = Page(folder, split)
    groups = runs.by_data(every)
    _overview(page, every)
    _over_seeds(page, every)
    paper_tables(page, every)
    along_phases(page, every)
    for name, members in groups.items():
        rate_distortion(page, name, members, alone=len(groups) == 1)
    for name, members in groups.items():
        information(page, name, members, alone=len(groups) == 1)
    records.replace_file(folder / "report.md", ("\n\n".join(page.parts) + "\n").encode())
    return folder / "report.md"


def _overview(page: Page, every: Sequence[Run]) -> None:
    evaluated = [run for run in every if run.metrics is not None]
    page.say(f"# Report of {number(len(every), 'run')}")
    page.say(f"{len(evaluated)} of {len(every)} were evaluated on the {page.split} split. Nats are per sentence.")
    missing = [
        f"- {escape(run.name)}: {run.state}; `vae-ds evaluate {run.path} --split {page.split}` evaluates it"
        for run in every
        if run.metrics is None
    ]
    if missing:
        page.say("Not evaluated, and so without numbers below:", "\n".join(missing))
    page.say("## All runs")
    keys = runs.differing([run.settings for run in every])
    setting_heads = {f"set:{key}": f"`{runs.short(key, keys)}`" for key in keys}
    metrics = [k for k in dict.fromkeys(k for run in every for k in run.metrics or ()) if k not in NO_METRICS]
    rows = [_run_row(run, keys, metrics) for run in every]
    page.csv("runs", ["run", "state", "verdict", "verdict_reason", *setting_heads, *metrics], rows)
    page.say("[runs.csv](runs.csv) has all of this section in one table.")
    used = [key for key in metrics if any(row.get(key) is not None for row in rows)]
    asked, others = [key for key in HEADLINE if key in used], [key for key in used if key not in HEADLINE]
    page.say(markdown({key: key for key in ("run", "verdict", *asked)}, rows))
    # More of them than a page is wide are in the CSV alone.
    page.say(markdown({"run": "run", "state": "state"} | (setting_heads if len(keys) <= METRICS_A_TABLE else {}), rows))
    for start in range(0, len(others), METRICS_A_TABLE):
        page.say(markdown({key: key for key in ("run", *others[start : start + METRICS_A_TABLE])}, rows))
    reasons = [
        f"- {escape(run.name)}: {escape(str(run.metric('verdict_reason')))}"
        for run in evaluated
        if run.metric("verdict_reason") is not None
    ]
    if reasons:
        page.say("Why a verdict is what it is:", "\n".join(reasons))


def _over_seeds(page: Page, every: Sequence[Run]) -> None:
    """The mean and the standard deviation of what was run with several seeds."""
    rows: list[Row] = []
    for name, members in runs.by_seed([run for run in every if run.metrics is not None]):
        row: Row = {"run": name, "seeds": len(members)}
        for key in HEADLINE:
            values = [run.metric(key) for run in members]
            if all(is_number(value) for value in values):
                mean, deviation = float(statistics.mean(values)), float(statistics.stdev(values))
                row |= {key: f"{mean:.2f} ± {deviation:.2f}", f"{key}_mean": mean, f"{key}_sd": deviation}
        rows.append(row)
    if not rows:
        return
    page.say("## Over seeds", "Runs that differ in the seed alone: mean ± standard deviation, as of a sample.")
    page.csv("seeds", ["run", "seeds", *(f"{key}_{what}" for key in HEADLINE for what in ("mean", "sd"))], rows)
    used = [key for key in ("run", "seeds", *HEADLINE) if any(key in row for row in rows)]
    page.say(markdown({key: key for key in used}, rows), "[seeds.csv](seeds.csv)")


def _run_row(run: Run, keys: Sequence[str], metrics: Sequence[str]) -> Row:
    row: Row = {"run": run.name, "state": run.state if run.metrics is not None else f"{run.state}, not evaluated"}
    row |= {key: run.metric(key) for key in ("verdict", "verdict_reason", *metrics)}
    return row | {f"set:{key}": runs.shown(run.settings[key]) for key in keys if key in run.settings}
