"""The numbers that other papers print for the corpora of the runs, with a remark on each, and the runs beside them."""

from collections.abc import Sequence

from vae_ds.studies.published import PAPER, PublishedRow, published_rows
from vae_ds.studies.report.page import Page, Row
from vae_ds.studies.runs import Run

SHARED = ("iw_nll", "nelbo", "rec", "kl", "mi", "au", "ppl", "iw_ppl")
COLUMNS = {
    "run": "source or run",
    "model": "model",
    **{key: key for key in SHARED},
    "nelbo_printed": "-ELBO as printed",
    "unit": "PPL per",
    "bound": "bound",
    "remark": "remark",
}
WHAT_COMPARES = """\
Numbers that papers print for the corpora of these runs, one printed row a line. Losses, KL and MI are in nats per
sentence. The remark says what is wrong with a row, or what it counts. `nelbo` and `rec` are shown where they follow
from the print. `bound` says whether `iw_nll`, `iw_ppl` and the printed -ELBO are upper bounds: `no` is a number that is
none, and `exact` a language model. The sources are in the page `docs/published.md` of vae\\_ds. The public code of a
paper may differ from the code that made its numbers.

**Perplexities of other tokenisations, or on other test sentences, do not compare.** A perplexity per word is a number
of its own, and so is one per subword of each tokenizer. Nats per sentence compare only on the same test sentences, cut
at the same length. The name of a corpus does not ensure that. The language model of the same source is the measure for
its rows, as the yardstick is for your runs."""


def published_section(page: Page, every: Sequence[Run]) -> None:
    """A table for each corpus that both the runs and a published row have, without the rows of the paper's tables."""
    published = [row for row in published_rows() if row.source != PAPER]
    corpora = [name for name in dict.fromkeys(row.corpus for row in published) if name in map(_corpus, every)]
    if not corpora:
        return
    page.say("## Published numbers", WHAT_COMPARES)
    for corpus in corpora:
        page.say(f"### Published for `{corpus}`")
        theirs = [_printed_row(row) for row in published if row.corpus == corpus]
        page.table(
            f"published-{corpus}", COLUMNS, [*theirs, *(_own_row(run) for run in every if _corpus(run) == corpus)]
        )


def _corpus(run: Run) -> str:
    return run.config.data.corpus


def _printed_row(row: PublishedRow) -> Row:
    quoted = f", from {row.quoted_from}" if row.quoted_from else ""
    return {
        "run": f"{row.source}, {row.table}{quoted}",
        "model": row.model,
        **{key: getattr(row, key) for key in (*SHARED, "nelbo_printed", "unit", "bound", "remark")},
    }


def _own_row(run: Run) -> Row:
    state = f"not evaluated ({run.state})" if run.metrics is None else run.metric("verdict")
    return {
        "run": run.name,
        "model": "plain language model" if run.is_yardstick else None,
        **{key: run.metric(key) for key in SHARED},
        "unit": "word",
        "bound": None if run.metrics is None else "exact" if run.is_yardstick else "yes",
        "remark": state,
    }
