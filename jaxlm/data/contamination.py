"""Texts of evaluation sets inside training documents.

A document is contaminated if it holds `N` units of an evaluation text in a row (13 words, Brown et
al. 2020, appendix C; units are single letters where there are no spaces, and then `N_LETTERS`), or,
where an evaluation text is shorter, all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxlm.data.units import hashes, is_spaceless, units

N, N_LETTERS = 13, 26
MIN_UNITS = 4  # shorter texts are anywhere


@dataclass(frozen=True)
class Grams:
    """Hashes of runs of units, by their length."""

    by_length: dict[int, frozenset[int]]

    def found_in(self, text: str) -> bool:
        sequence = units(text)
        return any(not known.isdisjoint(hashes(sequence, n)) for n, known in self.by_length.items())


def grams(texts: Iterable[str]) -> Grams:
    """What to look for. Each line of an evaluation text counts for itself, too."""
    found: dict[int, set[int]] = {}
    for text in texts:
        for part in {text, *text.splitlines()}:
            sequence = units(part)
            n = min(len(sequence), N_LETTERS if is_spaceless(part) else N)
            if n >= MIN_UNITS:
                found.setdefault(n, set()).update(hashes(sequence, n))
    return Grams({n: frozenset(found[n]) for n in sorted(found)})


def leaked(texts: Sequence[str], documents: Iterable[str]) -> list[bool]:
    """Of each evaluation text, whether a document holds it."""
    of_each = [grams([text]).by_length for text in texts]
    wanted: dict[int, set[int]] = {}
    for own in of_each:
        for n, hashed in own.items():
            wanted.setdefault(n, set()).update(hashed)
    seen: dict[int, set[int]] = {n: set() for n in wanted}
    for document in documents:
        sequence = units(document)
        for n, known in wanted.items():
            seen[n] |= known.intersection(hashes(sequence, n))
    return [any(not seen[n].isdisjoint(known) for n, known in own.items()) for own in of_each]
