"""The paper's Tables 1 to 4 in their layout, with corrected rows, and the runs beside them."""

from collections.abc import Sequence

from vae_ds.studies.published import PAPER, PublishedRow, published_rows
from vae_ds.studies.report.page import Page, Row
from vae_ds.studies.runs import Run

STUDY = "paper"
TITLES = {"yahoo": "Yahoo", "ptb": "PTB", "yelp": "Yelp", "snli": "SNLI"}
# The columns of a table in the paper's layout, in the CSV file and in Markdown.
COLUMNS = {
    "run": "run",
    "model": "model",
    "ppl_subword": "PPL per subword ↓",
    "ppl": "PPL per word ↓",
    "kl": "KL",
    "paper_nelbo": "rec - KL",
    "rec": "rec",
    "nelbo": "-ELBO = rec + KL ↓",
    "mi": "MI ↑",
    "au": "AU ↑",
    "tokens_per_sentence": "tokens per sentence",
    "note": "note",
}
WHY_NO_TARGETS = """\
The rows marked `paper` have the numbers that the paper prints (Park & Lee 2021). They are not targets, because the
number printed as -ELBO is rec - KL instead of rec + KL. This follows from the printed numbers: the rows of a data set
have the same test split, but (rec + KL) / ln PPL gives the same number of tokens per sentence for all of them only if
rec is the printed number plus the KL. With the wrong sign, a higher KL looked like a better bound.

Here the sign is corrected: `rec`, `-ELBO = rec + KL` and `tokens per sentence` are computed from the printed numbers.
The 6-layer rows of a data set then have nearly the same rec, whatever their KL. So these models paid for the KL, but
the decoder did not use the code. The MI was computed in batches of 256 sentences and cannot exceed ln 256 = 5.55.
Rows that the paper quotes from other papers are shown as printed, in the units of their sources; nothing is computed
from them.

For your runs, `rec - KL` is shown only for the comparison with the printed rows. The paper's PPL is per subword,
without the end-of-sentence token in the count; that of a run counts this token. `PPL per word` is the metric `ppl` of
`vae-ds evaluate`."""


def is_of_paper(run: Run) -> bool:
    """Whether a run is on a corpus of the paper, or belongs to the study `paper`."""
    return run.config.data.corpus in TITLES or run.config.name.startswith(f"{STUDY}-")


def paper_tables(page: Page, every: Sequence[Run]) -> None:
    page.say("## The paper's tables", WHY_NO_TARGETS)
    printed = [row for row in published_rows() if row.source == PAPER]
    for table, corpus in dict.fromkeys((row.table, row.corpus) for row in printed):
        page.say(f"### {table}: {TITLES[corpus]}")
        own = [_own_row(run) for run in every if run.config.data.corpus == corpus]
        theirs = [_printed_row(row) for row in printed if row.table == table]
        page.table(f"{table.lower().replace(' ', '-')}-{corpus}", COLUMNS, [*theirs, *own])
        if not own:
            page.say("None of the runs is on this data set.")
    others = [run for run in every if run.config.data.corpus not in TITLES]
    for corpus in dict.fromkeys(run.config.data.corpus for run in others):
        page.say(f"### In the same layout: `{corpus}`")
        page.table(f"table-{corpus}", COLUMNS, [_own_row(r) for r in others if r.config.data.corpus == corpus])


def _printed_row(row: PublishedRow) -> Row:
    return {
        "run": STUDY,
        "model": row.model,
        "ppl_subword": row.iw_ppl if row.ppl is None else row.ppl,
        "kl": row.kl,
        "paper_nelbo": row.nelbo_printed,
        "rec": row.rec,
        "nelbo": row.nelbo,
        "mi": row.mi,
        "au": row.au,
        "tokens_per_sentence": row.tokens,
        "note": f"Quoted baseline. {row.remark}" if row.quoted_from else row.remark,
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
    """A run as the paper describes its rows. Denoising and threshold are those of the last phase."""
    model, last = run.config.model, run.config.phases[-1]
    if run.is_yardstick:
        return "plain language model"
    parts = [f"{model.pooling.capitalize()} pool"]
    parts += [f"Denoise {last.denoise:g}"] if last.denoise else []
    parts += [f"KLT {last.free_bits.nats:g} ({last.free_bits.mode})"] if last.free_bits.nats else []
    parts += [f"injection {model.injection}"] if model.injection != "cross_attention" else []
    return " + ".join(parts)
