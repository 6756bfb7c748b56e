"""The numbers that papers on text VAEs print (`published.csv`), and the values that can be computed from them.

Each row was read in its source, and its remark says what is wrong with it: see docs/published.md. The rows are no
targets. Those of Park & Lee 2021 are its Tables 1 (Yahoo), 2 (PTB), 3 (Yelp) and 4 (SNLI); see docs/published-code.md.
"""

import csv
import math
from dataclasses import dataclass
from importlib import resources

PAPER = "Park & Lee 2021"
# What a number printed as -ELBO can be. In the last one, the printed KL is the mean over the layers' latent codes.
BOUND, PAPER_SIGN, LOST_SIGN, LAYER_MEAN = "rec + kl", "rec - kl", "kl - rec", "rec + kl / layers"


@dataclass(frozen=True)
class PublishedRow:
    """One printed row. Losses, KL and MI are in nats per sentence. None is a value that is not printed.

    `quoted_from`: the paper that the source took the row from; then no value is computed from the row.
    `nelbo_is`: what `nelbo_printed` is, in terms of the printed KL; empty if that is not known.
    `unit`: the tokens that `ppl` and `iw_ppl` count.
    `bound`: `yes` or `no`, whether `iw_nll`, `iw_ppl` and `nelbo_printed` are upper bounds by the public code and the
    arithmetic; `exact` for a language model.
    `code`: the public code that the remark rests on, as repository@commit:file and function.
    """

    corpus: str
    source: str
    table: str
    model: str
    language_model: bool
    quoted_from: str
    iw_nll: float | None
    rec_printed: float | None
    nelbo_printed: float | None
    nelbo_is: str
    kl: float | None
    mi: float | None
    au: int | None
    ppl: float | None
    iw_ppl: float | None
    unit: str
    bound: str
    code: str
    remark: str

    @property
    def rec(self) -> float | None:
        """The reconstruction loss in nats per sentence, from the printed -ELBO and KL."""
        if self.nelbo_printed is None or self.kl is None:
            return None
        if self.nelbo_is in (BOUND, LAYER_MEAN):
            return self.nelbo_printed - self.kl
        if self.nelbo_is == PAPER_SIGN:
            return self.nelbo_printed + self.kl
        return self.kl - self.nelbo_printed if self.nelbo_is == LOST_SIGN else None

    @property
    def nelbo(self) -> float | None:
        """-ELBO = rec + KL in nats per sentence; None where the KL of all latent codes together is not printed."""
        if self.rec is None or self.kl is None or self.nelbo_is == LAYER_MEAN:
            return None
        return self.rec + self.kl

    @property
    def tokens(self) -> float | None:
        """Tokens per sentence, computed from the row: -ELBO / ln PPL. With `iw_ppl` there are at most so many."""
        perplexity = self.iw_ppl if self.ppl is None else self.ppl
        return None if self.nelbo is None or perplexity is None else self.nelbo / math.log(perplexity)


def published_rows() -> list[PublishedRow]:
    """All rows: those of `PAPER` first, in its order."""
    text = (resources.files("vae_ds.studies.published") / "published.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [_row(cells) for cells in csv.DictReader(lines)]


def _row(cells: dict[str, str]) -> PublishedRow:
    return PublishedRow(
        corpus=cells["corpus"],
        source=cells["source"],
        table=cells["table"],
        model=cells["model"],
        language_model=cells["language_model"] == "1",
        quoted_from=cells["quoted_from"],
        iw_nll=_number(cells["iw_nll"]),
        rec_printed=_number(cells["rec_printed"]),
        nelbo_printed=_number(cells["nelbo_printed"]),
        nelbo_is=cells["nelbo_is"],
        kl=_number(cells["kl"]),
        mi=_number(cells["mi"]),
        au=int(cells["au"]) if cells["au"] else None,
        ppl=_number(cells["ppl"]),
        iw_ppl=_number(cells["iw_ppl"]),
        unit=cells["unit"],
        bound=cells["bound"],
        code=cells["code"],
        remark=cells["remark"],
    )


def _number(text: str) -> float | None:
    return float(text) if text else None
