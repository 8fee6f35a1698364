"""Ladders and curves from planted laws, for tests of the fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.scaling import runs

BUDGETS = (3e11, 5.2e11, 9e11)
HELD_OUT = 3.6e12


@dataclass(frozen=True)
class Law:
    """L = E + A/N^alpha + B/D^beta with a loss of 1.79 at its best size, 75k, at 9e11 FLOPs."""

    E: float
    alpha: float
    beta: float

    @property
    def A(self) -> float:
        return (1.79 - self.E) * self.beta / (self.alpha + self.beta) * 75e3**self.alpha

    @property
    def B(self) -> float:
        return (1.79 - self.E) * self.alpha / (self.alpha + self.beta) * 2e6**self.beta

    @property
    def a(self) -> float:
        return self.beta / (self.alpha + self.beta)

    def loss(self, params: np.ndarray, flops: np.ndarray) -> np.ndarray:
        return self.E + self.A / params**self.alpha + self.B / (flops / 6 / params) ** self.beta

    def best_size(self, flops: float) -> float:
        return 75e3 * (flops / 9e11) ** self.a

    def best_loss(self, flops: float) -> float:
        return float(self.loss(np.array(self.best_size(flops)), np.array(flops)))


QUICK = Law(0.5, 0.36, 0.40)


def ladder(
    law: Law,
    noise: float = 0.0,
    seed: int = 0,
    budgets: Sequence[float] = BUDGETS,
    sizes: int = 4,
    replicates: int = 3,
) -> runs.Points:
    """Sizes from a third to three times the best at each budget; replicates at the cheapest."""
    params, flops = [], []
    for i, c in enumerate(budgets):
        row = law.best_size(c) * np.geomspace(1 / 3, 3, sizes)
        row = np.append(row, [row[1]] * (replicates if i == 0 else 0))
        params.append(row)
        flops.append(np.full(len(row), c))
    n, c = np.concatenate(params), np.concatenate(flops)
    error = noise * np.random.default_rng(seed).standard_normal(len(n))
    return runs.Points(n, c / 6 / n, c, law.loss(n, c) * np.exp(error))


def curves(points: runs.Points, law: Law, bump: float = 0.06) -> list[runs.Curve]:
    """Curves that lie `bump` above the law until 70 % of the run, then decay onto it."""
    share = np.linspace(0.02, 1, 100)
    raised = 1 + bump * np.clip((1 - share) / 0.3, 0, 1)
    return [
        runs.Curve(n, share * c, law.loss(np.array(n), share * c) * raised, name)
        for n, c, name in zip(points.params, points.flops, points.name, strict=True)
    ]
