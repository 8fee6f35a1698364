"""How well each approach foretells a budget that it has not seen: the largest, from the smaller
ones. How well a law fits does not tell this. Nor does this tell how it foretells one much farther
out: in docs/results/scaling_cpu.md the better at 2 and 4 times the compute are the worse at 10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.scaling import isoflop, laws
from jaxlm.scaling.runs import Curve, Points

Json = dict[str, Any]
_FEWEST = 3  # budgets below the one that is left out
_DEEPEST = 2  # budgets that are left out at most


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
        if len(known) <= how.get("drop_largest_loss", 0):
            break
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
