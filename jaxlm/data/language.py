"""Which language a text is in, offline (lingua bundles its models)."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

from jaxlm.data.extras import library

MAX_CHARACTERS = 2000  # of the text that are looked at


@functools.cache
def _detector() -> Any:
    lingua = library("lingua")
    builder = lingua.LanguageDetectorBuilder.from_all_languages_without(lingua.Language.MALAY)
    return builder.with_low_accuracy_mode().build()


def language(text: str) -> str:
    """ISO 639-1 code; '' where no language is likely. Malay counts as Indonesian, from which it
    cannot be told in a paragraph."""
    plain = unicodedata.normalize("NFC", " ".join(text.split())[:MAX_CHARACTERS])
    found = _detector().detect_language_of(plain)
    return found.iso_code_639_1.name.lower() if found else ""
