"""Scaling laws: three fits side by side, their intervals, and predictions from them.

`fit` gives one JSON-able dict (format jaxlm.fit/1), `predict` reads a loss at a compute budget off
it. An approach that the data cannot carry is {"refused": reason}.

An interval `ci95` of a fit is of the law; that of a prediction is of the loss that one run will
measure, so that it also holds the run's own noise and what the error of the predicted size costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jaxlm.scaling import approach1, approach2, approach3, frontier
from jaxlm.scaling.frontier import Refusal
from jaxlm.scaling.runs import Curve, Points
from jaxlm.schema import UserError, hint

__all__ = ["fit", "predict"]

Estimator = Literal["approach1", "approach2", "approach3"]
ESTIMATORS = ("approach1", "approach2", "approach3")
KEPT_DRAWS = 1000  # of the resamples, in the dict, for predictions
Progress = Callable[[int, int], None]
Json = dict[str, Any]


def fit(
    points: Points,
    curves: Sequence[Curve | tuple[float, Sequence[float], Sequence[float]]] | None = None,
    approaches: Sequence[int] = (1, 2, 3),
    drop_largest_loss: int = 0,
    huber_delta: float = 1e-3,
    bootstrap: int = 4000,
    seed: int = 0,
    for_compute: float | None = None,
    minimum: approach2.Minimum = "parabola",
    progress: Progress | None = None,
) -> Json:
    """Approaches 1, 2 and 3 of Hoffmann et al. 2022 on one table of runs.

    `curves`: training curves (params, FLOPs, losses[, name]) for approach 1; params as in `points`.
    `bootstrap`: resamples behind every interval, 0 for none. `for_compute`: FLOPs at which to
    predict. `minimum`: how approach 2 reads the minimum of a budget (see there).
    `progress(done, all)` counts approach 3's resamples. The same arguments give the same
    result. Raises UserError on a value out of range.

    The dict holds `n`, `dropped` [{name, loss, reason}], `convention` (how N was counted),
    `approach1..3`, `for_compute`, `warnings`, and `draws`: up to `KEPT_DRAWS` resampled laws, from
    which `predict` takes its intervals. An approach holds `a`, `b` (N* ~ C^a, D* ~ C^b), `se`,
    `ci95`; approaches 1 and 2 also `minima` [{flops, params, tokens, loss}], `refused` budgets
    [{flops, reason}] and the `frontier` (see `frontier.fit`); approach 2 `parabolas` [{flops,
    coefficients of 1, ln N, (ln N)^2, params, loss, names}]; approach 3 `objective`, `E`, `A`, `B`,
    `alpha`, `beta` and `residuals` of ln L, predicted - measured.
    """
    _check(points, approaches, drop_largest_loss, huber_delta, bootstrap, for_compute)
    if minimum not in ("parabola", "akima"):
        raise UserError(f"minimum: {minimum!r}; {hint(minimum, ('parabola', 'akima'))}")
    if drop_largest_loss:
        largest = np.argsort(points.loss, kind="stable")[len(points) - drop_largest_loss :]
        points = points.drop(largest, f"one of the {drop_largest_loss} largest losses")
    result: Json = {
        "format": "jaxlm.fit/1",
        "n": len(points),
        "dropped": list(points.dropped),
        "convention": points.convention,
        "seed": seed,
        "bootstrap": bootstrap,
        "points": {k: getattr(points, k).tolist() for k in ("params", "tokens", "flops", "loss")}
        | {"names": list(points.name)},
    }
    fits: dict[int, Callable[[np.random.Generator], tuple[Json, dict[str, np.ndarray]]]] = {
        1: lambda rng: approach1.fit([Curve(*c) for c in curves or ()], points, bootstrap, rng),
        2: lambda rng: approach2.fit(points, bootstrap, rng, minimum),
        3: lambda rng: approach3.fit(points, huber_delta, bootstrap, rng, progress),
    }
    draws: dict[str, Any] = {}
    for number, fitted in fits.items():
        name = f"approach{number}"
        if number not in approaches:
            result[name] = {"refused": "not asked for"}
            continue
        try:
            # A generator each: leaving one approach out does not change the others.
            found, drawn = fitted(np.random.default_rng([seed, number]))
        except Refusal as reason:
            result[name] = {"refused": str(reason)}
            continue
        result[name] = found | _intervals(name, found, drawn)
        draws[name] = _thinned(drawn)
    result["warnings"] = [*points.warnings, *_warnings(points, result, draws)]
    result["draws"] = draws
    result["for_compute"] = for_compute and {
        "flops": for_compute,
        **{name: predict(result, name, for_compute) for name in ESTIMATORS},
    }
    return result


def _check(
    points: Points,
    approaches: Sequence[int],
    drop: int,
    delta: float,
    bootstrap: int,
    for_compute: float | None,
) -> None:
    for number in approaches:
        if number not in (1, 2, 3):
            raise UserError(f"approach: expected 1, 2 or 3, got {number!r}")
    if not 0 <= drop < len(points):
        raise UserError(f"drop_largest_loss: expected 0 to {len(points) - 1}, got {drop}")
    if not delta > 0:
        raise UserError(f"huber_delta: expected a number above 0, got {delta}")
    if bootstrap < 0 or bootstrap == 1:
        raise UserError(f"bootstrap: expected 0 (no intervals) or at least 2, got {bootstrap}")
    if for_compute is not None and not for_compute > 0:
        raise UserError(f"for_compute: expected FLOPs above 0, got {for_compute}")


# ---------------------------------------------------------------------------------------- intervals


def _intervals(name: str, found: Json, draws: dict[str, np.ndarray]) -> Json:
    """`se` and `ci95` of a fit's exponents and parameters; None where nothing was resampled.

    The standard error is the standard deviation for approach 3, as published; for the others,
    where a flat parabola now and then flies off, half the width of the central 68 %.
    """
    levels = _levels(name, found)
    if name == "approach3":
        total = draws["alpha"] + draws["beta"]
        values = draws | {"a": draws["beta"] / total, "b": draws["alpha"] / total}
        values = {k: v[np.isfinite(v)] for k, v in values.items()}
        se = {k: float(v.std()) if len(v) else None for k, v in values.items()}
    else:
        values = {k: draws[k] for k in ("a", "b")}
        se = {k: _half_68(v) for k, v in values.items()}
    ci95 = {k: interval(v, levels) for k, v in values.items()}
    return {"se": se, "ci95": ci95, "levels": levels}


def _levels(name: str, found: Json) -> list[float]:
    """The two percentiles of a 95 % interval. Approaches 1 and 2 draw the noise's own error;
    approach 3 does not and needs Student's t with n - 5 degrees of freedom."""
    if name != "approach3":
        return [2.5, 97.5]
    from scipy.stats import norm, t

    tail = 100 * float(norm.cdf(t.ppf(0.025, found["noise"]["dof"])))
    return [tail, 100 - tail]


def interval(values: np.ndarray, levels: Sequence[float]) -> list[float] | None:
    return [float(v) for v in np.percentile(values, levels)] if len(values) else None


def _half_68(values: np.ndarray) -> float | None:
    if not len(values):
        return None
    low, high = np.percentile(values, [15.87, 84.13])
    return float(high - low) / 2


def _thinned(draws: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """At most `KEPT_DRAWS`, evenly taken, to eight digits."""
    return {
        name: [float(f"{v:.8g}") for v in values[:: max(1, -(-len(values) // KEPT_DRAWS))]]
        for name, values in draws.items()
    }


# --------------------------------------------------------------------------------------- prediction


def predict(fits: Json, estimator: str, flops: float, params: float | None = None) -> Json:
    """What one run will measure at this compute, by one estimator of a fit.

    `params`: the size that will be run, in the fit's convention; None: the compute-optimal one.
    Gives `loss` (nats/token), `ci95` (of the measured loss), `ci95_law` (of the compute-optimal
    loss itself, without a run's noise and the wrong size), `params`, `tokens` (optimal), each with
    `..._ci95`, `half_width` of `ci95` relative to the loss, `extrapolation` (compute over the
    largest fitted) and `method`; or {"refused": reason}. Intervals are None without resamples.
    Raises UserError for an estimator that does not exist.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"estimator: {estimator!r}; {hint(estimator, ESTIMATORS)}")
    if "refused" in fits[estimator] and "a" not in fits[estimator]:
        return {"refused": fits[estimator]["refused"]}
    found = fits[estimator]
    draws = {k: np.array(v) for k, v in fits["draws"][estimator].items()}
    rng = np.random.default_rng([fits["seed"], ESTIMATORS.index(estimator)])
    by = _by_law if estimator == "approach3" else _by_frontier
    optimum, loss, optima, losses = by(found, draws, flops, params)
    noise = _noise_draws(found, draws, len(losses), rng)
    measured = losses * np.exp(noise * rng.standard_normal(len(losses)))
    levels = found["levels"]
    ci95 = interval(measured, levels)
    largest = max(fits["points"]["flops"])
    return {
        "estimator": estimator,
        "flops": float(flops),
        "loss": loss,
        "ci95": ci95,
        "half_width": (ci95[1] - ci95[0]) / 2 / loss if ci95 else None,
        "ci95_law": interval(optima[2], levels),
        "params": optimum[0],
        "params_ci95": interval(optima[0], levels),
        "tokens": optimum[1],
        "tokens_ci95": interval(optima[1], levels),
        "extrapolation": float(flops / largest),
        "method": _method(estimator, found, flops / largest),
    }


Optimum = tuple[Any, Any, Any]  # N*, D*, L*


def _by_frontier(
    found: Json, draws: dict[str, np.ndarray], flops: float, params: float | None
) -> tuple[Optimum, float, Optimum, np.ndarray]:
    """(optimum, loss at the size that is run, the same of every resample).

    A run beside the optimum loses curvature x (ln N - ln N*)^2 of its loss, as the ladder's own
    parabolas say; they say nothing beyond a factor of ten.
    """
    law = found["frontier"]
    optimum = frontier.at(law, flops)
    optima = frontier.draws_at(draws, law["reference_flops"], flops)
    log_size = np.log(params or optimum[0])
    missed = np.clip(log_size - np.log(optimum[0]), -np.log(10), np.log(10))
    missed_r = np.clip(log_size - np.log(optima[0]), -np.log(10), np.log(10))
    loss = optimum[2] * (1 + found["curvature"] * missed**2)
    losses = optima[2] * (1 + np.maximum(draws["curvature"], 0) * missed_r**2)
    return optimum, float(loss), optima, losses


def _by_law(
    found: Json, draws: dict[str, np.ndarray], flops: float, params: float | None
) -> tuple[Optimum, float, Optimum, np.ndarray]:
    """As `_by_frontier`, from L(N, D) with C = k N D."""
    k = found["flops_per_param_token"]
    optimum = tuple(float(v) for v in approach3.optimum(found, flops, k))
    size = params or optimum[0]
    loss = approach3.loss(found, size, flops / k / size)
    losses = approach3.loss(draws, size, flops / k / size)
    optima = approach3.optimum(draws, flops, k)
    return (optimum[0], optimum[1], optimum[2]), float(loss), optima, losses


def _noise_draws(
    found: Json, draws: dict[str, np.ndarray], size: int, rng: np.random.Generator
) -> np.ndarray:
    if "noise" in draws:
        return draws["noise"]
    noise = found["noise"]  # the expanded levels stand for its own uncertainty
    return np.full(size, noise["relative"])


def _method(estimator: str, found: Json, extrapolation: float) -> str:
    noise = found["noise"]
    scatter = f"a run's scatter of {noise['relative']:.2%} ({noise['dof']} degrees of freedom)"
    if not noise["dof"]:
        scatter = f"an assumed scatter of {noise['relative']:.0%} per run"
    reach = f"{extrapolation:.3g} times the largest fitted compute"
    if estimator == "approach3":
        return (
            f"L = E + A/N^alpha + B/D^beta at its compute-optimal size, {reach}. The interval holds"
            f" the law's bootstrap and {scatter}; it takes the form of the law as true."
        )
    E = found["frontier"]["loss"]["E"][-1]
    points = "IsoFLOP minima" if estimator == "approach2" else "points of the envelope"
    return (
        f"Power laws through {found['frontier']['budgets']} {points}, {reach}; the loss as"
        f" E + K C^-c, averaged over E from 0 to {E:.3g} by how well each meets the points. The"
        f" interval holds {scatter}, the unknown E, and the cost of a wrong size."
    )


# ----------------------------------------------------------------------------------------- warnings


def _warnings(points: Points, result: Json, draws: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the numbers."""
    said = []
    decades = float(np.ptp(np.log10(points.flops)))
    if decades < 1.5:
        said.append(f"compute spans {decades:.2g} decades; exponents need about 1.5 or more")
    ratio = points.flops / (points.flops_per_param_token * points.params * points.tokens)
    if np.ptp(np.log(ratio)) > 0.1:
        said.append(
            f"C/(ND) varies by {np.exp(np.ptp(np.log(ratio))) - 1:.0%} with N counted"
            f" {points.convention}; optima of approaches 1 and 3 use its mean"
        )
    second, third = result["approach2"], result["approach3"]
    if "a" in second:
        lost = second["resamples_without_minimum"]
        if lost > 0.05 * max(1, result["bootstrap"]):
            said.append(f"approach 2: {lost} of {result['bootstrap']} resamples had no minimum")
        if second["noise"]["dof"] == 0:
            said.append("approach 2: no spare runs or replicates; a scatter of 1 % is assumed")
        if len(second["minima"]) < 4:
            said.append(f"approach 2 rests on {len(second['minima'])} budgets")
    if "a" in third:
        said += [f"approach 3: {name} is at its bound" for name in third["at_bounds"]]
        low = np.array(draws["approach3"]["E"]) < 0.01 * points.loss.min()
        if low.size and low.mean() > 0.025:
            said.append(f"approach 3: E is not told from 0 in {low.mean():.0%} of the resamples")
    wide = [
        name
        for name in ESTIMATORS
        if (ci := result[name].get("ci95", {}).get("a")) and ci[1] - ci[0] > 0.5
    ]
    said += [f"{name}: the exponent a is hardly determined (see its interval)" for name in wide]
    return said
