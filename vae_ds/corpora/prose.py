"""English prose out of documentation markup: docstrings and comments to paragraphs, paragraphs to plain sentences.

A paragraph is one block of text with its inline markup resolved. Inline code that is no plain word keeps the mark
`CODE` in front of it, so that a sentence with an identifier can be told from a sentence of words.
"""

import inspect
import re
import unicodedata
from collections.abc import Iterator

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
_FIELD = re.compile(r"^[:@](?:param|parameter|arg|argument|key|keyword|return|returns|raise|raises|except|yield|yields"
                    r"|type|rtype|ivar|cvar|var|vartype)\b[^:]*:?\s*(.*)$")
_SECTION = re.compile(r"^(?:[A-Z][A-Za-z]+ ?){1,3}:$")
_NUMPY_ITEM = re.compile(r"^[\w*.,`\[\]' ]{1,60} : \S.*$")
_GOOGLE_ITEM = re.compile(r"^[-*]{0,2}\s*[`\w*.\[\]]+(?:, [`\w*.]+)*\s*(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?\s?(?::|--)\s*(.*)$")
_LABEL = re.compile(r"^(?:note|notes|warning|caution|important|tip|hint|remark|nb|n\.b\.|xxx|hack|fixme|todo)\b"
                    r"(?:\s?\([^)]*\))?(?:\s?\d+)?\s*:+\s*", re.IGNORECASE)

_ROLE = re.compile(r":[\w:+-]+:`([^`]*)`")
_LITERAL = re.compile(r"``([^`]+)``|`([^`]+)`_{0,2}")
_LINK = re.compile(r"!?\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])")
_FOOTNOTE = re.compile(r"\s?\[(?:\d+|#\w*|[A-Z]\w*\d+)\]_?")
_STRONG = re.compile(r"(?<![\w*])(\*{1,2})(\w[^*]*?)\1(?![\w*])")
_TITLE_AND_TARGET = re.compile(r"^(.*\S)\s*<[^>]*>$")
_PLAIN_CODE = re.compile(r"^(?:[a-z]{2,}|None|True|False|[A-Z][a-z]+)(?: [a-z]{2,})*$")
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " ",
                        "\u2011": "-", "\u200b": "", "\ufb01": "fi"})


def paragraphs(documentation: str) -> Iterator[str]:
    """The prose blocks of a docstring or a text file (reStructuredText, Google, NumPy or Markdown style), in order.

    Code, doctests, tables, headings, directives, signatures and the names and types of parameter lists are left out;
    the descriptions in parameter lists and bullets are blocks of their own.
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
    """Resolve inline markup: emphasis and links become their words, inline code becomes a word or is marked."""
    text = unicodedata.normalize("NFC", text).translate(_ASCII)
    text = _ROLE.sub(lambda match: _code(match[1]), text)
    text = _LITERAL.sub(lambda match: _code(match[1] or match[2]), text)
    text = _LINK.sub(r"\1", text)
    text = _FOOTNOTE.sub("", text)
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
    """Split a paragraph into sentences, punctuation kept; abbreviations and initials end none."""
    hidden = _ABBREVIATION.sub(lambda match: match[0].replace(".", _HIDDEN_DOT), paragraph)
    # An abbreviation that ends the paragraph ends its sentence too.
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(hidden)), len(hidden)]
    pieces = [hidden[start:end].strip() for start, end in zip(starts, starts[1:], strict=False)]
    return [piece.replace(_HIDDEN_DOT, ".") for piece in pieces if piece]


def loose_sentences(paragraph: str) -> list[str]:
    """Split at every full stop, colon, semicolon, exclamation and question mark: the finest sentences there may be."""
    return [piece for piece in _LOOSE_END.split(paragraph) if piece]


_ALLOWED = re.compile(r"^[A-Z][A-Za-z0-9 ,.;'\"()\-!?%]*[.!?][\")]?$")
_WORD = re.compile(r"^[a-z]+(?:-[a-z]+)*(?:'[a-z]{1,2})?$|^[a-z]+s'$")
_NAME = re.compile(r"^[A-Z][a-z]+(?:-[A-Z]?[a-z]+)*(?:'s)?$|^I(?:'[a-z]{1,2})?$|^A$")
_ACRONYM = re.compile(r"^[A-Z]{2,5}s?$")
_NUMBER = re.compile(r"^\d{1,4}(?:\.\d{1,2})?%?$|^\d{1,2}(?:st|nd|rd|th)$|^\d0s$")
_EDGES = "\"(),.;!?"
_FUNCTION_WORDS = frozenset(
    "a an the this that these those it its they them their he she his her we our you your i my is are was were be been"
    " being has have had do does did can could will would shall should may might must not no nor and or but if then"
    " than when where which who whom whose what how why while because so as at by for from in into of off on onto out"
    " over to up down with within without between through during before after above below under again once here there"
    " all any both each few more most other some such only own same too very also one two".split()
)
_LEGAL = re.compile(r"copyright|licen[sc]|warrant|redistribut|all rights|merchantab|liab(?:le|ility)", re.IGNORECASE)


def words_of(sentence: str) -> list[str]:
    """The white-space words of a sentence, without the punctuation around them."""
    return [word for raw in sentence.split() if (word := raw.strip(_EDGES))]


def is_plain(sentence: str) -> bool:
    """Whether a sentence is plain English prose: words, few names and numbers, no code, markup or fragments."""
    count = len(sentence.split())
    if not MIN_WORDS <= count <= MAX_WORDS or not _ALLOWED.match(sentence) or _LEGAL.search(sentence):
        return False
    if sentence.count("(") != sentence.count(")") or sentence.count('"') % 2 or "..." in sentence or "--" in sentence:
        return False
    first, *rest = sentence.split()
    if not _NAME.match(first.strip(_EDGES)) and not _ACRONYM.match(first.strip(_EDGES)):
        return False
    lower = names = acronyms = numbers = function = 0
    for raw in rest:
        word = raw.strip(_EDGES)
        if _WORD.match(word):
            if len(word) == 1 and word != "a":
                return False
            lower += 1
            function += word in _FUNCTION_WORDS
        elif _NAME.match(word):
            names += 1
        elif _ACRONYM.match(word):
            acronyms += 1
        elif _NUMBER.match(word):
            numbers += 1
        elif word in {"e.g", "i.e", "-"}:
            continue
        else:
            return False
    function += first.lower() in _FUNCTION_WORDS
    odd = names + acronyms + numbers
    return function >= max(1, 0.15 * count) and odd <= max(1, 0.2 * count) and acronyms <= 2 and numbers <= 2
