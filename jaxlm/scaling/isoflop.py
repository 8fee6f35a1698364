"""IsoFLOP slices: the runs of one compute budget and the parabola through them.

Approach 2 reads minima off the parabolas; approach 1 borrows the noise and the curvature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.scaling.runs import Points

BUDGET_WIDTH = 1.1  # runs within 10 % of compute share a budget, unless the table says otherwise
OWN_NOISE_DOF = 5  # from this on a slice's scatter is its own, below it is pooled with the others
ASSUMED_NOISE = 0.01  # of a loss, where neither replicates nor spare points can tell


@dataclass(frozen=True)
class Slice:
    """One budget: `rows` of the table, ln N about `center`, and loss = c0 + c1 x + c2 x^2."""

    flops: float
    rows: np.ndarray
    center: float
    design: np.ndarray  # [n, 3]
    solver: np.ndarray  # [3, n]: coefficients = solver @ loss
    coefficients: np.ndarray  # [3], about the center
    loss: np.ndarray  # [n]

    @property
    def fitted(self) -> np.ndarray:
        return self.design @ self.coefficients

    @property
    def minimum(self) -> tuple[float, float]:
        """(x, loss) of the vertex, x about the center."""
        x, loss = vertex(self.coefficients)
        return float(x), float(loss)

    @property
    def uncentred(self) -> list[float]:
        """Coefficients in ln N itself."""
        c0, c1, c2 = self.coefficients
        m = self.center
        return [float(c0 - c1 * m + c2 * m * m), float(c1 - 2 * c2 * m), float(c2)]

    @property
    def own_noise(self) -> Noise | None:
        """Scatter about this parabola, where enough runs speak for it; else None: pool."""
        dof = len(self.rows) - 3
        if dof < OWN_NOISE_DOF:
            return None
        squares = float(((self.loss / self.fitted - 1) ** 2).sum())
        return Noise(max(np.sqrt(squares / dof), 1e-6), dof)

    @property
    def refused(self) -> str | None:
        """Why there is no minimum to be had; None where there is one."""
        x = self.design[:, 1]
        if self.coefficients[2] <= 0:
            return "the parabola opens downwards"
        if self.minimum[1] <= 0:
            return "the parabola falls below zero"
        if not x.min() < self.minimum[0] < x.max():
            side = "smallest" if self.minimum[0] <= x.min() else "largest"
            return f"the minimum lies outside the sampled sizes, beyond the {side}"
        return None


@dataclass(frozen=True)
class Noise:
    """Scatter of one run's loss, relative, with the degrees of freedom behind it.

    `dof` 0: assumed (`ASSUMED_NOISE`), not measured. `floor`: of replicates alone, None without.
    """

    relative: float
    dof: int
    floor: float | None = None
    floor_dof: int = 0

    def draw(self, resamples: int, rng: np.random.Generator) -> np.ndarray:
        """[r] plausible values of the scatter itself (scaled inverse chi), as it is estimated."""
        if self.dof == 0:
            return np.full(resamples, self.relative)
        return self.relative * np.sqrt(self.dof / rng.chisquare(self.dof, resamples))


def vertex(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, loss) at the vertex of c0 + c1 x + c2 x^2; coefficients [..., 3]."""
    c0, c1, c2 = np.moveaxis(coefficients, -1, 0)
    x = -c1 / (2 * c2)
    return x, c0 + c1 * x / 2


def slices(points: Points) -> tuple[list[Slice], list[dict[str, Any]]]:
    """(slices with at least three sizes, smallest budget first; the other budgets and why not)."""
    found, refused = [], []
    for rows in budgets(points):
        flops = float(np.exp(np.log(points.flops[rows]).mean()))
        sizes = len(np.unique(points.params[rows]))
        if sizes < 3:
            reason = f"{sizes} size{'s' if sizes > 1 else ''}; a parabola needs three"
            refused.append({"flops": flops, "n": len(rows), "reason": reason})
        else:
            found.append(_slice(points, rows, flops))
    return found, refused


def _slice(points: Points, rows: np.ndarray, flops: float) -> Slice:
    x = np.log(points.params[rows])
    center = float((x.max() + x.min()) / 2)
    design = np.vander(x - center, 3, increasing=True)
    solver = np.linalg.pinv(design)
    loss = points.loss[rows]
    return Slice(flops, rows, center, design, solver, solver @ loss, loss)


def budgets(points: Points) -> list[np.ndarray]:
    """Row numbers of each compute budget, smallest first: by `points.group`, else by nearness.

    Without labels the densest window of `BUDGET_WIDTH` is a budget, then the densest of what is
    left, and so on, down to windows with two fifths of the sizes of the richest: a table read off a
    figure also holds runs that belong to no budget.
    """
    if points.group is not None:
        found = [np.flatnonzero(points.group == g) for g in dict.fromkeys(points.group)]
        return sorted(found, key=lambda rows: float(np.log(points.flops[rows]).mean()))
    left = np.argsort(points.flops, kind="stable")
    found = []
    while len(left):
        log_flops = np.log(points.flops[left])
        end = np.searchsorted(log_flops, log_flops + np.log(BUDGET_WIDTH), "right")
        first = int((end - np.arange(len(left))).argmax())
        window = np.arange(first, end[first])
        found.append(left[window])
        left = np.delete(left, window)
    sizes = [len(np.unique(points.params[rows])) for rows in found]
    kept = [rows for rows, n in zip(found, sizes, strict=True) if 5 * n >= 2 * max(sizes)]
    return sorted(kept, key=lambda rows: float(points.flops[rows].mean()))


def noise(points: Points, found: Sequence[Slice]) -> Noise:
    """Pooled over all slices: scatter about the parabolas, which includes that of replicates."""
    floor, floor_dof = _noise_floor(points)
    residuals = [s.loss / s.fitted - 1 for s in found if not s.refused]
    dof = sum(len(r) - 3 for r in residuals)
    if dof > 0:
        relative = float(np.sqrt(sum((r**2).sum() for r in residuals) / dof))
        return Noise(max(relative, 1e-6), dof, floor, floor_dof)
    if floor is not None:
        return Noise(max(floor, 1e-6), floor_dof, floor, floor_dof)
    return Noise(ASSUMED_NOISE, 0)


def _noise_floor(points: Points) -> tuple[float | None, int]:
    """(relative scatter of runs that differ in nothing but the seed, degrees of freedom)."""
    key = np.round(np.log(np.stack([points.params, points.tokens], 1)), 6)
    _, cell = np.unique(key, axis=0, return_inverse=True)
    cell = cell.ravel()
    log_loss = np.log(points.loss)
    counts = np.bincount(cell)
    means = np.bincount(cell, log_loss) / counts
    dof = len(points) - len(counts)
    squares = ((log_loss - means[cell]) ** 2).sum()
    return (float(np.sqrt(squares / dof)), dof) if dof else (None, 0)


def curvature(found: Sequence[Slice]) -> float:
    """Relative rise of the loss per (ln N - ln N*)^2, mean over the slices; 0 without slices."""
    valid = [s.coefficients[2] / s.minimum[1] for s in found if not s.refused]
    return float(np.mean(valid)) if valid else 0.0
