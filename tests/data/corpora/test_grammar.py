"""The grammar corpus: one derivation a sentence, exact probabilities and entropies, agreement, and the facts."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest

from vae_ds.config import DataConfig
from vae_ds.data import corpora
from vae_ds.data.corpora import grammar
from vae_ds.data.corpora.pcfg import Grammar, Rule
from vae_ds.distributed.randomness import stream
from vae_ds.errors import DataError

pytestmark = pytest.mark.timeout(240)

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def drawn():
    random = stream(7, "a test of the grammar")
    return [grammar.english().draw(random) for _ in range(20_000)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    data = DataConfig(
        corpus="grammar",
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        sentences={"train": 3000, "valid": 400, "test": 500},
    )
    corpora.check(data)
    return data, corpora.load(data)


# --- exact quantities -------------------------------------------------------------------------------------------------


def test_a_small_grammar_written_out_agrees_with_the_closed_forms():
    """The whole language of the shipped grammar with few words: the structure is the same."""
    small = grammar.english(1)
    every = list(small.everything())
    sentences = {grammar.text(one.words): one for one in every}
    assert len(sentences) == len(every)  # no sentence has two derivations
    # Determiners and adjective of the subject, tenses, negation, kinds of verb, the object's, place, time.
    assert len(every) == 9 * 2 * 3 * 2 * 4 * 9 * 2 * 2 * 2
    p = np.exp([one.log_prob for one in every])
    assert p.sum() == pytest.approx(1, abs=1e-9)
    assert -(p * np.log(p)).sum() == pytest.approx(small.entropy_nats(), abs=1e-9)
    for name, entropy in small.factor_entropies().items():
        mass: dict[str, float] = Counter()
        for one, probability in zip(every, p, strict=True):
            mass[one.factors[name]] += probability
        assert mass == pytest.approx(small.marginals()[name])
        assert entropy == pytest.approx(-sum(q * math.log(q) for q in mass.values()))


def test_the_entropy_is_that_of_a_sample(drawn):
    nll = -np.array([one.log_prob for one in drawn])
    error = nll.std() / len(nll) ** 0.5
    assert error < 0.05
    assert nll.mean() == pytest.approx(grammar.entropy_nats(), abs=4 * error)
    assert 18 < grammar.entropy_nats() < 25


def test_factor_entropies_are_those_of_a_sample(drawn):
    assert set(grammar.factor_entropies()) == set(drawn[0].factors)
    for name, entropy in grammar.factor_entropies().items():
        counts = np.array(list(Counter(one.factors[name] for one in drawn).values()))
        shares = counts / counts.sum()
        # What a sample's entropy lacks on average: Miller 1955.
        expected = -(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * len(drawn))
        assert entropy == pytest.approx(expected, abs=0.03), name
        assert set(grammar.english().marginals()[name]) >= {one.factors[name] for one in drawn}
    # Tense and time, verb and object, determiner and number depend on each other.
    assert sum(grammar.factor_entropies().values()) > grammar.entropy_nats() + 1


def test_a_sentence_has_one_derivation_and_it_is_the_one_drawn(drawn):
    for one in drawn[:400]:
        sentence = grammar.text(one.words)
        (parse,) = grammar.parses(sentence)
        assert parse.factors == one.factors
        assert grammar.factors(sentence) == one.factors
        assert grammar.log_prob(sentence) == pytest.approx(one.log_prob)


def test_no_sentence_of_the_whole_grammar_has_two_derivations():
    """Exactly: a search through all pairs of derivations, not a sample."""
    assert not grammar.english().is_ambiguous()


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "the farmer repaired the chair.",  # no capital
        "The farmer repaired the chair",
        "The farmer repaired  the chair.",
        "The farmer repair the chair.",
        "The farmers repairs the chair.",
        "The farmer will repaired the chair.",
        "The farmer repaired the chair tomorrow.",
        "The farmer repaired the letter.",
        "The farmer repaired the chair the.",
        "The farmer repaired many chair.",
    ],
)
def test_what_is_no_sentence_has_no_probability(sentence):
    assert grammar.log_prob(sentence) == -math.inf
    with pytest.raises(DataError, match="not a sentence of the grammar"):
        grammar.factors(sentence)


def test_factors_and_probability_by_hand():
    sentence = "The women did not carry a small knife near the river."
    assert grammar.factors(sentence) == {
        "subject": "woman",
        "subject_determiner": "the",
        "subject_adjective": "none",
        "number": "plural",
        "tense": "past",
        "negation": "yes",
        "verb": "carry",
        "object": "knife",
        "object_determiner": "a",
        "object_adjective": "small",
        "object_number": "singular",
        "preposition": "near",
        "place": "river",
        "time": "none",
    }
    # A verb, an adjective or a place more is a choice more.
    plain = "The women did not carry a knife."
    where = grammar.log_prob("The women did not carry a knife near the river.") - grammar.log_prob(plain)
    how = grammar.log_prob("The women did not carry a small knife.") - grammar.log_prob(plain)
    assert grammar.log_prob(sentence) == pytest.approx(grammar.log_prob(plain) + where + how)
    affirmed = grammar.log_prob("The women carried a knife.")
    assert affirmed - grammar.log_prob(plain) == pytest.approx(math.log(0.75 / 0.25))


# --- English ----------------------------------------------------------------------------------------------------------


def test_sentences_are_english(drawn):
    for one in drawn[:5000]:
        words, values = one.words, one.factors
        assert not any(word == "a" and after[0] in "aeiou" for word, after in itertools.pairwise(words))
        if values["tense"] == "present" and values["negation"] == "no":
            singular = values["number"] == "singular"
            verb = words[_verb_at(one)]
            assert verb.endswith("s") == singular, words
        if values["tense"] == "future":
            assert "will" in words
        assert ("not" in words) == (values["negation"] == "yes") or values["preposition"] == "not far from"
    every = {word for rules in grammar.english().rules.values() for rule in rules for word in rule.right}
    wrong = {"mans", "childs", "womans", "thiefs", "knifes", "wolfs", "mouses", "gooses", "shelfs", "buyed", "hided"}
    assert not every & (wrong | {"boies", "plaied", "potatos", "pianoes", "carryed", "writed", "pushs"})
    assert {"men", "children", "thieves", "knives", "potatoes", "pianos", "carried", "wrote", "pushes"} <= every


def _verb_at(one) -> int:
    """Determiner, perhaps an adjective, noun, then the verb."""
    return 2 + (one.factors["subject_adjective"] != "none")


# --- the corpus -------------------------------------------------------------------------------------------------------


def test_the_corpus_holds_its_factors_and_facts(loaded):
    data, corpus = loaded
    assert corpus.name == "grammar"
    assert {split: len(rows) for split, rows in corpus.splits.items()} == data.sentences
    for split in SPLITS:
        rows = corpus.splits[split]
        assert set(rows.column_names) == {"text", "log_prob", *grammar.factor_entropies()}
        for row in rows.select(range(30)):
            assert grammar.log_prob(row["text"]) == pytest.approx(row["log_prob"])
            assert grammar.factors(row["text"]) == {name: row[name] for name in grammar.factor_entropies()}
        facts = corpus.facts["splits"][split]
        texts = rows["text"][:]
        assert facts["sentences"] == len(texts)
        assert facts["distinct"] == len(set(texts))
        trained = set(corpus.splits["train"]["text"][:])
        assert facts["in_train"] == sum(text in trained for text in texts)
        assert facts["floor_nats"] == pytest.approx(-np.mean(rows["log_prob"][:]))
    assert corpus.facts["entropy_nats"] == grammar.entropy_nats()
    assert corpus.facts["factor_entropies_nats"] == grammar.factor_entropies()
    json.dumps(corpus.facts)


def test_the_corpus_is_a_function_of_its_settings(loaded, tmp_path):
    data, corpus = loaded
    again = corpora.load(data.model_copy(update={"cache_dir": str(tmp_path)}))
    assert again.fingerprint == corpus.fingerprint
    assert again.splits["test"]["text"][:] == corpus.splits["test"]["text"][:]
    # Written down: a change of the drawing is a change of every result on this corpus.
    assert corpus.splits["test"]["text"][0] == "Many friendly men write this strange message."
    other = corpora.load(data.model_copy(update={"seed": 1}))
    assert other.fingerprint != corpus.fingerprint
    assert other.splits["test"]["text"][:] != corpus.splits["test"]["text"][:]
    more = corpora.load(data.model_copy(update={"sentences": {"train": 3500, "valid": 400, "test": 500}}))
    assert more.splits["train"]["text"][:3000] == corpus.splits["train"]["text"][:]
    cut = corpora.load(data.model_copy(update={"limit": 50}))
    assert {len(rows) for rows in cut.splits.values()} == {50}
    assert cut.facts["splits"]["test"]["floor_nats"] == pytest.approx(-np.mean(cut.splits["test"]["log_prob"][:]))
    assert len({one.fingerprint for one in (corpus, other, more, cut)}) == 4


def test_numbers_of_sentences_are_checked():
    assert grammar._number(DataConfig(corpus="grammar", sentences={"train": 7}), "train") == 7
    assert grammar._number(DataConfig(corpus="grammar", sentences={"train": 7}), "test") == 2000
    for wrong in ({"train": 0}, {"dev": 5}):
        with pytest.raises(ValueError, match="`sentences` maps train, valid, test to numbers of at least 1"):
            DataConfig(corpus="grammar", sentences=wrong)


# --- grammars in general ----------------------------------------------------------------------------------------------


def test_what_is_no_grammar_is_refused():
    with pytest.raises(ValueError, match="lead back to it"):
        Grammar({"S": [Rule(1, ("a", "S")), Rule(1, ("a",))]}, "S")
    with pytest.raises(ValueError, match="must assign the same factors; found"):
        Grammar({"S": [Rule(1, ("a",), (("n", "1"),)), Rule(1, ("b",))]}, "S")
    with pytest.raises(ValueError, match="must be assigned once"):
        Grammar({"S": [Rule(1, ("A",), (("n", "1"),))], "A": [Rule(1, ("a",), (("n", "1"),))]}, "S")
    with pytest.raises(ValueError, match="a weight above 0"):
        Grammar({"S": [Rule(0, ("a",))]}, "S")


def test_two_derivations_are_both_found():
    twice = Grammar(
        {"S": [Rule(3, ("A", "B"))], "A": [Rule(1, ("x",)), Rule(1, ())], "B": [Rule(1, ("x",)), Rule(1, ())]}, "S"
    )
    assert twice.is_ambiguous()
    assert len(twice.parses(["x"])) == 2
    assert len(twice.parses(["x", "x"])) == len(twice.parses([])) == 1
    assert twice.parses(["y"]) == []
    once = Grammar({"S": [Rule(1, ("A", "B"))], "A": [Rule(1, ("x",)), Rule(1, ())], "B": [Rule(1, ("y",))]}, "S")
    assert not once.is_ambiguous()
    # The same words after other choices, several words on.
    late = {"S": [Rule(1, ("x", "A", "z")), Rule(1, ("x", "B"))], "A": [Rule(1, ("y",))], "B": [Rule(1, ("y", "z"))]}
    assert Grammar(late, "S").is_ambiguous()
    assert twice.entropy_nats() == pytest.approx(2 * math.log(2))
