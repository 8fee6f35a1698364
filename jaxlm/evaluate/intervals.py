"""How sure a score is: bootstrap intervals, and a paired test between two models.

A score is a function of the sum over items of a row of statistics: of an accuracy (right, 1), of
BLEU its n-gram counts, of a macro F1 the confusion matrix. Resampling items is then a product of
matrices, whatever the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
SWAPS = 9999


@dataclass(frozen=True)
class Scored:
    """A metric on n items."""

    statistics: np.ndarray  # float64 [n, k], one row per item
    of_sum: Callable[[np.ndarray], float]  # the metric of rows summed up, [k]

    @property
    def n(self) -> int:
        return len(self.statistics)

    @property
    def value(self) -> float:
        return float(self.of_sum(self.statistics.sum(axis=0)))


def mean_of(values: Any) -> Scored:
    """The mean of one number per item."""
    column = np.asarray(values, np.float64)
    pairs = np.stack([column, np.ones_like(column)], axis=1)
    return Scored(pairs, lambda s: s[0] / s[1])


def interval(scored: Scored, seed: int = 0, resamples: int = RESAMPLES) -> list[float] | None:
    """The 95 % percentile interval over resampled items (Efron 1979); None for fewer than two.

    Where every item gives the same number the interval has no width, however few they are.
    """
    if scored.n < 2:
        return None
    values = [scored.of_sum(c @ scored.statistics) for c in _draws(scored.n, seed, resamples)]
    return _middle(values)


def paired(
    a: Scored, b: Scored, seed: int = 0, resamples: int = RESAMPLES, swaps: int = SWAPS
) -> dict[str, Any]:
    """B minus A on the same items: {"difference", "ci95", "p", "n"}.

    The interval is over resampled items; `p` is two-sided, of the hypothesis that the two models'
    answers to an item may be swapped (approximate randomisation, Noreen 1989). Raises ValueError
    for sets of different size.
    """
    if a.n != b.n:
        raise ValueError(f"{a.n} and {b.n} items are not the same ones")
    difference = b.value - a.value
    found = {"difference": difference, "ci95": None, "p": None, "n": a.n}
    if a.n < 2:
        return found
    spread = [
        b.of_sum(c @ b.statistics) - a.of_sum(c @ a.statistics)
        for c in _draws(a.n, seed, resamples)
    ]
    rng, both, extreme = np.random.default_rng([seed, 1]), a.statistics + b.statistics, 0
    for _ in range(swaps):
        swapped = rng.integers(0, 2, a.n).astype(np.float64)
        first = swapped @ b.statistics + (1.0 - swapped) @ a.statistics
        other = both.sum(axis=0) - first
        extreme += abs(b.of_sum(other) - a.of_sum(first)) >= abs(difference) - 1e-12
    return found | {"ci95": _middle(spread), "p": (1 + extreme) / (1 + swaps)}


def _draws(n: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each item is drawn, float64 [n], resample by resample."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)


def _middle(values: list[float]) -> list[float]:
    return [float(x) for x in np.quantile(values, [0.025, 0.975])]
