"""The published numbers: the form of the file, and arithmetic that shows what is wrong with the print."""

import csv
import math
import re
from collections import defaultdict
from importlib import resources
from typing import get_args

import pytest

from vae_ds.config.settings import DataConfig
from vae_ds.studies.published import BOUND, LAYER_MEAN, LOST_SIGN, PAPER, PAPER_SIGN, PublishedRow, published_rows

HE, HU = "He et al. 2019", "Hu et al. 2022"
LAYERS = 12  # of DELLA
TEST_SENTENCES = {"yelp": 10_000, "yahoo": 10_000, "ptb": 3_000}  # Table 7 of Hu et al. 2022
WORDS = {"yelp": 96, "yahoo": 79, "ptb": 21}  # average length in words, from the same table
BATCH = 32  # of the code of He et al. 2019
ROUNDING = 0.005  # of values with two printed decimals


def row(source: str, corpus: str, model: str, table: str = "") -> PublishedRow:
    (found,) = [
        row
        for row in published_rows()
        if (row.source, row.corpus) == (source, corpus) and model == row.model and table in row.table
    ]
    return found


def of_source(source: str) -> list[PublishedRow]:
    return [row for row in published_rows() if row.source == source]


def perplexity(row: PublishedRow) -> float:
    """The printed perplexity of a row, whatever it was computed from."""
    (printed,) = [value for value in (row.ppl, row.iw_ppl) if value is not None]
    return printed


# The form of the file


def test_every_row_says_where_it_is_from_what_it_counts_and_what_is_wrong() -> None:
    corpora = get_args(DataConfig.model_fields["corpus"].annotation)
    for row in published_rows():
        assert row.corpus in corpora
        assert re.fullmatch(r".+ \d{4}", row.source)
        assert re.fullmatch(r"Table \d|public log", row.table)
        assert row.unit in ("word", "GPT-2 subword", "T5 subword")
        assert row.remark.endswith(".")
        assert row.bound in ("yes", "no", "exact")
        assert (row.bound == "exact") is row.language_model
        # A statement on a model's numbers rests on its public code.
        assert row.language_model or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{10}:\S+( \S+)?", row.code), row.model
        assert row.nelbo_is in ("", BOUND, PAPER_SIGN, LOST_SIGN, LAYER_MEAN)
        # What is printed as -ELBO is known, or the row is a quotation.
        assert (row.nelbo_printed is not None and not row.quoted_from) is bool(row.nelbo_is), row.model
        assert any(value is not None for value in (row.iw_nll, row.nelbo_printed, row.ppl, row.iw_ppl))
        if row.language_model:
            assert (row.kl, row.mi, row.au, row.iw_ppl) == (None,) * 4


def test_every_printed_row_is_there_once() -> None:
    rows = published_rows()
    assert len({(row.source, row.table, row.corpus, row.model) for row in rows}) == len(rows) == 60
    text = (resources.files("vae_ds.studies.published") / "published.csv").read_text(encoding="utf-8")
    head, *lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == len(rows)
    for cells in csv.DictReader([head, *lines]):
        assert None not in cells.values(), cells  # too few cells
        assert None not in cells, cells  # too many


# Park & Lee 2021


def test_one_number_of_tokens_fits_each_data_set_of_the_paper() -> None:
    tokens = defaultdict(list)
    for row in of_source(PAPER):
        if row.tokens is not None:
            tokens[row.corpus].append(row.tokens)
    assert {corpus: len(found) for corpus, found in tokens.items()} == dict.fromkeys(tokens, 4)
    expected = {"yahoo": 113.0, "ptb": 26.45, "yelp": 131.7, "snli": 13.67}
    for corpus, found in tokens.items():
        assert found == pytest.approx([expected[corpus]] * 4, rel=1e-3)


def test_quoted_rows_and_gaps_of_the_print_stay_as_they_are() -> None:
    assert len(of_source(PAPER)) == 27
    quoted = row(PAPER, "yahoo", "Optimus lambda=0.5 (Li et al. 2020)")
    assert (quoted.nelbo_printed, quoted.rec, quoted.nelbo, quoted.tokens) == (301.21, None, None, None)
    assert row(PAPER, "ptb", "Max pool + Denoise").mi is None
    lost = row(PAPER, "snli", "Max pool + Denoise + KLT + Deep")
    assert lost.nelbo_printed == 43.77
    assert lost.rec == pytest.approx(74.95 - 43.77)


# Optimus, as quoted


def test_the_quotations_of_optimus_disagree() -> None:
    for corpus, name, theirs, ours in [("yahoo", "nelbo_printed", 301.21, 293.34), ("yelp", "mi", 9.13, 7.67)]:
        first = row(PAPER, corpus, "Optimus lambda=0.5 (Li et al. 2020)")
        second = row(HU, corpus, "Optimus lambda=0.5")
        assert first.quoted_from == second.quoted_from == "Li et al. 2020"
        assert (getattr(first, name), getattr(second, name)) == (theirs, ours)
        for same in {"nelbo_printed", "kl", "mi", "iw_ppl"} - {name}:
            assert getattr(first, same) == getattr(second, same)
        assert str(ours) in first.remark
        assert str(theirs) in second.remark


def test_a_lower_perplexity_of_other_tokens_is_no_better_bound() -> None:
    """SNLI: -ELBO in nats per sentence says the opposite of the perplexities, one per subword and one per word."""
    optimus = row(PAPER, "snli", "Optimus lambda=0.5 (Li et al. 2020)")
    lstm = row(PAPER, "snli", "Encoder pretraining lambda=3 (Li et al. 2019)")
    assert optimus.nelbo_printed is not None
    assert lstm.nelbo_printed is not None
    assert optimus.nelbo_printed - lstm.nelbo_printed == pytest.approx(4.63)
    assert perplexity(optimus) < perplexity(lstm)
    assert (optimus.unit, lstm.unit) == ("GPT-2 subword", "word")
    assert "4.63 nats" in optimus.remark


def test_the_begin_token_in_the_count_lowers_the_perplexity_of_optimus() -> None:
    """T tokens are counted and T - 1 predicted. -ELBO / ln PPL is at least T, because IW-NLL is at most -ELBO."""
    optimus = row(PAPER, "snli", "Optimus lambda=0.5 (Li et al. 2020)")
    assert optimus.nelbo_printed is not None
    tokens = optimus.nelbo_printed / math.log(perplexity(optimus))
    corrected = perplexity(optimus) ** (tokens / (tokens - 1))
    assert corrected == pytest.approx(20.8, abs=0.05)
    assert corrected > perplexity(row(PAPER, "snli", "GPT-2"))


# He et al. 2019


def test_the_public_log_of_he_et_al_is_the_printed_row() -> None:
    log, printed = (row(HE, "yelp", "Aggressive encoder", table) for table in ("public log", "Table 1"))
    for name in ("iw_nll", "kl", "mi"):
        assert round(getattr(log, name), 1) == getattr(printed, name)
    assert log.rec_printed is not None
    assert log.kl is not None
    assert log.rec_printed + log.kl == pytest.approx(log.nelbo_printed, abs=2e-4)
    assert log.rec == pytest.approx(log.rec_printed, abs=2e-4)
    # The log also prints the perplexity of -ELBO. Both give the words of a test sentence, with its end.
    assert log.iw_nll is not None
    words = log.iw_nll / math.log(perplexity(log))
    assert words == pytest.approx(log.nelbo_printed / math.log(40.6986), abs=1e-3)
    assert words == pytest.approx(96.66, abs=0.005)
    assert "96.66 words" in log.remark
    # exp(nats / words) is then the perplexity of the other rows: of the language model, and of the best row.
    best, model = (row(HE, "yelp", name).iw_nll for name in ("Aggressive encoder + annealing", "LSTM language model"))
    assert best is not None
    assert model is not None
    assert [math.exp(nats / words) for nats in (best, model)] == pytest.approx([39.73, 40.31], abs=0.01)


def test_mutual_information_in_batches_saturates() -> None:
    """With a KL of 18.7 nats, the MI of a batch is at its limit."""
    found = [row for row in of_source(HE) if row.mi is not None]
    assert len(found) == 11
    assert max(row.mi or 0 for row in found) < math.log(BATCH) < 3.5
    saturated = row(HE, "yahoo", "beta-VAE, beta 0.2")
    assert saturated.mi == pytest.approx(math.log(BATCH), abs=0.1)
    assert f"ln {BATCH} = {math.log(BATCH):.2f}" in saturated.remark


# Hu et al. 2022 (DELLA)


def test_a_mean_over_layers_is_no_bound() -> None:
    """If the printed KL is a mean over the layers, as in the public code, -ELBO has 11 such KL more than printed."""
    found = [row for row in of_source(HU) if row.nelbo_is == LAYER_MEAN]
    assert [row.corpus for row in found] == ["yahoo", "yelp", "ptb"]
    for della in found:
        assert (della.model, della.bound, della.nelbo) == ("DELLA", "no", None)
        assert della.rec is not None
        assert della.kl is not None
        assert f"-ELBO {della.rec + LAYERS * della.kl:.2f}." in della.remark
        others = [row.nelbo for row in of_source(HU) if row.corpus == della.corpus and row.nelbo is not None]
        assert della.rec + LAYERS * della.kl > 1.5 * max(others)


def test_the_mutual_information_of_della_exceeds_its_limit() -> None:
    """The estimate cannot exceed ln(sentences in the mixture), up to noise."""
    for corpus, sentences in TEST_SENTENCES.items():
        mi = row(HU, corpus, "DELLA").mi
        assert mi is not None
        assert mi > math.log(sentences) + 1
    for other in of_source(HU):
        if other.mi is not None and other.model not in ("DELLA", "Optimus lambda=0.5"):
            assert other.kl is not None
            assert other.mi <= other.kl + ROUNDING


def test_the_rows_of_a_table_of_hu_et_al_imply_other_numbers_of_tokens() -> None:
    """-ELBO / ln IW-PPL is an upper limit of the tokens of a sentence: one for all rows but that of DELLA."""
    expected = {"yelp": (109.2, 95.4), "yahoo": (92.5, 82.5), "ptb": (28.4, 25.1)}
    for corpus, (others, della) in expected.items():
        tokens = [row.tokens for row in of_source(HU) if row.corpus == corpus and row.tokens is not None]
        assert tokens == pytest.approx([others] * len(tokens), rel=6e-3)
        low = row(HU, corpus, "DELLA")
        assert low.nelbo_printed is not None
        assert low.nelbo_printed / math.log(perplexity(low)) == pytest.approx(della, abs=0.05)
    # A word has at least one token. So not even this limit fits the text.
    assert expected["yelp"][1] < WORDS["yelp"]
