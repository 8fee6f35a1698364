"""Intervals of a law's parameters: resampled, and by profile where the valley is flat.

The Bayesian bootstrap weighs the runs anew (Rubin 1981, as in approach 3); the other adds resampled
residuals to the fit. Percentiles are expanded by Student's t (Hesterberg 2015). A profile's
interval is where the objective, minimised over all other parameters, rises by no more than it does
at the parameter's own optimum when the runs are weighed anew (95 % of the resamples): along a flat
valley a bootstrap shows where its resamples end, the profile how long the valley is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jaxlm.scaling import robust
from jaxlm.scaling.forms import Form
from jaxlm.scaling.robust import Table

Json = dict[str, Any]
Resample = Literal["runs", "residuals"]
KEPT_DRAWS = 1000
_PROFILED = 200  # resamples behind a profile's threshold
_GRID = 41


def errors(table: Table, theta: np.ndarray) -> np.ndarray:
    """Law - measured, in the residual's terms, [n]."""
    y = np.log(table.target) if table.residual == "log" else table.target
    return robust.jacobian(table, theta)[0] - y


def resampled(
    table: Table,
    best: np.ndarray,
    others: np.ndarray,
    how: Resample,
    count: int,
    rng: np.random.Generator,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """theta [r, k] of the resamples, each searched from the optimum and from `others` [m, k]."""
    n = len(table.target)
    if not count:
        return np.empty((0, len(best)))
    weight, target = np.ones((count, n)), np.broadcast_to(table.target, (count, n))
    if how == "runs":
        weight = rng.dirichlet(np.ones(n), count) * n
    else:
        fitted, error = robust.jacobian(table, best)[0], errors(table, best)
        spread = (error - error.mean()) * np.sqrt(n / (n - len(table.fitted)))
        moved = fitted - spread[rng.integers(0, n, (count, n))]
        target = np.exp(moved) if table.residual == "log" else moved
    from_ = np.concatenate([best[None], others])
    m = len(from_)
    theta, value = robust.minimise(
        table, np.tile(from_, (count, 1)), np.repeat(weight, m, 0), np.repeat(target, m, 0),
        progress=progress,
    )  # fmt: skip
    winner = value.reshape(count, m).argmin(1)
    return theta.reshape(count, m, -1)[np.arange(count), winner]


def levels(dof: int) -> list[float]:
    from scipy.stats import norm, t

    tail = 100 * float(norm.cdf(t.ppf(0.025, dof)))
    return [tail, 100 - tail]


def profiles(
    table: Table, best: np.ndarray, objective: float, drawn: np.ndarray, rng: np.random.Generator
) -> dict[str, Json]:
    """By name of a free parameter or an asymptote: `values`, the `objective` there, `ci95` (None
    for a side on which it stays open)."""
    n = len(table.target)
    weight = rng.dirichlet(np.ones(n), _PROFILED) * n
    many = np.tile(best, (_PROFILED, 1))
    lowest = robust.minimise(table, many, weight)[1]
    found = {}
    for k, name in enumerate(table.names):
        natural = k >= len(table.form.coefficients) or name in table.form.asymptotes
        if not natural or name not in table.fitted:
            continue
        rise = _held(table, k, many[:, k], many, weight) - lowest
        allowed = float(np.percentile(rise, 95))
        at = _places(table, k, best, drawn)
        near = drawn[np.abs(drawn[:, k] - at[:, None]).argmin(1)]  # the valley bends: follow it
        there = np.minimum(
            _held(table, k, at, near), _held(table, k, at, np.tile(best, (len(at), 1)))
        )
        sides = _crossings(at, there - objective, allowed, int(np.abs(at - best[k]).argmin()))
        full = np.tile(best, (len(at) + 2, 1))
        full[:, k] = [*at, *(best[k] if s is None else s for s in sides)]
        values = robust.natural(table, full)[name]
        ends = [None if s is None else float(v) for s, v in zip(sides, values[-2:], strict=True)]
        found[name] = {
            "values": values[:-2].tolist(), "objective": there.tolist(), "ci95": ends,
        }  # fmt: skip
    return found


def _held(
    table: Table, k: int, at: np.ndarray, theta: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """The least objective [r] with parameter k held at each of `at` [r]."""
    low, high = (np.tile(b, (len(at), 1)) for b in robust.bounds(table))
    low[:, k] = high[:, k] = at
    return robust.minimise(table, theta, weight, None, low, high)[1]


def _places(table: Table, k: int, best: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Where a profile is taken: close by about the resamples, and coarsely over all its range."""
    low, high = (b[k] for b in robust.bounds(table))
    lower, upper = np.percentile(drawn[:, k], [0.5, 99.5])
    reach = max(upper - lower, 1e-3)
    close = np.linspace(lower - reach, upper + reach, _GRID)
    return np.unique(np.clip([*close, *np.linspace(low, high, _GRID // 2), best[k]], low, high))


def _crossings(at: np.ndarray, rise: np.ndarray, allowed: float, middle: int) -> list[float | None]:
    """Where the rise first passes `allowed` to the left and to the right of the optimum."""
    sides: list[float | None] = []
    for step, end in ((-1, -1), (1, len(at))):
        sides.append(None)
        for i in range(middle + step, end, step):
            if rise[i] > allowed:
                before = i - step
                share = (allowed - rise[before]) / max(rise[i] - rise[before], 1e-300)
                sides[-1] = float(at[before] + np.clip(share, 0, 1) * (at[i] - at[before]))
                break
    return sides


def thin(values: np.ndarray) -> list[float]:
    return [float(f"{v:.8g}") for v in values[:: max(1, -(-len(values) // KEPT_DRAWS))]]


def interval(values: np.ndarray, levels: Sequence[float]) -> list[float] | None:
    values = values[np.isfinite(values)]
    return [float(v) for v in np.percentile(values, levels)] if len(values) else None


def too_wide(form: Form, name: str, value: float, ci: Sequence[float]) -> bool:
    """An interval that makes the value no statement: a factor of 100 for what is a scale, half for
    an exponent, twice itself for anything else."""
    free = next((f for f in form.free if f.name == name), None)
    if name in form.asymptotes or (free and free.unit):
        return ci[1] - ci[0] > 2 * abs(value)
    if free is None or free.scale == "log":
        return ci[1] > 100 * max(ci[0], 1e-300)
    return ci[1] - ci[0] > 0.5
