"""Words of Japanese text, which has no spaces, by Sudachi and its own dictionary (extra `ja`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata

from jaxlm.data.extras import library

MAX_RUN = 8192  # characters: Sudachi takes 49,149 bytes at once
_RUN = re.compile(rf"[\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]{{1,{MAX_RUN}}}")


def segmenter() -> Callable[[str], list[str]]:
    """A function from a text to its words, which joined are the text. Raises UserError.

    Runs of kana and kanji are cut into words; what is between them stays whole.
    """
    sudachi = library("sudachipy", "ja")
    library("sudachidict_core", "ja")
    tokenizer = sudachi.Dictionary().create(sudachi.SplitMode.C)

    def words(text: str) -> list[str]:
        out, end = [], 0
        for run in _RUN.finditer(text):
            if run.start() > end:
                out.append(text[end : run.start()])
            out += [m.surface() for m in tokenizer.tokenize(run[0])]
            end = run.end()
        return out + ([text[end:]] if end < len(text) else [])

    return words


def version() -> str:
    """What decides the words."""
    names = ("sudachipy", "sudachidict_core")
    return " ".join(f"{n}=={metadata.version(n)}" for n in names)
