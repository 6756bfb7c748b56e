"""Probabilistic context-free grammars without recursion, with factors and exact probabilities.

A rule may assign values to factors (`number`: `plural`). Each derivation assigns each factor exactly once. Thus a
derivation is a table of factors, the expected number of uses of a rule is a probability, and all quantities below are
finite sums. The probability of a sentence is that of its derivation; it is exact unless the grammar `is_ambiguous`.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

_Symbols = tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """An expansion of a symbol. `right`: symbols and words; `factors`: the (name, value) pairs that it assigns."""

    weight: float
    right: tuple[str, ...]
    factors: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Derivation:
    """The words of a sentence, the values of its factors and its log probability in nats."""

    words: tuple[str, ...]
    factors: Mapping[str, str]
    log_prob: float


class Grammar:
    """Rules by symbol. A name without rules is a word. Weights are relative to those of the same symbol.

    Raises ValueError for a recursive grammar, a weight that is not positive, rules of one symbol that do not assign the
    same factors, and a factor that is assigned twice.
    """

    def __init__(self, rules: Mapping[str, Sequence[Rule]], start: str) -> None:
        self.rules: dict[str, list[Rule]] = {}
        for symbol, own in rules.items():
            if not own or min(rule.weight for rule in own) <= 0:
                raise ValueError(f"{symbol}: needs at least one rule, each with a weight above 0")
            total = math.fsum(rule.weight for rule in own)
            self.rules[symbol] = [Rule(rule.weight / total, rule.right, rule.factors) for rule in own]
        self.start = start
        self._order = self._topological()
        self._known_steps: dict[_Symbols, list[tuple[str | None, tuple[int, ...], _Symbols]]] = {}
        self._limits = {
            symbol: list(accumulate(rule.weight for rule in own))[:-1] for symbol, own in self.rules.items()
        }
        decided: dict[str, list[str]] = {}
        for symbol in reversed(self._order):
            found = {tuple(sorted(self._decided(rule, decided))) for rule in self.rules[symbol]}
            if len(found) > 1:
                raise ValueError(f"{symbol}: all of its rules must assign the same factors; found {sorted(found)}")
            decided[symbol] = list(found.pop())
        self.factors = tuple(decided[start])
        if len(set(self.factors)) < len(self.factors):
            raise ValueError(f"each factor must be assigned once in a derivation; found {', '.join(self.factors)}")

    def entropy_nats(self) -> float:
        """Entropy of a derivation in closed form: for each symbol, that of its choice of a rule plus that of the parts.

        This is also the entropy of a sentence if no sentence has two derivations.
        """
        entropy: dict[str, float] = {}
        for symbol in reversed(self._order):
            entropy[symbol] = math.fsum(
                rule.weight * (-math.log(rule.weight) + math.fsum(entropy.get(part, 0.0) for part in rule.right))
                for rule in self.rules[symbol]
            )
        return entropy[self.start]

    def marginals(self) -> dict[str, dict[str, float]]:
        """The probability of each value of each factor."""
        found: dict[str, dict[str, float]] = {name: defaultdict(float) for name in self.factors}
        for symbol in self._order:
            for rule in self.rules[symbol]:
                for name, value in rule.factors:
                    found[name][value] += self._uses[symbol] * rule.weight
        return {name: dict(values) for name, values in found.items()}

    def factor_entropies(self) -> dict[str, float]:
        """Entropy of each factor in nats. The sum exceeds that of the sentence if factors depend on each other."""
        return {name: -math.fsum(p * math.log(p) for p in values.values()) for name, values in self.marginals().items()}

    def draw(self, random: np.random.Generator) -> Derivation:
        """Draw a derivation at random."""
        words: list[str] = []
        factors: dict[str, str] = {}
        log_prob = 0.0
        pending = [self.start]
        while pending:
            symbol = pending.pop()
            if symbol not in self.rules:
                words.append(symbol)
                continue
            rule = self.rules[symbol][bisect_right(self._limits[symbol], random.random())]
            log_prob += math.log(rule.weight)
            factors.update(rule.factors)
            pending.extend(reversed(rule.right))
        return Derivation(tuple(words), factors, log_prob)

    def parses(self, words: Sequence[str]) -> list[Derivation]:
        """All derivations of the words. The list is empty if the words are not a sentence of the grammar."""
        known: dict[tuple[str, int], list[_Part]] = {}
        whole = self._parts(self.start, tuple(words), 0, known)
        return [Derivation(tuple(words), dict(part.factors), part.log_prob) for part in whole if part.end == len(words)]

    def is_ambiguous(self) -> bool:
        """Whether any sentence has two derivations. Searches all pairs of derivations with the same words."""
        start: _Symbols = (self.start,)
        pending = {(start, start, False)}
        seen = set(pending)
        while pending:
            one, other, differ = pending.pop()
            for word, path, rest in self._steps(one):
                for other_word, other_path, other_rest in self._steps(other):
                    if word != other_word:
                        continue
                    pair = (rest, other_rest, differ or path != other_path)
                    if word is None and pair[2]:
                        return True
                    if word is not None and pair not in seen:
                        seen.add(pair)
                        pending.add(pair)
        return False

    def everything(self) -> Iterator[Derivation]:
        """All derivations; for small grammars only."""
        return (Derivation(words, dict(factors), log_prob) for words, factors, log_prob in self._all((self.start,)))

    @cached_property
    def _uses(self) -> dict[str, float]:
        """Expected number of uses of each symbol in a derivation."""
        uses: dict[str, float] = defaultdict(float)
        uses[self.start] = 1.0
        for symbol in self._order:
            for rule in self.rules[symbol]:
                for part in rule.right:
                    uses[part] += uses[symbol] * rule.weight
        return uses

    def _topological(self) -> list[str]:
        """The used symbols in topological order: each symbol before the symbols in its rules."""
        done: list[str] = []
        open_symbols: set[str] = set()

        def visit(symbol: str) -> None:
            if symbol in open_symbols:
                raise ValueError(f"{symbol}: its rules lead back to it; remove the recursion")
            if symbol in done or symbol not in self.rules:
                return
            open_symbols.add(symbol)
            for rule in self.rules[symbol]:
                for part in rule.right:
                    visit(part)
            open_symbols.remove(symbol)
            done.append(symbol)

        visit(self.start)
        return done[::-1]

    def _decided(self, rule: Rule, decided: Mapping[str, list[str]]) -> Iterable[str]:
        yield from (name for name, _ in rule.factors)
        for part in rule.right:
            yield from decided.get(part, ())

    def _steps(self, symbols: _Symbols) -> "list[tuple[str | None, tuple[int, ...], _Symbols]]":
        """Possible next steps: the next word (None at the end), the rules chosen to reach it, the remaining symbols."""
        if symbols not in self._known_steps:
            found: list[tuple[str | None, tuple[int, ...], _Symbols]] = []
            if not symbols:
                found = [(None, (), ())]
            elif symbols[0] not in self.rules:
                found = [(symbols[0], (), symbols[1:])]
            else:
                for number, rule in enumerate(self.rules[symbols[0]]):
                    found += [
                        (word, (number, *path), rest) for word, path, rest in self._steps(rule.right + symbols[1:])
                    ]
            self._known_steps[symbols] = found
        return self._known_steps[symbols]

    def _parts(
        self, symbol: str, words: tuple[str, ...], begin: int, known: "dict[tuple[str, int], list[_Part]]"
    ) -> "list[_Part]":
        """All readings of `symbol` that begin at word `begin`."""
        if symbol not in self.rules:
            return [_Part(begin + 1, (), 0.0)] if words[begin : begin + 1] == (symbol,) else []
        if (symbol, begin) not in known:
            found = []
            for rule in self.rules[symbol]:
                first = rule.right[0] if rule.right else symbol
                if first not in self.rules and words[begin : begin + 1] != (first,):
                    continue
                readings = [_Part(begin, rule.factors, math.log(rule.weight))]
                for part in rule.right:
                    readings = [
                        _Part(after.end, before.factors + after.factors, before.log_prob + after.log_prob)
                        for before in readings
                        for after in self._parts(part, words, before.end, known)
                    ]
                found += readings
            known[symbol, begin] = found
        return known[symbol, begin]

    def _all(self, symbols: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[tuple[str, str], ...], float]]:
        if not symbols:
            yield (), (), 0.0
            return
        first, rest = symbols[0], symbols[1:]
        if first not in self.rules:
            for words, factors, log_prob in self._all(rest):
                yield (first, *words), factors, log_prob
            return
        for rule in self.rules[first]:
            for words, factors, log_prob in self._all(rule.right + rest):
                yield words, rule.factors + factors, math.log(rule.weight) + log_prob


@dataclass(frozen=True)
class _Part:
    """A reading that ends before word `end`."""

    end: int
    factors: tuple[tuple[str, str], ...]
    log_prob: float
