"""How well each approach foretells a budget that it has not seen: the largest, from the smaller
ones. What a prediction far beyond the ladder is worth is not told by how well a law fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.scaling import isoflop, laws
from jaxlm.scaling.runs import Curve, Points

Json = dict[str, Any]
_FEWEST = 3  # budgets below the one that is left out
_DEEPEST = 2  # budgets that are left out at most
_WORSE = 2.0  # times the error of another approach


def left_out(points: Points, curves: Sequence[Curve] = (), **how: Any) -> list[Json]:
    """The best run of the largest budget as each approach predicts it from the budgets below, and
    from those without the next one: [{estimator, flops, extrapolation, measured, predicted, error}]
    with `error` = predicted / measured - 1. Empty where fewer than three budgets are left, and
    without the approaches that refuse. `how`: of `laws.fit`, but for the resamples.
    """
    groups = isoflop.budgets(points)
    found: list[Json] = []
    for gone in range(1, _DEEPEST + 1):
        if len(groups) - gone < _FEWEST:
            break
        known = points.drop(np.concatenate(groups[-gone:]), "left out")
        fits = laws.fit(known, [c for c in curves if c.name in known.name], **how, bootstrap=0)
        best = groups[-1][points.loss[groups[-1]].argmin()]
        for name in laws.ESTIMATORS:
            said = laws.predict(fits, name, points.flops[best], points.params[best])
            if "refused" not in said:
                measured = float(points.loss[best])
                found.append({
                    "estimator": name, "flops": float(points.flops[best]),
                    "extrapolation": said["extrapolation"], "measured": measured,
                    "predicted": said["loss"], "error": said["loss"] / measured - 1,
                })  # fmt: skip
    return found


def rms(rows: Sequence[Json]) -> dict[str, float]:
    """Estimator → root mean square of its errors, over those that foretold all that was asked."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row["estimator"], []).append(row["error"])
    most = max(map(len, errors.values()), default=0)
    return {k: float(np.sqrt(np.mean(np.square(v)))) for k, v in errors.items() if len(v) == most}


def doubts(rows: Sequence[Json], estimator: str) -> list[str]:
    """What speaks against the estimator that is to predict the held-out run."""
    found = rms(rows)
    best = min(found, key=lambda name: found[name], default=estimator)
    mine = found.get(estimator)
    if mine is None or mine <= _WORSE * found[best]:
        return []
    return [
        f"{estimator}, which predicts the held-out run, was {mine:.2%} off the largest budget when"
        f" told of the smaller ones alone; {best} was {found[best]:.2%} off"
    ]
