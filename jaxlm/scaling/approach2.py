"""Approach 2: the minimum of an IsoFLOP parabola at each budget (Hoffmann et al. 2022, sec. 3.2).

Loss = c0 + c1 ln N + c2 (ln N)^2 per budget by least squares; N* at the vertex; N* ~ C^a and D* ~
C^b through the minima. A budget is refused, with the reason, where the parabola opens downwards,
its minimum lies outside the sampled sizes, or there are fewer than three sizes.

Intervals: a slice of four runs leaves one degree of freedom, so that resampling its runs or its
residuals under-covers badly. Instead the scatter is pooled over all slices (replicates included; a
slice of eight runs or more has its own), and each resample draws first the scatter itself from its
scaled inverse chi-square distribution, then normal noise for every run. For what is linear in the
losses this gives the t intervals. Measured coverage: `tests/test_laws.py`.

`minimum` "akima" reads minima off an Akima spline through the best loss of every size (in logs), as
Porian et al. 2024 do for wide, lopsided slices that no parabola fits.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from jaxlm.scaling import frontier, isoflop
from jaxlm.scaling.frontier import Optima, Refusal
from jaxlm.scaling.isoflop import Slice
from jaxlm.scaling.runs import Points

Minimum = Literal["parabola", "akima"]
_GRID = 50  # places per interval between sizes at which a spline is read


def fit(
    points: Points, resamples: int, rng: np.random.Generator, minimum: Minimum = "parabola"
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(result as JSON values, draws by name [r]). Raises Refusal below two usable budgets."""
    found, refused = isoflop.slices(points)
    noise = isoflop.noise(points, found)
    usable, at = [], []
    for s in found:
        x, loss = (float(v) for v in _minima(s, s.coefficients, s.loss, minimum))
        reason = s.refused if minimum == "parabola" else _edge(s, x)
        if reason:
            refused.append({"flops": s.flops, "n": len(s.rows), "reason": reason})
        else:
            usable.append(s)
            at.append((x, loss))
    if len(usable) < 2:
        why = "; ".join(f"C = {r['flops']:.2g}: {r['reason']}" for r in refused[:4])
        raise Refusal(f"{len(usable)} budgets with a minimum, two needed ({why or 'none found'})")
    optima = Optima(
        flops=np.array([s.flops for s in usable]),
        params=np.exp([s.center + x for s, (x, _) in zip(usable, at, strict=True)]),
        tokens=np.array([_tokens(points, s, x) for s, (x, _) in zip(usable, at, strict=True)]),
        loss=np.array([loss for _, loss in at]),
        se=np.array([(s.own_noise or noise).relative * _leverage(s) for s in usable]),
    )
    law = frontier.fit(optima)
    sigma = noise.draw(resamples, rng)
    resampled, curvature = _resample(points, usable, optima, sigma, rng, minimum)
    draws = frontier.draw(law, resampled, rng) | {"curvature": curvature, "noise": sigma}
    whole = np.isfinite(curvature)
    result = {
        "a": law["params"][1],
        "b": law["tokens"][1],
        "minima": optima.rows(),
        "refused": sorted(refused, key=lambda r: r["flops"]),
        "parabolas": [_parabola(points, s) for s in found],
        "noise": dataclasses.asdict(noise),
        "curvature": isoflop.curvature(usable),
        "frontier": law,
        "minimum": minimum,
        "resamples_without_minimum": int((~whole).sum()),
    }
    return result, {name: values[whole] for name, values in draws.items()}


def _resample(
    points: Points,
    usable: list[Slice],
    optima: Optima,
    sigma: np.ndarray,
    rng: np.random.Generator,
    minimum: Minimum,
) -> tuple[Optima, np.ndarray]:
    """(minima [r, k], curvature [r]); NaN where there is no minimum."""
    columns = []
    for s in usable:
        scatter = s.own_noise.draw(len(sigma), rng) if s.own_noise else sigma
        error = rng.standard_normal((len(sigma), len(s.rows))) * scatter[:, None] * s.fitted
        coefficients = s.coefficients + error @ s.solver.T
        coefficients[coefficients[:, 2] <= 0] = np.nan
        x, loss = _minima(s, coefficients, s.loss + error, minimum)
        x = np.clip(x, -20, 20)  # e^20: beyond any ladder, within any float
        loss = np.where(loss > 0, loss, np.nan)
        size = np.exp(s.center + x)
        columns.append((size, _tokens(points, s, x), loss, coefficients[:, 2] / loss))
    size, tokens, loss, bend = (np.stack(c, 1) for c in zip(*columns, strict=True))
    return Optima(optima.flops, size, tokens, loss, optima.se), bend.mean(1)


def _minima(
    s: Slice, coefficients: np.ndarray, losses: np.ndarray, minimum: Minimum
) -> tuple[np.ndarray, np.ndarray]:
    """(x about the slice's center, loss) of parabolas [..., 3], or of splines through losses
    [..., n]; NaN where a resample's spline is lowest at an end."""
    if minimum == "parabola":
        return isoflop.vertex(coefficients)
    from scipy.interpolate import Akima1DInterpolator

    sizes, size = np.unique(s.design[:, 1], return_inverse=True)
    best = np.stack([losses[..., size == i].min(-1) for i in range(len(sizes))])
    grid = np.interp(np.linspace(0, len(sizes) - 1, _GRID * (len(sizes) - 1) + 1),
                     np.arange(len(sizes)), sizes)  # fmt: skip
    curves = Akima1DInterpolator(sizes, np.log(np.maximum(best, 1e-9)), axis=0)(grid)
    lowest = curves.argmin(0)
    inside = (lowest > 0) & (lowest < len(grid) - 1)
    x = np.where(inside, grid[lowest], np.nan) if losses.ndim > 1 else grid[lowest]
    return x, np.exp(np.where(np.isnan(x), np.nan, curves.min(0)))


def _edge(s: Slice, x: float) -> str | None:
    low, high = s.design[:, 1].min(), s.design[:, 1].max()
    if low < x < high:
        return None
    return f"the lowest loss is at the {'smallest' if x <= low else 'largest'} size"


def _tokens(points: Points, s: Slice, x: Any) -> Any:
    """D at a size of the slice: ln D against ln N is a line (of slope -1 where C = 6ND)."""
    level, slope = frontier.line(s.design[:, 1], np.log(points.tokens[s.rows]))
    return np.exp(level + slope * x)


def _leverage(s: Slice) -> float:
    """Standard error of the parabola's minimum in units of one run's."""
    at = np.vander([s.minimum[0]], 3, increasing=True)[0]
    return float(np.linalg.norm(at @ s.solver))


def _parabola(points: Points, s: Slice) -> dict[str, Any]:
    """What a plot needs: loss = c0 + c1 ln N + c2 (ln N)^2 and the points behind it."""
    return {
        "flops": s.flops,
        "coefficients": s.uncentred,
        "params": points.params[s.rows].tolist(),
        "loss": s.loss.tolist(),
        "names": [points.name[i] for i in s.rows],
    }
