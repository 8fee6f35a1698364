"""A part of a split, the same for every run: what a run trains on that sees its text many times."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxlm.data.shuffle import indices
from jaxlm.data.windows import Dataset
from jaxlm.schema import UserError

_STREAM = 2**33  # of the order that a part is the beginning of: no run's own


@dataclass(frozen=True)
class Subset:
    """The first `len` windows of one fixed order of each source, so that a smaller part lies in a
    larger one; the sources keep their shares."""

    whole: Dataset
    size: int

    @property
    def sources(self) -> tuple[str, ...]:
        return self.whole.sources

    @cached_property
    def windows_of(self) -> dict[int, range]:
        """Source → the numbers of its windows, in here."""
        found, share = {}, self.size / len(self.whole)
        ends = [0, *np.cumsum([len(own) for own in self.whole.windows_of.values()])]
        for k, low, high in zip(self.whole.windows_of, ends, ends[1:], strict=False):
            found[k] = range(round(share * low), round(share * high))
        return found

    def __len__(self) -> int:
        return self.size

    def windows(self, numbers: np.ndarray) -> Any:
        """As `Dataset.windows`."""
        numbers = np.asarray(numbers, np.int64)
        there = np.empty_like(numbers)
        for k, mine in self.windows_of.items():
            own = self.whole.windows_of[k]
            here = (numbers >= mine.start) & (numbers < mine.stop)
            there[here] = own.start + indices(
                len(own), 0, numbers[here] - mine.start, stream=_STREAM + k
            )
        return self.whole.windows(there)


def of(whole: Dataset, unique_tokens: int | None) -> Dataset | Subset:
    """`whole`, or so many tokens of it. Raises UserError where it does not have them."""
    if unique_tokens is None:
        return whole
    size = unique_tokens // whole.seq_len
    if not 1 <= size <= len(whole):
        raise UserError(
            f"data.unique_tokens: expected {whole.seq_len:,} (one sequence) to"
            f" {len(whole) * whole.seq_len:,} (the train split), got {unique_tokens:,}"
        )
    return Subset(whole, size)
