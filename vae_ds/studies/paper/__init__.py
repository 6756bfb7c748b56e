"""The printed rows of the paper's Tables 1 to 4 (`tables.csv`), and the values that can be computed from them.

Source: Park & Lee 2021, Tables 1 (Yahoo), 2 (PTB), 3 (Yelp) and 4 (SNLI). The rows are not targets: see
docs/published-code.md. The printed -ELBO is rec - KL: only then do the rows of one data set, which have the same test
split, agree on the number of tokens per sentence.
"""

import csv
import math
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class PrintedRow:
    """One printed row, in nats per sentence and perplexity per subword. None is a value that is not printed.

    `quoted`: the paper took the row from another paper, so no value is computed from it. `nelbo_meant` differs from
    `nelbo_printed` where the printed number has lost a minus sign.
    """

    table: int
    corpus: str
    model: str
    ppl: float | None
    kl: float | None
    nelbo_printed: float | None
    nelbo_meant: float | None
    mi: float | None
    au: int | None
    quoted: bool
    note: str

    @property
    def rec(self) -> float | None:
        """The reconstruction loss in nats per sentence: the printed -ELBO plus the KL."""
        if self.quoted or self.nelbo_meant is None or self.kl is None:
            return None
        return self.nelbo_meant + self.kl

    @property
    def nelbo(self) -> float | None:
        """The correct -ELBO, rec + KL, in nats per sentence."""
        return None if self.rec is None or self.kl is None else self.rec + self.kl

    @property
    def tokens(self) -> float | None:
        """Subword tokens per sentence, computed from the row: (rec + KL) / ln PPL."""
        return None if self.nelbo is None or self.ppl is None else self.nelbo / math.log(self.ppl)


def printed_rows() -> list[PrintedRow]:
    """All rows, in the order of the paper."""
    text = (resources.files("vae_ds.studies.paper") / "tables.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [_row(cells) for cells in csv.DictReader(lines)]


def _row(cells: dict[str, str]) -> PrintedRow:
    printed = _number(cells["nelbo_printed"])
    meant = _number(cells["nelbo_meant"])
    return PrintedRow(
        table=int(cells["table"]),
        corpus=cells["corpus"],
        model=cells["model"],
        ppl=_number(cells["ppl"]),
        kl=_number(cells["kl"]),
        nelbo_printed=printed,
        nelbo_meant=printed if meant is None else meant,
        mi=_number(cells["mi"]),
        au=int(cells["au"]) if cells["au"] else None,
        quoted=cells["quoted"] == "1",
        note=cells["note"],
    )


def _number(text: str) -> float | None:
    return float(text) if text else None
