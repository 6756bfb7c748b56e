"""A report of runs as Markdown, CSV, PNG and SVG: tables, differences, published numbers with corrections, figures.

The same runs give the same bytes: a report has no date, and no path of this machine except those of the runs.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from vae_ds.errors import ConfigError
from vae_ds.runtime import evaluations, records
from vae_ds.studies import metric_tables, runs, setting_words
from vae_ds.studies.metric_tables import COLUMNS, ERROR
from vae_ds.studies.report.difference_section import difference_section
from vae_ds.studies.report.figure_sections import figure_sections, pareto_front
from vae_ds.studies.report.page import Page, Row, escape, is_number, markdown, number
from vae_ds.studies.report.paper_tables import is_of_paper, paper_tables
from vae_ds.studies.report.published_section import published_section
from vae_ds.studies.runs import Run

__all__ = ["figures_of", "pareto_front", "write"]

# In words, with columns of their own.
STATEMENTS = ("verdict", "verdict_reason", "cost")
# In no table of metrics: paths, and what is not one number.
NOT_METRICS = {"model", "split", "seed", "yardstick", "prior", "kl_per_dim", evaluations.FINGERPRINT, *STATEMENTS}
COLUMNS_PER_TABLE = 12
WHAT_SEEDS_SAY = """\
Runs that differ only in the seed: mean ± standard error over the S seeds, sd / √S. It covers the training and the noise
of the evaluation, and not the choice of the sentences, which are the same for all seeds. `seeds.csv` has the standard
deviation sd as well."""


def write(paths: Sequence[str | Path], folder: Path, split: str = "test", with_paper: bool = False) -> Path:
    """Write the report of these runs, and of all runs in directories of runs, into `folder`. Returns its report.md.

    A run that was not evaluated on `split` is listed as such. Files of an earlier report are replaced. The paper's
    tables are part of it with `with_paper`, or if a run is on a corpus of the paper or belongs to its study. A run on a
    corpus with published numbers of other papers stands beside them.
    Raises CheckpointError and ConfigError as `read_runs` does, CheckpointError if the values of the sentences of a run
    that has a row of differences are missing or broken, and ConfigError if `folder` cannot be created.
    """
    every = runs.read_runs(paths, split)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot create this directory ({error.strerror}); choose another one") from None
    page = Page(folder, split)
    groups = runs.by_data(every)
    _overview(page, every)
    _over_seeds(page, groups)
    difference_section(page, groups)
    if with_paper or any(is_of_paper(run) for run in every):
        paper_tables(page, every)
    published_section(page, every)
    figure_sections(page, groups)
    records.replace_file(folder / "report.md", ("\n\n".join(page.parts) + "\n").encode())
    return folder / "report.md"


def figures_of(folder: Path) -> dict[str, Path]:
    """The PNG files that the report in `folder` shows, by their titles."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"\[!\[(.*?)\]\((.*?\.png)\)\]", text)
    return {title: folder / name for title, name in shown if (folder / name).is_file()}


def _overview(page: Page, every: Sequence[Run]) -> None:
    evaluated = [run for run in every if run.metrics is not None]
    page.say(f"# Report of {number(len(every), 'run')}")
    measured = [run.metrics for run in evaluated if run.metrics is not None]
    main = metric_tables.columns(measured)
    page.say(
        f"{len(evaluated)} of {len(every)} runs were evaluated on the {page.split} split. "
        f"{metric_tables.unit_note(main)}. ± is the standard error over the sentences."
    )
    missing = [
        f"- {escape(run.name)}: {run.state}; `vae-ds evaluate {run.path} --split {page.split}` evaluates it"
        for run in every
        if run.metrics is None
    ]
    if missing:
        page.say("These runs were not evaluated and have no numbers below:", "\n".join(missing))
    page.say("## All runs")
    keys = runs.differing([run.settings for run in every])
    setting_heads = {f"set:{key}": f"`{setting_words.short(key, keys)}`" for key in keys}
    metrics = [k for k in dict.fromkeys(k for run in every for k in run.metrics or ()) if k not in NOT_METRICS]
    rows = [_run_row(run, keys, metrics) for run in every]
    page.csv("runs", ["run", "state", *STATEMENTS, *setting_heads, *metrics], rows)
    page.say("[runs.csv](runs.csv) has all tables of this section in one.")
    used = [key for key in metrics if any(row.get(key) is not None for row in rows)]
    main = [key for key in main if key in used]
    others = [key for key in used if key not in main and not key.endswith(ERROR)]
    in_words = list(map(_with_errors, every, rows))
    page.say(markdown({key: key for key in ("run", "verdict", *main)}, in_words))
    # Too many settings for the width of a page are in the CSV alone.
    heads = setting_heads if len(keys) <= COLUMNS_PER_TABLE else {}
    page.say(markdown({"run": "run", "state": "state"} | heads, rows))
    for start in range(0, len(others), COLUMNS_PER_TABLE):
        page.say(markdown({key: key for key in ("run", *others[start : start + COLUMNS_PER_TABLE])}, in_words))
    said = [
        f"- {escape(run.name)}: {escape(line)}"
        for run in evaluated
        for line in metric_tables.statements(run.metrics or {})
    ]
    if said:
        page.say("The mutual information, the verdict with its reason, and the cost of the code:", "\n".join(said))
    unknown = metric_tables.unknown_tokens({run.name: run.metrics or {} for run in evaluated})
    if unknown:
        page.say("\n".join(f"- {escape(line)}" for line in unknown))


def _over_seeds(page: Page, groups: Mapping[str, Sequence[Run]]) -> None:
    """Mean, standard deviation and standard error of runs that differ only in the seed."""
    rows: list[Row] = []
    repeated = [
        (name, same)
        for members in groups.values()
        for name, same in runs.by_seed([run for run in members if run.metrics is not None])
        if len(same) > 1
    ]
    for name, same in repeated:
        row: Row = {"run": name, "seeds": len(same)}
        for key in COLUMNS:
            values = [run.metric(key) for run in same]
            if all(is_number(value) for value in values):
                mean, error = evaluations.estimate(values)
                row |= {f"{key}_mean": mean, f"{key}_sd": float(statistics.stdev(values)), f"{key}{ERROR}": error}
                row[key] = evaluations.with_error(mean, error)
        rows.append(row)
    if not rows:
        return
    page.say("## Over seeds", WHAT_SEEDS_SAY)
    page.csv("seeds", ["run", "seeds", *(f"{key}_{what}" for key in COLUMNS for what in ("mean", "sd", "se"))], rows)
    used = [key for key in ("run", "seeds", *COLUMNS) if any(key in row for row in rows)]
    page.say(markdown({key: key for key in used}, rows), "[seeds.csv](seeds.csv)")


def _run_row(run: Run, keys: Sequence[str], metrics: Sequence[str]) -> Row:
    row: Row = {"run": run.name, "state": run.state if run.metrics is not None else f"{run.state}, not evaluated"}
    row |= {key: run.metric(key) for key in (*STATEMENTS, *metrics)}
    return row | {f"set:{key}": setting_words.shown(run.settings[key]) for key in keys if key in run.settings}


def _with_errors(run: Run, row: Row) -> Row:
    """A row whose main metrics, and others with a standard error, are as the tables of `vae-ds compare` show them."""
    shown = [key for key in row if key in COLUMNS or is_number(run.metric(f"{key}{ERROR}"))]
    return row | {key: metric_tables.cell(run.metrics or {}, key) for key in shown if row[key] is not None}
