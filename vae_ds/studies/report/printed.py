"""The paper's Tables 1 to 4 in their layout: its printed rows put right, and the runs beside them."""

from collections.abc import Sequence

from vae_ds.studies.paper import PrintedRow, printed_rows
from vae_ds.studies.report.page import Page, Row
from vae_ds.studies.runs import Run

PAPER = "paper"
TITLES = {"yahoo": "Yahoo", "ptb": "PTB", "yelp": "Yelp", "snli": "SNLI"}
# CSV column of a table in the paper's layout: its head in Markdown.
COLUMNS = {
    "run": "run",
    "model": "model",
    "ppl_subword": "PPL a subword ↓",
    "ppl": "PPL a word ↓",
    "kl": "KL",
    "paper_nelbo": "rec - KL",
    "rec": "rec",
    "nelbo": "-ELBO = rec + KL ↓",
    "mi": "MI ↑",
    "au": "AU ↑",
    "tokens_per_sentence": "tokens a sentence",
    "note": "note",
}
WHY_NO_TARGETS = """\
The rows marked `paper` are what the paper prints, and no targets. What it prints as -ELBO is rec - KL, not rec + KL:
the rows of a data set share one test split, and (rec + KL) / ln PPL gives them one number of tokens a sentence only
if rec is the printed number plus the KL. So a higher KL looked like a better bound. With the sign put right (`rec`,
`-ELBO = rec + KL` and `tokens a sentence` are computed here from the printed numbers) the 6-layer rows of a data set
have nearly the same rec, whatever their KL: the KL was paid, and the decoder did not use the code. The MI was computed
in batches of 256 and cannot pass ln 256 = 5.55. Rows that the paper quotes from elsewhere stand as printed, in their
sources' units, and nothing is computed from them.

For runs, `rec - KL` is there only to be set beside the print. The paper's PPL is a subword's, without the
end-of-sentence in the count of tokens; a run's counts it, and `PPL a word` is the one that `vae-ds evaluate` calls
`ppl`."""


def paper_tables(page: Page, every: Sequence[Run]) -> None:
    page.say("## The paper's tables", WHY_NO_TARGETS)
    printed = printed_rows()
    for number, corpus in dict.fromkeys((row.table, row.corpus) for row in printed):
        page.say(f"### Table {number}: {TITLES[corpus]}")
        own = [_own_row(run) for run in every if run.config.data.corpus == corpus]
        theirs = [_printed_row(row) for row in printed if row.table == number]
        page.table(f"table-{number}-{corpus}", COLUMNS, [*theirs, *own])
        if not own:
            page.say("None of the runs is on this data set.")
    others = [run for run in every if run.config.data.corpus not in TITLES]
    for corpus in dict.fromkeys(run.config.data.corpus for run in others):
        page.say(f"### In the same layout: `{corpus}`")
        page.table(f"table-{corpus}", COLUMNS, [_own_row(r) for r in others if r.config.data.corpus == corpus])


def _printed_row(row: PrintedRow) -> Row:
    note = "; ".join(filter(None, ("quoted baseline" if row.quoted else "", row.note)))
    return {
        "run": PAPER,
        "model": row.model,
        "ppl_subword": row.ppl,
        "kl": row.kl,
        "paper_nelbo": row.nelbo_printed,
        "rec": row.rec,
        "nelbo": row.nelbo,
        "mi": row.mi,
        "au": row.au,
        "tokens_per_sentence": row.tokens,
        "note": note or None,
    }


def _own_row(run: Run) -> Row:
    tokens, sentences = run.metric("tokens"), run.metric("sentences")
    own = {key: run.metric(key) for key in ("ppl_subword", "ppl", "kl", "paper_nelbo", "rec", "nelbo", "mi", "au")}
    return {
        "run": run.name,
        "model": _described(run),
        **own,
        "tokens_per_sentence": tokens / sentences if tokens and sentences else None,
        "note": f"not evaluated ({run.state})" if run.metrics is None else run.metric("verdict"),
    }


def _described(run: Run) -> str:
    """A run in the words of the paper's rows; of denoising and threshold, the last phase's."""
    model, last = run.config.model, run.config.phases[-1]
    if run.is_yardstick:
        return "plain language model"
    parts = [f"{model.pooling.capitalize()} pool"]
    parts += [f"Denoise {last.denoise:g}"] if last.denoise else []
    parts += [f"KLT {last.free_bits.nats:g} ({last.free_bits.mode})"] if last.free_bits.nats else []
    parts += [f"injection {model.injection}"] if model.injection != "cross_attention" else []
    return " + ".join(parts)
