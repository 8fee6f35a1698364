"""What a fitted law is for: the compute-optimal N and D, and when more stops helping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.scaling import form_fit, robust
from jaxlm.scaling import form_intervals as intervals
from jaxlm.scaling.forms import FORMS, Form
from jaxlm.schema import UserError

Json = dict[str, Any]
_GRID = 257
_REACH = 1e12  # times the largest fitted: farther nothing is looked for


def allocate(result: Json, flops: float, at: Mapping[str, float], k: float = 6.0) -> Json:
    """The N* and D* with the least loss at C = k N D, with intervals; the law's other columns as
    given by `at` (unique_tokens, bits, experts). Also what a size wrong by 2 costs. {"refused":
    reason} where the law has no N and D, or no finite optimum. Raises UserError."""
    form = FORMS[result["law"]]
    if not flops > 0:
        raise UserError(f"--for-compute: expected FLOPs above 0, got {flops}")
    if not {"params", "tokens"} <= set(form.columns) or form.target != "loss":
        why = f"{form.name} has no N and D to divide compute between"
        return {"flops": float(flops), "refused": why}
    law, log_nd = form_fit.values_of(result), float(np.log(flops / k))
    log_n, loss = (float(v) for v in least(form, law, flops, at, k))
    if not 0.01 < log_n / log_nd < 0.99:
        why = f"the least loss of {form.name} lies at no finite size"
        return {"flops": float(flops), "refused": why}
    sizes, losses = least(form, form_fit.draws_of(result), flops, at, k)
    wrong = _on_budget(form, law, np.array([log_n - np.log(2), log_n + np.log(2)]), flops, at, k)
    bands = [
        intervals.interval(v, result["levels"])
        for v in (np.exp(sizes), np.exp(log_nd - sizes), losses)
    ]
    return {
        "flops": float(flops),
        "flops_per_param_token": k,
        "refused": None,
        "params": float(np.exp(log_n)),
        "params_ci95": bands[0],
        "tokens": float(np.exp(log_nd - log_n)),
        "tokens_ci95": bands[1],
        "loss": loss,
        "ci95_law": bands[2],
        "cost_of_half_size": float(wrong[0] / loss - 1),
        "cost_of_double_size": float(wrong[1] / loss - 1),
    }


def _on_budget(
    form: Form, law: Mapping[str, Any], log_n: np.ndarray, flops: float, at: Mapping[str, float],
    k: float,
) -> np.ndarray:  # fmt: skip
    size = np.exp(log_n)
    columns = {"params": size, "tokens": flops / k / size, "flops": np.full_like(size, flops)}
    for name in form.columns:
        if name not in columns:
            if name not in at:
                raise UserError(f"--at: {form.name} needs {name}, as in --at={name}=1e9")
            columns[name] = np.full_like(size, at[name])
    return robust.law(form, law, columns)


def least(
    form: Form, law: Mapping[str, Any], flops: float, at: Mapping[str, float], k: float
) -> tuple[np.ndarray, np.ndarray]:
    """(ln N*, least loss) at C = k N D, scalars or [r] as the law's parameters are: a grid over all
    N, laid closer about its best three times."""
    low, high = 0.0, float(np.log(flops / k))
    grid = np.linspace(low, high, _GRID)
    values = _on_budget(form, law, grid, flops, at, k)
    grid = np.broadcast_to(grid, values.shape)
    for _ in range(3):
        middle = np.take_along_axis(grid, values.argmin(-1)[..., None], -1)
        half = (grid[..., -1:] - grid[..., :1]) / (_GRID - 1) * 1.5
        grid = np.clip(middle + half * np.linspace(-1, 1, _GRID), low, high)
        values = _on_budget(form, law, grid, flops, at, k)
    best = values.argmin(-1)[..., None]
    return tuple(np.take_along_axis(v, best, -1)[..., 0] for v in (grid, values))  # type: ignore[return-value]


def stops(result: Json, largest: float) -> Json | None:
    """For a law of compute alone: what doubling it once more gains at the `largest` fitted, and the
    compute from which a doubling gains less than the scatter of one run, with intervals. None for
    other laws; `at` is None where that lies beyond any reach."""
    form = FORMS[result["law"]]
    if form.columns != ("flops",) or form.target != "loss":
        return None
    noise = result["noise"]["relative"]
    grid = largest * np.geomspace(1, _REACH, 2000)

    def gains(law: Mapping[str, Any]) -> np.ndarray:
        now, then = (robust.law(form, law, {"flops": x}) for x in (grid, 2 * grid))
        return 1 - then / now

    def first(gain: np.ndarray) -> np.ndarray:
        below = gain < noise
        return np.where(below.any(-1), grid[below.argmax(-1)], np.inf)

    own, drawn = gains(form_fit.values_of(result)), gains(form_fit.draws_of(result))
    at = float(first(own))
    spread = first(drawn) if len(drawn) else np.empty(0)
    band = np.quantile(spread, np.array(result["levels"]) / 100, method="nearest") if len(
        spread) else None  # fmt: skip
    return {
        "gain_of_doubling": float(own[0]),
        "gain_ci95": intervals.interval(drawn[:, 0], result["levels"]) if len(drawn) else None,
        "scatter": noise,
        "at": at if np.isfinite(at) else None,
        "at_ci95": None if band is None else [float(v) if np.isfinite(v) else None for v in band],
    }
