"""The `grammar` corpus: English-like sentences whose true probability, entropy and factors are known exactly.

The sentences are drawn from a probabilistic context-free grammar without recursion. A subject acts on an object,
optionally with a place and a time. Subject and verb agree, the time fits the tense, and the object fits the verb. No
sentence has two derivations. Therefore `log_prob` is exact, and `entropy_nats` is the lowest average loss that a model
can reach. Each choice in a derivation (number, tense, verb, ...) is a factor of the sentence, which a latent code may
or may not contain.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from vae_ds.config import SPLITS, DataConfig
from vae_ds.data.cache import cache_dir, digest, make_folder, read_rows, write_rows
from vae_ds.data.corpora.corpus import Corpus, limited
from vae_ds.data.corpora.pcfg import Derivation, Grammar, Rule
from vae_ds.data.progress import progress
from vae_ds.distributed import stream
from vae_ds.errors import DataError

NONE = "none"  # value of a factor that a sentence does not express
LOG_PROB = "log_prob"  # the column of exact log probabilities, in nats
DEFAULT_SENTENCES: dict[str, int] = DataConfig.model_fields["sentences"].default
_LAYOUT = "1"  # of the cached files

# Words that may follow "a" begin with a consonant. word:form gives an irregular plural or past.
_PEOPLE = """
    farmer teacher man:men woman:women child:children nurse sailor girl boy doctor king queen baker student soldier
    writer painter neighbour mother father sister brother captain judge driver gardener hunter singer lawyer tailor
    waiter plumber builder banker prince cousin pilot monk poet thief:thieves tourist visitor manager clerk dancer
    musician scientist shepherd
"""
_PEOPLE_ARE = """
    tired young clever happy quiet brave tall polite rich famous lonely careful proud stubborn cheerful friendly hungry
    nervous lazy patient
"""
# Verbs, their objects, and the adjectives of these objects. A verb is in one row only, and its past differs from its
# base form.
_DEEDS = {
    "thing": (
        "repair paint carry sell:sold clean build:built borrow steal:stole move hide:hid find:found buy:bought"
        " lose:lost drop:dropped polish break:broke lift push",
        "chair table bicycle clock lamp boat car piano:pianos guitar camera door window ladder basket bottle box mirror"
        " suitcase wagon bucket kettle radio:radios shovel hammer tent blanket coat hat ring key knife:knives drum"
        " tractor barrel vase pillow carpet curtain sofa shelf:shelves",
        "small red heavy new wooden cheap dirty beautiful green blue golden rusty large strange modern tiny shiny"
        " forgotten broken precious",
    ),
    "text": (
        "write:wrote translate publish copy study quote print sign burn memorise recite forget:forgot destroy correct",
        "letter book poem story newspaper song diary recipe contract report novel message postcard manual speech map"
        " ticket law prayer riddle biography",
        "long short funny boring secret famous strange sad new difficult serious beautiful mysterious private",
    ),
    "food": (
        "cook eat:ate taste bake serve slice boil fry prepare share swallow order refuse",
        "cake potato tomato sandwich pancake carrot pizza cookie sausage pie banana lemon pear cherry peach mushroom"
        " dumpling biscuit waffle pepper turnip radish",
        "sweet warm cold fresh sour burnt spicy delicious large small salty bitter healthy frozen",
    ),
    "being": (
        "see:saw follow meet:met help visit greet chase feed:fed call watch know:knew admire trust hear:heard warn"
        " thank invite scold",
        "dog cat horse bird rabbit goat fox wolf:wolves bear mouse:mice duck goose:geese cow pig stranger baby donkey"
        " squirrel monkey tiger lion parrot pony hen",
        "brown white black wild hungry small big gentle clever lost frightened noisy grey loyal sleepy young",
    ),
}
_PREPOSITIONS = ("near", "behind", "beside", "in front of", "not far from")
_PLACES = """
    river school church bridge station library museum harbour castle hospital bakery garden theatre lighthouse factory
    temple market forest tower fountain prison stadium
"""
_TIMES = {
    "past": ("yesterday", "last week", "last winter", "on that morning", "after the storm", "a year ago"),
    "present": ("every day", "every morning", "at night", "on market days", "before dinner", "in summer"),
    "future": ("tomorrow", "next week", "next spring", "in a few days", "before long", "by the evening"),
}
_TENSES = {"past": 5, "present": 3, "future": 2}
_NUMBERS = {"singular": 3, "plural": 2}
_DETERMINERS = {
    "singular": {"the": 5, "a": 4, "this": 1, "every": 1},
    "plural": {"the": 5, "some": 3, "these": 1, "many": 1, "two": 1},
}
_CLASSES = {"thing": 4, "text": 2, "food": 2, "being": 3}
_NEGATED, _ADJECTIVE, _PLACE, _TIME = 0.25, 0.45, 0.5, 0.4  # probabilities


def load(data: DataConfig) -> Corpus:
    """Load sentences drawn independently for each split, so that some are repeated.

    The data set has a column for each factor, and `log_prob`. Facts: `entropy_nats` of the grammar and
    `factor_entropies_nats`; and for each split the number of `sentences`, of `distinct` sentences, of sentences that
    are also `in_train`, and `floor_nats`. The last is the mean of -log p, the NLL of the true model on this split. The
    sentences are drawn once into the cache. Raises DataError if the cache cannot be written.
    """
    rows = {split: limited(_rows(data, split), data.limit) for split in SPLITS}
    numbers = [str(_number(data, split)) for split in SPLITS]
    facts = {
        "entropy_nats": entropy_nats(),
        "factor_entropies_nats": factor_entropies(),
        "splits": {split: _facts(part, rows["train"]) for split, part in rows.items()},
    }
    return Corpus("grammar", digest([_LAYOUT, _signature(), str(data.seed), str(data.limit), *numbers]), rows, facts)


def check(data: DataConfig) -> None:
    """Check that the cache is writable. Raises DataError."""
    make_folder(cache_dir(data.cache_dir) / "grammar")


def entropy_nats() -> float:
    """Entropy of a sentence, in nats, in closed form."""
    return english().entropy_nats()


def factor_entropies() -> dict[str, float]:
    """Entropy of each factor, in nats.

    The sum exceeds the entropy of a sentence, because tense and time depend on each other, as do verb and object.
    """
    return english().factor_entropies()


def log_prob(sentence: str) -> float:
    """Natural logarithm of the probability of a sentence; minus infinity if the grammar does not generate it."""
    found = parses(sentence)
    return found[0].log_prob if found else -float("inf")


def factors(sentence: str) -> dict[str, str]:
    """The value of each factor of a sentence. Raises DataError if the grammar does not generate it."""
    found = parses(sentence)
    if not found:
        raise DataError(f"not a sentence of the grammar: {sentence[:200]!r}")
    return dict(found[0].factors)


def parses(sentence: str) -> list[Derivation]:
    """The derivations of a sentence: one, or none if the grammar does not generate it."""
    plain = sentence[:1].lower() + sentence[1:].removesuffix(".")
    found = english().parses(plain.split(" "))
    return found if found and text(found[0].words) == sentence else []


def text(words: tuple[str, ...]) -> str:
    """The words joined to a sentence, with a capital letter and a full stop."""
    line = " ".join(words)
    return f"{line[:1].upper()}{line[1:]}."


@cache
def english(words_a_kind: int | None = None) -> Grammar:
    """The grammar. `words_a_kind` keeps only so many words of each kind; then all sentences can be enumerated."""
    rules: dict[str, list[Rule]] = {
        "S": [
            Rule(weight, (f"subject {number}", f"predicate {number}"), (("number", number),))
            for number, weight in _NUMBERS.items()
        ],
        "place": [
            Rule(1 - _PLACE, (), (("preposition", NONE), ("place", NONE))),
            Rule(_PLACE, ("preposition", "the", "location")),
        ],
        "preposition": _words("preposition", [(word, word) for word in _PREPOSITIONS[:words_a_kind]]),
        "location": _words("place", [(word, word) for word, _ in _entries(_PLACES, words_a_kind)]),
    }
    people = _entries(_PEOPLE, words_a_kind)
    rules |= _phrases("subject", "subject", people, _entries(_PEOPLE_ARE, words_a_kind))
    for kind, (verbs, nouns, adjectives) in _DEEDS.items():
        rules |= _phrases(f"{kind} object", "object", _entries(nouns, words_a_kind), _entries(adjectives, words_a_kind))
        rules[f"{kind} object"] = [
            Rule(weight, (f"{kind} object {number}",), (("object_number", number),))
            for number, weight in _NUMBERS.items()
        ]
        entries = _entries(verbs, words_a_kind)
        for form, inflect in {"base": lambda verb, _: verb, "s": lambda verb, _: _with_s(verb), "past": _past}.items():
            rules[f"{kind} verb {form}"] = _words("verb", [(verb, inflect(verb, own)) for verb, own in entries])
    for form in ("base", "s", "past"):
        rules[f"deed {form}"] = [
            Rule(weight, (f"{kind} verb {form}", f"{kind} object")) for kind, weight in _CLASSES.items()
        ]
    for tense, times in _TIMES.items():
        rules[f"time {tense}"] = [
            Rule(1 - _TIME, (), (("time", NONE),)),
            *(_scaled(rule, _TIME) for rule in _words("time", [(time, time) for time in times[:words_a_kind]])),
        ]
    for number in _NUMBERS:
        rules[f"predicate {number}"] = [
            Rule(
                weight * (_NEGATED if negated else 1 - _NEGATED),
                (*_verb(number, tense, negated), "place", f"time {tense}"),
                (("tense", tense), ("negation", "yes" if negated else "no")),
            )
            for tense, weight in _TENSES.items()
            for negated in (False, True)
        ]
    return Grammar(rules, "S")


def _verb(number: str, tense: str, negated: bool) -> tuple[str, ...]:
    """The verb with its object, and the auxiliaries that number, tense and negation require."""
    no = ("not",) if negated else ()
    if tense == "future":
        return ("will", *no, "deed base")
    if tense == "past":
        return ("did", *no, "deed base") if negated else ("deed past",)
    if negated:
        return ("does" if number == "singular" else "do", *no, "deed base")
    return ("deed s",) if number == "singular" else ("deed base",)


def _phrases(symbol: str, factor: str, nouns: list[tuple[str, str]], adjectives: list[tuple[str, str]]) -> Any:
    """Determiner, optional adjective and noun, in the singular and in the plural."""
    none = Rule(1 - _ADJECTIVE, (), ((f"{factor}_adjective", NONE),))
    some = _words(f"{factor}_adjective", [(word, word) for word, _ in adjectives])
    rules = {f"{symbol} adjective": [none, *(_scaled(rule, _ADJECTIVE) for rule in some)]}
    for number, determiners in _DETERMINERS.items():
        name = f"{symbol} {number}"
        rules[name] = [Rule(1, (f"{factor} determiner {number}", f"{symbol} adjective", f"{name} noun"))]
        rules[f"{factor} determiner {number}"] = [
            Rule(weight, (word,), ((f"{factor}_determiner", word),)) for word, weight in determiners.items()
        ]
        forms = [(noun, noun if number == "singular" else own or _with_s(noun)) for noun, own in nouns]
        rules[f"{name} noun"] = _words(factor, forms)
    return rules


def _words(factor: str, forms: list[tuple[str, str]]) -> list[Rule]:
    """A rule for each (value, form). The weights follow Zipf's law, shifted by 5, and sum to 1."""
    weights = 1 / (np.arange(len(forms)) + 5.0)
    weights /= weights.sum()
    return [
        Rule(float(weight), tuple(form.split()), ((factor, value),))
        for weight, (value, form) in zip(weights, forms, strict=True)
    ]


def _scaled(rule: Rule, by: float) -> Rule:
    return Rule(rule.weight * by, rule.right, rule.factors)


def _entries(listed: str, first: int | None) -> list[tuple[str, str]]:
    """(word, irregular form or empty string) for each entry of a list."""
    return [(word, own) for word, _, own in (entry.partition(":") for entry in listed.split()[:first])]


def _with_s(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "sh", "ch", "x", "o")) else f"{word}s"


def _past(verb: str, own: str) -> str:
    if own:
        return own
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ied"
    return f"{verb}d" if verb.endswith("e") else f"{verb}ed"


def _signature() -> str:
    return repr(sorted(english().rules.items()))


def _number(data: DataConfig, split: str) -> int:
    return {**DEFAULT_SENTENCES, **data.sentences}[split]


def _rows(data: DataConfig, split: str) -> Dataset:
    number = _number(data, split)
    key = digest([_LAYOUT, _signature(), str(data.seed), split, str(number)])
    cached = cache_dir(data.cache_dir) / "grammar" / f"{split}-{key}.arrow"
    names = english().factors
    if not cached.is_file():
        strings = [("text", pa.large_string()), *((name, pa.string()) for name in names)]
        rows = progress(_drawn(data.seed, split, number), f"Drawing {split} from the grammar", number)
        write_rows(cached, rows, pa.schema([*strings, (LOG_PROB, pa.float64())]))
    return read_rows(cached)


def _drawn(seed: int, split: str, number: int) -> Iterator[tuple[Any, ...]]:
    random = stream(seed, "grammar", split)
    names = english().factors
    for _ in range(number):
        drawn = english().draw(random)
        yield text(drawn.words), *(drawn.factors[name] for name in names), drawn.log_prob


def _facts(part: Dataset, train: Dataset) -> dict[str, Any]:
    table = part.select_columns(["text", LOG_PROB]).with_format("arrow")[:]
    known = train.select_columns(["text"]).with_format("arrow")[:].column("text").combine_chunks()
    return {
        "sentences": len(part),
        "distinct": pc.count_distinct(table.column("text")).as_py(),
        "in_train": pc.sum(pc.is_in(table.column("text"), value_set=known)).as_py(),
        "floor_nats": -pc.mean(table.column(LOG_PROB)).as_py(),
    }
