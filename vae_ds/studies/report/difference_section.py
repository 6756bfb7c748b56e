"""The section of a report on the differences between runs, paired by sentence and by seed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vae_ds.runtime import evaluations
from vae_ds.studies import differences, runs
from vae_ds.studies.differences import MARK, QUANTITIES, Difference
from vae_ds.studies.metric_tables import ERROR
from vae_ds.studies.report.page import Page, Row, escape, markdown
from vae_ds.studies.runs import Run

WHAT_DIFFERENCES_SAY = f"""\
Each row is a run minus another run on the same sentences, in nats per sentence. For `nelbo`, `iw_nll` and `rec`, a
negative difference means that the run predicts the text better. `iw_nll` is compared on the sentences that both have;
for a plain language model it is exact. The comparisons are with the reference, which has the most common settings of
all runs with a code, and with the plain language model.

- One seed: mean ± standard error over the sentences. It covers the choice of the sentences. It does not cover other
  seeds, which would give other models.
- Several seeds: the mean over the seeds of the differences between runs of the same seed, ± the standard error over the
  S seeds, sd / √S. It does not cover the choice of the sentences.
- `{MARK}`: the difference is more than {differences.ERRORS:g} of these standard errors. Of runs that are equal on
  average, about 5% of the differences have this mark with one seed or many. With few seeds there are more: 30% with
  two, 18% with three, 12% with five."""
HEADS = {"run": "run", "to": "minus", "seeds": "seeds", "over": "± over"} | {name: name for name in QUANTITIES}


class _Pair(NamedTuple):
    """The directories of a run and of the run that it is compared with."""

    run: Path
    base: Path


@dataclass(frozen=True)
class _Comparison:
    """A row of the table, with a pair and the words for its seed for each seed."""

    name: str
    to: str
    pairs: dict[_Pair, str]


def difference_section(page: Page, groups: Mapping[str, Sequence[Run]]) -> None:
    """A table of the differences in each group of runs with the same data, and `differences.csv` with all of them.

    Raises CheckpointError for missing or broken values of a run.
    """
    tables = {name: _rows(members, page.split) for name, members in groups.items()}
    every = [{"data": name, **row} for name, rows in tables.items() for row in rows]
    if not every:
        return
    page.say("## Differences", WHAT_DIFFERENCES_SAY)
    for name, rows in tables.items():
        if rows and len(tables) > 1:
            page.say(f"### Differences: {escape(name)}")
        if rows:
            # A quantity that no row of the group has is left out.
            heads = {key: title for key, title in HEADS.items() if any(row.get(key) is not None for row in rows)}
            page.say(markdown(heads, rows))
    numbers = [f"{name}_{what}" for name in QUANTITIES for what in ("mean", "se", "count")]
    page.csv("differences", ["data", "run", "to", "seeds", "over", *numbers], every)
    page.say("[differences.csv](differences.csv)")


def _rows(members: Sequence[Run], split: str) -> list[Row]:
    comparisons = list(_comparisons([run for run in members if run.metrics is not None]))
    found = _measured([pair for one in comparisons for pair in one.pairs], split)
    return [_row(one, [found[pair] for pair in one.pairs]) for one in comparisons]


def _comparisons(evaluated: Sequence[Run]) -> Iterator[_Comparison]:
    """Each row of seeds with a code against the reference's, then each against the plain language model's."""
    latent = runs.by_seed([run for run in evaluated if not run.is_yardstick])
    plain = runs.by_seed([run for run in evaluated if run.is_yardstick])
    unchanged = runs.by_topic({run.name: run.settings for _, same in latent for run in same})[""]
    references = [row for row in latent if any(run.name in unchanged for run in row[1])]
    for to, bases in (*references[:1], *plain[:1]):
        for name, same in latent:
            if same is not bases:
                yield _Comparison(name, to, _paired_by_seed(same, bases))


def _paired_by_seed(same: Sequence[Run], bases: Sequence[Run]) -> dict[_Pair, str]:
    """The runs of the seeds that both have; the first run of each if they share no seed."""
    of_seed = {base.config.seed: base for base in bases}
    shared = {
        _Pair(run.path, of_seed[run.config.seed].path): str(run.config.seed)
        for run in same
        if run.config.seed in of_seed
    }
    run, base = same[0], bases[0]
    return shared or {_Pair(run.path, base.path): f"{run.config.seed} minus {base.config.seed}"}


def _measured(pairs: Sequence[_Pair], split: str) -> dict[_Pair, dict[str, Difference]]:
    """The differences of each pair. The values of two runs are in memory at a time."""
    found = {}
    for base in dict.fromkeys(pair.base for pair in pairs):
        of_base = evaluations.read_values(base, split)
        for pair in pairs:
            if pair.base == base:
                found[pair] = differences.of_sentences(evaluations.read_values(pair.run, split), of_base)
    return found


def _row(one: _Comparison, of_each_seed: Sequence[Mapping[str, Difference]]) -> Row:
    over = "seeds" if len(one.pairs) > 1 else "sentences"
    row: Row = {"run": one.name, "to": one.to, "seeds": ", ".join(one.pairs.values()), "over": over}
    for name, found in differences.over_seeds(of_each_seed).items():
        row |= {name: str(found), f"{name}_mean": found.mean, f"{name}{ERROR}": found.se, f"{name}_count": found.count}
    return row
