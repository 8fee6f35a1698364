"""An answer's text as its tokens come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlm.data.tokenizer import Tokenizer

BEFORE = 8  # tokens of the prompt that a token's text may depend on
_CUT = "\N{REPLACEMENT CHARACTER}"  # what decodes so may be a character's first bytes


class Writer:
    """`add` gives the text that is certain with each token, `rest` what was held back at the end.

    All pieces together are what `written.follows` says of the whole answer, before the first of
    `stops` in it; `stopped` tells that one was found.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = np.asarray(prompt)[-BEFORE:].tolist()
        self._begin, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        self._ids.append(token)
        new = self._new()
        if new.endswith(_CUT):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._let_go(new)

    def rest(self) -> str:
        """At the end of an answer that no stop string has ended."""
        text = self._let_go(self._new()) if self._read < len(self._ids) else ""
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _new(self) -> str:
        """Text of the tokens from `_read` on: some tokenizers drop the space before a first word,
        so that those before are decoded, too."""
        before = self._tokenizer.decode(self._ids[self._begin : self._read])
        whole = self._tokenizer.decode(self._ids[self._begin :])
        if whole.startswith(before):
            return whole[len(before) :]
        return self._tokenizer.decode(self._ids[self._read :])

    def _let_go(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of `text` that `stop` may begin with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
