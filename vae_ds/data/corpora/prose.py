"""Extract English prose from documentation markup: paragraphs from docstrings and comments, sentences from paragraphs.

A paragraph is one block of text without its inline markup. Inline code that is not a plain word keeps the mark `CODE`
before it, to distinguish sentences with identifiers from sentences of words only.
"""

import inspect
import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

from vae_ds.data.corpora.english import (
    DETERMINERS,
    FINITE,
    FUNCTION_WORDS,
    NEVER_LAST,
    NO_SUBJECT,
    PARTITIVE,
    SUBORDINATE,
    VERBS,
)

CODE = "\x01"
MIN_WORDS, MAX_WORDS = 4, 30

_HIDDEN_DOT = "\x02"
_ABBREVIATION = re.compile(
    r"\b(?:e\.\s?g|i\.\s?e|etc|vs|cf|et al|al|approx|resp|incl|ca|viz|fig|figs|eq|eqs|sec|ch|ref|refs|no|nos|vol|pp"
    r"|ed|eds|dr|mr|mrs|ms|prof|st|jr|inc|ltd|co|dept|univ|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|u\.s"
    r"|a\.k\.a|w\.r\.t|[a-z])\.",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9" + CODE + "])")
_LOOSE_END = re.compile(r"(?<=[.!?;:])[\"')\]]*\s+")

_UNDERLINE = re.compile(r"^([=\-~^*#+\"'.:_`])\1{2,}$")
_TABLE = re.compile(r"^(\||\+[-=+]+|={2,}\s+=|-{2,}\s+-|.*\S {3,}\S)")
_FENCE = re.compile(r"^(```|~~~)")
_DIRECTIVE = re.compile(r"^\.\.\s+(?:\|[^|]+\|\s+)?([\w:-]+)::\s*(.*)$")
_PROSE_DIRECTIVES = {"note", "warning", "tip", "caution", "important", "attention", "hint", "rubric", "seealso"}
_BULLET = re.compile(r"^(?:[-*+•o–]|\(?\d{1,2}[.)]|\(?[a-z]\))\s+(.*)$")
_FIELD = re.compile(
    r"^[:@](?:param|parameter|arg|argument|key|keyword|return|returns|raise|raises|except|yield|yields"
    r"|type|rtype|ivar|cvar|var|vartype)\b[^:]*:?\s*(.*)$"
)
_SECTION = re.compile(r"^(?:[A-Z][A-Za-z]+ ?){1,3}:$")
_NUMPY_ITEM = re.compile(r"^[\w*.,`\[\]' ]{1,60} : \S.*$")
_GOOGLE_ITEM = re.compile(
    r"^[-*]{0,2}\s*[`\w*.\[\]]+(?:, [`\w*.]+)*\s*(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?\s?(?::|--)\s*(.*)$"
)
_LABEL = re.compile(
    r"^(?:note|notes|warning|caution|important|tip|hint|remark|nb|n\.b\.|xxx|hack|fixme|todo)\b"
    r"(?:\s?\([^)]*\))?(?:\s?\d+)?\s*:+\s*",
    re.IGNORECASE,
)

_ROLE = re.compile(r":[\w:+-]+:`([^`]*)`")
_LITERAL = re.compile(r"``([^`]+)``|`([^`]+)`_{0,2}")
_LINK = re.compile(r"!?\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])")
_CITATION = re.compile(r"(\b(?:in|by|of|to|see|and|from|following|or))?\s?\[(?:\d+|#\w*|[A-Z]\w*\d+)\](?:_(?!\w))?")
_STRONG = re.compile(r"(?<![\w*])(\*{1,2})(\w[^*]*?)\1(?![\w*])")
_TITLE_AND_TARGET = re.compile(r"^(.*\S)\s*<[^>]*>$")
_PLAIN_CODE = re.compile(r"^(?:[a-z]{2,}|None|True|False|[A-Z][a-z]+)(?: [a-z]{2,})*$")
_ASCII = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " ", "\u2011": "-", "\u200b": ""}
)


def paragraphs(documentation: str) -> Iterator[str]:
    """The prose blocks of a docstring or a text file (reStructuredText, Google, NumPy or Markdown style), in order.

    Code, doctests, tables, headings, directives, signatures and the names and types in parameter lists are dropped.
    Each description in a parameter list and each bullet is a separate block.
    """
    held: list[str] = []
    indent = 0
    item = False
    skip_deeper_than: int | None = None
    fenced = doctest = False

    def flush() -> Iterator[str]:
        nonlocal item
        text = inline(" ".join(held))
        held.clear()
        item = False
        if text:
            yield text

    for raw in inspect.cleandoc(documentation).expandtabs().splitlines():
        line = raw.strip()
        depth = len(raw) - len(raw.lstrip())
        if _FENCE.match(line):
            fenced = not fenced
            yield from flush()
            continue
        if fenced:
            continue
        if not line:
            doctest = False
            literal = bool(held) and held[-1].endswith("::")
            if literal:
                skip_deeper_than = indent
            yield from flush()
            continue
        if skip_deeper_than is not None:
            if depth > skip_deeper_than:
                continue
            skip_deeper_than = None
        if doctest:
            continue
        if line.startswith((">>>", "In [", "Out[", "$ ", "% ", "#!")):
            doctest = True
            yield from flush()
            continue
        if _UNDERLINE.match(line):
            if held:
                held.pop()
            yield from flush()
            continue
        if line.startswith(".."):
            yield from flush()
            directive = _DIRECTIVE.match(line)
            if directive and directive[1] in _PROSE_DIRECTIVES:
                if directive[2]:
                    held.append(directive[2])
                    indent, item = depth, True
            else:
                skip_deeper_than = depth
            continue
        if _TABLE.match(line) or line.startswith("#") or _SECTION.match(line):
            yield from flush()
            continue
        field = _FIELD.match(line)
        bullet = _BULLET.match(line)
        starts = not held or depth != indent
        if field or bullet:
            yield from flush()
            held.append((field or bullet)[1])  # type: ignore[index]
            indent, item = depth, True
            continue
        if starts and _NUMPY_ITEM.match(line):
            yield from flush()
            continue
        google = _GOOGLE_ITEM.match(line) if not held or depth < indent or (item and depth <= indent) else None
        if google and not _LABEL.match(line) and depth > 0:
            yield from flush()
            if google[1]:
                held.append(google[1])
            indent, item = depth, True
            continue
        if held and (depth <= indent if item else depth != indent):
            yield from flush()
        if not held:
            indent = depth if not item else indent
        held.append(line)
    yield from flush()


def inline(text: str) -> str:
    """Resolve inline markup: emphasis and links become plain words; inline code becomes a word or is marked."""
    text = unicodedata.normalize("NFC", text).translate(_ASCII)
    text = _ROLE.sub(lambda match: _code(match[1]), text)
    text = _LITERAL.sub(lambda match: _code(match[1] or match[2]), text)
    text = _LINK.sub(r"\1", text)
    # Keep a mark for the citation in "the algorithm in [1]", since the sentence is incomplete without it.
    text = _CITATION.sub(lambda match: f"{match[1]} {CODE}[ref]" if match[1] else "", text)
    text = _STRONG.sub(r"\2", text)
    text = re.sub(r"\.{3,}", "...", text).removesuffix("::")
    return " ".join(_LABEL.sub("", text).split())


def _code(content: str) -> str:
    named = _TITLE_AND_TARGET.match(content)
    content = (named[1] if named else content).strip().removeprefix("~")
    if _PLAIN_CODE.match(content):
        return content
    return CODE + content.replace(" ", "")


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph into sentences and keep the punctuation. Abbreviations and initials do not end a sentence."""
    hidden = _ABBREVIATION.sub(lambda match: match[0].replace(".", _HIDDEN_DOT), paragraph)
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(hidden)), len(hidden)]
    pieces = [hidden[start:end].strip() for start, end in pairwise(starts)]
    return [piece.replace(_HIDDEN_DOT, ".") for piece in pieces if piece]


def loose_sentences(paragraph: str) -> list[str]:
    """Split a paragraph at every full stop, colon, semicolon, exclamation mark and question mark."""
    return [piece for piece in _LOOSE_END.split(paragraph) if piece]


_ALLOWED = re.compile(r"^[A-Z][A-Za-z0-9 ,.;'\"()\-!?%]*[.!?]\"?$")
_WORD = re.compile(r"^[a-z]+(?:-[a-z]+)*(?:'[a-z]{1,2})?$|^[a-z]+s'$")
_NAME = re.compile(r"^[A-Z][a-z]+(?:-[A-Z]?[a-z]+)*(?:'(?:s|t|re|ll|ve))?$|^I(?:'[a-z]{1,2})?$|^A$")
_ACRONYM = re.compile(r"^[A-Z]{2,5}s?$")
_NUMBER = re.compile(r"^\d{1,4}(?:\.\d{1,2})?%?$|^\d{1,2}(?:st|nd|rd|th)$|^\d0s$")
_INNER_END = re.compile(r"[.!?](?=\D)")
_LATIN = re.compile(r"\b(?:e\.g|i\.e|etc|vs|al)\.")
_EDGES = '"(),.;!?'
_PARENTHESIS = re.compile(r"\([^()]*\)")
_LEGAL = re.compile(
    r"copyright|licen[sc]|warrant|redistribut|all rights|merchantab|liab(?:le|ility)|lorem|\bTODO\b|\bFIXME\b",
    re.IGNORECASE,
)


def words_of(sentence: str) -> list[str]:
    """The whitespace words of a sentence, without the punctuation around them."""
    return [word for raw in sentence.split() if (word := raw.strip(_EDGES))]


def vocabulary(sentence: str) -> set[str]:
    """The lower-case words of a sentence, with compounds split. Names, acronyms and numbers are excluded."""
    words = [word for word in words_of(sentence) if word[0].islower() and word not in {"e.g", "i.e"}]
    return {part for word in words for part in word.split("'")[0].split("-") if part}


def is_plain(sentence: str) -> bool:
    """Whether a sentence is complete, plain English: words, few names and numbers, no code, markup or fragments."""
    raw = sentence.split()
    if not MIN_WORDS <= len(raw) <= MAX_WORDS or not _ALLOWED.match(sentence) or _LEGAL.search(sentence):
        return False
    if sentence.count("(") != sentence.count(")") or sentence.count('"') % 2 or "--" in sentence:
        return False
    if _INNER_END.search(_LATIN.sub("", sentence)[:-2]):
        return False
    words = [word.strip(_EDGES) for word in raw]
    if not (_NAME.match(words[0]) or _ACRONYM.match(words[0])):
        return False
    names = acronyms = numbers = 0
    for word in words[1:]:
        if _WORD.match(word):
            if len(word) == 1 and word != "a":
                return False
        elif _NAME.match(word):
            names += 1
        elif _ACRONYM.match(word):
            acronyms += 1
        elif _NUMBER.match(word):
            numbers += 1
        elif word not in {"e.g", "i.e", "-"}:
            return False
    odd = names + acronyms + numbers
    function = sum(word.lower() in FUNCTION_WORDS for word in words)
    if function < max(1, 0.15 * len(words)) or odd > max(1, 0.2 * len(words)) or acronyms > 2 or numbers > 2:
        return False
    return has_clause(sentence, words)


def has_clause(sentence: str, words: list[str]) -> bool:
    """Whether the sentence has a main clause: a finite verb or an imperative, according to lists of common verbs.

    "The size of the batch." and "If the file does not exist.", as in parameter lists, have no main clause.
    """
    first = words[0].lower()
    if words[-1].lower() in NEVER_LAST or (words[1] == "of" and first not in PARTITIVE):
        return False
    if first in SUBORDINATE and "," not in sentence and " then " not in sentence and not sentence.endswith("?"):
        return False
    if first in NO_SUBJECT and not sentence.endswith("?"):
        return False
    if first in VERBS or (first not in FUNCTION_WORDS and words[1] in DETERMINERS):
        return True
    outside = _PARENTHESIS.sub("", sentence).lower().split()
    return any(word.strip(_EDGES) in FINITE for word in outside)


_TIDY = re.compile(r"^[\"'(\[]?[A-Za-z][^{}<>=\\|@#$^~\n]*$")


def is_decent(sentence: str) -> bool:
    """Whether a sentence is suitable for language-model pretraining: 3 to 80 words, most of them English."""
    raw = sentence.replace(CODE, "").split()
    if not 3 <= len(raw) <= 80 or not sentence.isascii() or not _TIDY.match(sentence.lstrip(CODE)):
        return False
    if _LEGAL.search(sentence):
        return False
    edges = _EDGES + ":'[]"
    words = [word.strip(edges) for word in raw]
    good = sum(bool(_WORD.match(word) or _NAME.match(word) or _ACRONYM.match(word) or _NUMBER.match(word))
               for word in words)  # fmt: skip
    function = sum(word.lower() in FUNCTION_WORDS for word in words)
    if sentence[-1] not in '.!?:;)"' and (len(words) < 5 or good < 0.9 * len(words)):
        return False
    return good >= 0.8 * len(words) and function >= max(1, 0.12 * len(words))
