"""What stands in for words in any language: letters of scripts without spaces count one by one.

Rules and n-grams that count words would throw such languages away, or take a sentence for a word.
"""

from __future__ import annotations

import re
import unicodedata

# Kana, kanji, Thai, Lao, Khmer, Burmese, Tibetan: scripts that put no space between words.
_SPACELESS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
SPACELESS = re.compile(f"[{_SPACELESS}]")
UNIT = re.compile(rf"[{_SPACELESS}]|(?:(?![{_SPACELESS}_])\w)+")


def is_spaceless(text: str) -> bool:
    """Whether most of the letters belong to scripts without spaces between words."""
    spaceless = len(SPACELESS.findall(text))
    return 2 * spaceless > sum(c.isalpha() for c in text) > 0


def units(text: str) -> list[str]:
    """Words, and single letters of scripts without spaces; neither case nor width counts."""
    return UNIT.findall(unicodedata.normalize("NFKC", text).lower())


def hashes(sequence: list[str], n: int) -> list[int]:
    """64-bit hashes of all runs of `n` units."""
    from jaxlm.data.extras import library

    digest = library("xxhash").xxh3_64_intdigest
    return [digest("\0".join(sequence[i : i + n])) for i in range(len(sequence) - n + 1)]
