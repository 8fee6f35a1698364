"""What `fit.json` says, as numbers, intervals and curves that pages and plots show.

A fit may be missing or refused, in parts or whole; every accessor then gives None or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.report.artifacts import Json, dicts, number, numbers, part
from jaxlm.scaling import laws

LABELS = {
    "approach1": "1 · envelope of curves",
    "approach2": "2 · IsoFLOP parabolas",
    "approach3": "3 · parametric loss",
}
QUANTITIES = ("params", "tokens", "loss")
GRID = 40  # points of a curve


@dataclass(frozen=True)
class Approach:
    """One of the three fits; `values` is its dict in the file."""

    name: str
    values: Json

    @property
    def label(self) -> str:
        return LABELS[self.name]

    @property
    def short(self) -> str:
        return f"approach {self.name[-1]}"

    @property
    def refused(self) -> str | None:
        """Why there is no result; None where there is one."""
        if not self.values:
            return "not fitted"
        reason = self.values.get("refused")
        if isinstance(reason, str):
            return reason
        return None if self.value("a") is not None else "fit.json gives no exponent"

    def value(self, key: str) -> float | None:
        return number(self.values.get(key))

    def error(self, key: str) -> float | None:
        return number(part(self.values.get("se")).get(key))

    def ci95(self, key: str) -> list[float] | None:
        return numbers(part(self.values.get("ci95")).get(key), 2)

    @property
    def minima(self) -> list[Json]:
        return [m for m in dicts(self.values.get("minima")) if number(m.get("flops"))]

    @property
    def refused_minima(self) -> list[tuple[float | None, str]]:
        """(compute, reason) of each point that was refused."""
        rows = dicts(self.values.get("refused"))
        return [(number(r.get("flops")), str(r.get("reason", "no reason given"))) for r in rows]

    @property
    def law(self) -> dict[str, float] | None:
        """{E, A, B, alpha, beta} of L = E + A/N^alpha + B/D^beta."""
        found = {k: self.value(k) for k in ("E", "A", "B", "alpha", "beta")}
        known = {k: v for k, v in found.items() if v is not None}
        return known if len(known) == len(found) else None


@dataclass(frozen=True)
class Curve:
    """An approach's optimum against compute: `flops` [n]; N*, D* and the loss there by name [n],
    and their 95 % intervals [n, 2] where the fit was resampled."""

    flops: np.ndarray
    values: dict[str, np.ndarray]
    ci95: dict[str, np.ndarray]


def approaches(fit: Json) -> list[Approach]:
    return [Approach(name, part(fit.get(name))) for name in LABELS]


def fitted_range(fit: Json) -> tuple[float, float] | None:
    """(smallest, largest) compute of the fitted runs, or of the optima if runs are not listed."""
    flops = numbers(part(fit.get("points")).get("flops")) or [
        m["flops"] for approach in approaches(fit) for m in approach.minima
    ]
    return (min(flops), max(flops)) if flops else None


def curves(fit: Json, target: float | None) -> dict[str, Curve]:
    """The approaches that have a result, from the smallest fitted compute to beyond `target`."""
    found = fitted_range(fit)
    if not found:
        return {}
    low, high = found[0] / 1.15, max(found[1] * 1.5, (target or 0.0) * 1.3)
    grid = np.union1d(np.geomspace(low, high, GRID), [found[1]])  # where lines begin to be thin
    drawn = {a.name: _curve(fit, a.name, grid) for a in approaches(fit) if not a.refused}
    return {name: curve for name, curve in drawn.items() if curve}


def _curve(fit: Json, name: str, flops: np.ndarray) -> Curve | None:
    """None for a fit that lacks what predictions need: the page then shows its numbers only."""
    try:
        rows: list[dict[str, Any]] = [laws.predict(fit, name, float(c)) for c in flops]
        values = {q: np.array([row[q] for row in rows], np.float64) for q in QUANTITIES}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    ci95 = {}
    for quantity, key in (
        ("params", "params_ci95"),
        ("tokens", "tokens_ci95"),
        ("loss", "ci95_law"),
    ):
        bounds = [numbers(row.get(key), 2) for row in rows]
        if all(bounds):
            ci95[quantity] = np.array(bounds)
    return Curve(flops, values, ci95)
