"""Rules that tell prose from what a crawl leaves, in any language.

From Gopher (Rae et al. 2021, table A1), C4 (Raffel et al. 2020, §2.2) and FineWeb (Penedo et al.
2024, §3.6). What they say of words holds for languages with spaces only; Japanese, Chinese and Thai
are measured in characters. Source code has rules of its own (Chen et al. 2021, §3.1).
"""

from __future__ import annotations

import re
from collections import Counter

from jaxlm.data.suffixes import CODE_LANGUAGES
from jaxlm.data.units import is_spaceless, units

MIN_WORDS, MIN_CHARACTERS = 50, 100
MEAN_WORD = (3, 10)
MAX_SYMBOLS = 0.1  # '#' and '…' per word
MAX_BULLETS, MAX_ELLIPSES = 0.9, 0.3  # of lines
MIN_ALPHABETIC, MIN_LETTERS = 0.8, 0.5  # of words; of characters
MAX_REPEATED_LINES = 0.3
TOP_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}  # n → share of characters in the commonest n-gram
MAX_REPEATED_GRAMS = 0.3  # of runs of 10 characters, where there are no words
MIN_ENDED = 0.12  # of lines that end in a punctuation mark
MAX_SHORT, SHORT_LINE = 0.67, (30, 10)  # of lines; characters with and without words
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))

_ENDS = tuple(".!?。！？…」』”\"')）")
_BULLETS = ("•", "-", "*", "・", "●", "‣")
_PLACEHOLDERS = re.compile(r"lorem ipsum|enable javascript|javascript is disabled", re.I)


def fault(text: str, language: str) -> str:
    """Why a document is no good text, or ''."""
    if language in CODE_LANGUAGES:
        return _code(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if _PLACEHOLDERS.search(text):
        return "placeholder text"
    return _lines(lines, text) or (_letters(text) if is_spaceless(text) else _words(text, language))


def _code(text: str) -> str:
    lines = text.splitlines()
    if max(map(len, lines)) > 1000 or sum(map(len, lines)) / len(lines) > 100:
        return "lines too long for code"
    return "too few letters" if sum(c.isalnum() for c in text) < 0.25 * len(text) else ""


def _lines(lines: list[str], text: str) -> str:
    n = len(lines)
    if sum(line.startswith(_BULLETS) for line in lines) > MAX_BULLETS * n:
        return "mostly bullets"
    if sum(line.endswith(("…", "...")) for line in lines) > MAX_ELLIPSES * n:
        return "too many ellipses"
    if n > 3 and n - len(set(lines)) > MAX_REPEATED_LINES * n:
        return "repeated lines"
    if n > 3 and sum(line.endswith(_ENDS) for line in lines) < MIN_ENDED * n:
        return "few lines end a sentence"
    short = SHORT_LINE[is_spaceless(text)]
    if n > 3 and sum(len(line) < short for line in lines) > MAX_SHORT * n:
        return "mostly short lines"
    return ""


def _words(text: str, language: str) -> str:
    words = text.split()
    n = len(words)
    if n < MIN_WORDS:
        return "too short"
    if not MEAN_WORD[0] <= sum(map(len, words)) / n <= MEAN_WORD[1]:
        return "mean length of words"
    if text.count("#") + text.count("…") + text.count("...") > MAX_SYMBOLS * n:
        return "too many symbols"
    if sum(any(c.isalpha() for c in w) for w in words) < MIN_ALPHABETIC * n:
        return "too few letters"
    plain = units(text)
    if language == "en" and len(STOP_WORDS.intersection(plain)) < 2:
        return "no stop words"
    for size, share in TOP_GRAMS.items():
        grams = Counter(zip(*(plain[i:] for i in range(size)), strict=False))
        gram, times = max(grams.items(), key=lambda item: item[1])
        if times > 1 and times * sum(map(len, gram)) > share * sum(map(len, plain)):
            return "repeated phrase"
    return ""


def _letters(text: str) -> str:
    plain = "".join(units(text))
    if len(plain) < MIN_CHARACTERS:
        return "too short"
    if len(plain) < MIN_LETTERS * len("".join(text.split())):
        return "too few letters"
    grams = [plain[i : i + 10] for i in range(len(plain) - 9)]
    return (
        "repeated phrase" if len(grams) - len(set(grams)) > MAX_REPEATED_GRAMS * len(grams) else ""
    )
