"""Approach 3: L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, eq. 2), fitted by eq. 3:
the Huber loss, summed, of the residuals of ln L, with the law as a log-sum-exp of its three terms.

Besiroglu et al. 2024 (arXiv 2404.10102) found the published fit off its optimum, for the sum is
about 1e-3 and optimisers stop early. So: ln N and ln D are centred, starts come from a grid over
(alpha, beta) with (E, A, B) solved by non-negative least squares (variable projection), and a
damped Newton method with the exact second derivatives runs from each, in float64, all starts and
resamples at once. Parameters: theta = (ln A', ln B', ln E, alpha, beta), A' and B' at the centre.

Intervals: every resample weighs the runs anew (the Bayesian bootstrap, Rubin 1981, whose weights
are the classical bootstrap's without its ties: 15 runs drawn with replacement often lose a whole
budget, and the intervals then over-cover), searched from the optimum and three other starts. Its
percentiles are too narrow for few runs, by the ratio of Student's t with n - 5 degrees of freedom
to the normal; `laws` widens the levels accordingly (Hesterberg 2015, "expanded percentiles").
Measured coverage: `tests/test_laws.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.scaling.frontier import Refusal
from jaxlm.scaling.runs import Points

PARAMETERS = ("E", "A", "B", "alpha", "beta")
# Bounds of alpha and beta. Published laws have 0.05 to 0.5; a term that falls faster than 1/N dies
# within a ladder, E takes its place, and the interval of a prediction opens upwards without reason.
MIN_POWER, MAX_POWER = 0.01, 1.0
_POWERS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95)
_OTHER_STARTS = ((0.15, 0.15), (0.2, 0.8), (0.8, 0.2))
# From so many runs on, the starts of a resample agree and only the best goes on after a few steps.
_MANY = 100


@dataclass(frozen=True)
class _Data:
    """Centred logs of N, D and the logs of the losses, [n]; bounds of theta, [5]."""

    x: np.ndarray
    z: np.ndarray
    y: np.ndarray
    center: tuple[float, float]
    low: np.ndarray
    high: np.ndarray


def fit(
    points: Points,
    delta: float,
    resamples: int,
    rng: np.random.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(result as JSON values, draws of `PARAMETERS` by name [r]).

    `progress(done, all)` is called between batches of resamples. Raises Refusal where the points
    cannot carry five parameters.
    """
    _check(points)
    data = _data(points)
    one = np.ones((1, len(points)))
    starts = np.stack([_start(data, p, q) for p in _POWERS for q in _POWERS])
    theta, objective = _minimise(starts, data, one, delta, 60)
    front = objective.argsort()[:9]
    theta, objective = _minimise(theta[front], data, one, delta, 500)
    best = theta[objective.argmin()]
    for power, variable in ((best[3], "N"), (best[4], "D")):
        if power <= MIN_POWER:
            raise Refusal(f"the loss does not fall with {variable} in these points")
    residual = _mixture(best[None], data)[0][0] - data.y
    dof = len(points) - 5
    law = _natural(best, data)
    draws = _natural(_resample(best, data, delta, resamples, rng, progress), data)
    result = {
        "objective": float(objective.min()),
        "huber_delta": delta,
        **{k: float(v) for k, v in law.items()},
        "a": float(law["beta"] / (law["alpha"] + law["beta"])),
        "b": float(law["alpha"] / (law["alpha"] + law["beta"])),
        "flops_per_param_token": points.flops_per_param_token,
        "noise": {"relative": float(np.sqrt((residual**2).sum() / dof)), "dof": dof},
        "at_bounds": [n for n, hit in _at_bounds(best[None], data).items() if hit[0]],
        "residuals": residual.tolist(),
    }
    return result, draws


def optimum(law: dict[str, Any], flops: float, k: float) -> tuple[Any, Any, Any]:
    """(N*, D*, L*) where C = k N D (Hoffmann et al. 2022, eq. 4); law values are scalars or [r]."""
    alpha, beta = law["alpha"], law["beta"]
    G = np.log(alpha * law["A"] / (beta * law["B"])) / (alpha + beta)
    # At least one parameter and one token: a resampled law may have its optimum anywhere.
    log_n = np.clip(G + beta / (alpha + beta) * np.log(flops / k), 0, np.log(flops / k))
    log_d = np.log(flops / k) - log_n
    return np.exp(log_n), np.exp(log_d), loss(law, np.exp(log_n), np.exp(log_d))


def loss(law: dict[str, Any], params: Any, tokens: Any) -> Any:
    """L(N, D), nats per token."""
    terms = law["A"] / params ** law["alpha"] + law["B"] / tokens ** law["beta"]
    return law["E"] + terms


# ------------------------------------------------------------------------------------ data, starts


def _check(points: Points) -> None:
    log_n, log_d = np.log(points.params), np.log(points.tokens)
    distinct = len(np.unique(np.round(np.stack([log_n, log_d], 1), 6), axis=0))
    if distinct < 6:
        raise Refusal(f"{distinct} distinct (N, D), six needed for five parameters")
    for name, values in (("N", log_n), ("D", log_d)):
        if len(np.unique(np.round(values, 2))) < 3:
            raise Refusal(f"fewer than three values of {name}")
    r = np.corrcoef(log_n, log_d)[0, 1]
    if abs(r) > 0.999:
        raise Refusal(
            f"ln N and ln D lie on one line (correlation {r:.4f}): A and B cannot be told apart"
        )
    if np.ptp(np.log(points.loss)) < 1e-6:
        raise Refusal("all losses are equal")


def _data(points: Points) -> _Data:
    log_n, log_d, y = np.log(points.params), np.log(points.tokens), np.log(points.loss)
    center = float(log_n.mean()), float(log_d.mean())
    # E from a thousandth of the smallest loss up to it; A' and B' within any sense.
    low = np.array([y.min() - 20, y.min() - 20, y.min() - 7, MIN_POWER, MIN_POWER])
    high = np.array([y.max() + 10, y.max() + 10, y.min(), MAX_POWER, MAX_POWER])
    return _Data(log_n - center[0], log_d - center[1], y, center, low, high)


def _start(data: _Data, alpha: float, beta: float) -> np.ndarray:
    """theta with (A', B', E) that fit the relative residuals best at these powers."""
    from scipy.optimize import nnls

    terms = np.stack([np.exp(-alpha * data.x), np.exp(-beta * data.z), np.ones_like(data.x)], 1)
    found, _ = nnls(terms / np.exp(data.y)[:, None], np.ones(len(data.y)))
    return np.array([*np.log(np.maximum(found, 1e-3 * np.exp(data.y.min()))), alpha, beta])


def _natural(theta: np.ndarray, data: _Data) -> dict[str, np.ndarray]:
    """The law's own parameters; an E at its lower bound is 0."""
    a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
    A, B = np.exp(a + alpha * data.center[0]), np.exp(b + beta * data.center[1])
    E = np.where(e > data.low[2], np.exp(e), 0.0)
    return {"E": E, "A": A, "B": B, "alpha": alpha, "beta": beta}


def _at_bounds(theta: np.ndarray, data: _Data) -> dict[str, np.ndarray]:
    close = (theta <= data.low + 1e-6) | (theta >= data.high - 1e-6)
    return dict(zip(("A", "B", "E", "alpha", "beta"), close.T, strict=True))


# ------------------------------------------------------------------------------------- the minimum


def _mixture(theta: np.ndarray, data: _Data) -> tuple[np.ndarray, np.ndarray]:
    """(ln L [r, n], shares of the three terms [3, r, n]) for theta [r, 5]."""
    a, b, e, alpha, beta = theta.T[:, :, None]
    terms = np.stack([a - alpha * data.x, b - beta * data.z, e + 0 * data.x])
    top = terms.max(0)
    share = np.exp(terms - top)
    total = share.sum(0)
    return top + np.log(total), share / total


def _objective(theta: np.ndarray, data: _Data, weight: np.ndarray, delta: float) -> np.ndarray:
    r = np.abs(_mixture(theta, data)[0] - data.y)
    return (weight * np.where(r <= delta, 0.5 * r * r, delta * (r - 0.5 * delta))).sum(1)


def _derivatives(
    theta: np.ndarray, data: _Data, weight: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(gradient [r, 5], Hessian [r, 5, 5], diagonal of the reweighted J'J [r, 5])."""
    x, z = data.x, data.z
    log_loss, (p, q, s) = _mixture(theta, data)
    r = log_loss - data.y
    inside = np.abs(r) <= delta
    psi = weight * np.clip(r, -delta, delta)
    J = np.stack([p, q, s, -x * p, -z * q], -1)
    gradient = np.einsum("rn,rnk->rk", psi, J)
    scale = np.einsum("rn,rnk->rk", weight * delta / np.maximum(np.abs(r), delta), J * J)
    # d2 of a log-sum-exp: the shares' second moments minus J J'.
    H = np.matmul(((weight * inside - psi)[..., None] * J).swapaxes(1, 2), J)
    for k, at, share in ((0, x, p), (1, z, q)):
        first = (psi * share * at).sum(1)
        H[:, k, k] += (psi * share).sum(1)
        H[:, k, k + 3] -= first
        H[:, k + 3, k] -= first
        H[:, k + 3, k + 3] += (psi * share * at * at).sum(1)
    H[:, 2, 2] += (psi * s).sum(1)
    return gradient, H, scale


def _minimise(
    theta: np.ndarray, data: _Data, weight: np.ndarray, delta: float, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """(theta [r, 5], objective [r]) by damped Newton steps within bounds.

    `weight` is [r, n] or [1, n]. A step that does not lower the objective is not taken and the
    damping (of Levenberg and Marquardt, on the diagonal of J'J) rises; a problem leaves the batch
    when its gain falls below 1e-12 of the objective or no step helps.
    """
    theta = np.clip(theta, data.low, data.high)
    weight = np.broadcast_to(weight, (len(theta), weight.shape[1]))
    value = _objective(theta, data, weight, delta)
    damping = np.full(len(theta), 1e-2)
    live = np.arange(len(theta))
    for _ in range(iterations):
        if not len(live):
            break
        now, w = theta[live], weight[live]
        gradient, H, scale = _derivatives(now, data, w, delta)
        fixed = ((now <= data.low) & (gradient > 0)) | ((now >= data.high) & (gradient < 0))
        gradient[fixed] = 0
        H[fixed[:, :, None] | fixed[:, None, :]] = 0
        diagonal = np.arange(5)
        H[:, diagonal, diagonal] += damping[live, None] * (scale + 1e-12) + fixed
        step = -np.linalg.solve(H, gradient[..., None])[..., 0]
        new = np.clip(now + np.clip(step, -1, 1), data.low, data.high)
        found = _objective(new, data, w, delta)
        better = found < value[live]
        gain = value[live] - found
        theta[live[better]] = new[better]
        done = np.where(better, gain <= 1e-12 * value[live], np.abs(step).max(1) < 1e-9)
        value[live[better]] = found[better]
        damping[live] = np.clip(damping[live] * np.where(better, 0.2, 6.0), 1e-9, None)
        live = live[~(done | (damping[live] > 1e9))]
    return theta, value


def _resample(
    best: np.ndarray,
    data: _Data,
    delta: float,
    resamples: int,
    rng: np.random.Generator,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """theta [r, 5] of the resamples, in batches that stay in the cache."""
    n = len(data.y)
    steps = 10 if n >= _MANY else 100
    starts = np.stack([best, *(_start(data, p, q) for p, q in _OTHER_STARTS)])
    batch = max(8, 8000 // n)
    found = [np.empty((0, 5))]
    for first in range(0, resamples, batch):
        size = min(batch, resamples - first)
        weight = rng.dirichlet(np.ones(n), size) * n
        tiled = np.tile(weight, (len(starts), 1))
        theta, value = _minimise(np.repeat(starts, size, 0), data, tiled, delta, steps)
        winner = value.reshape(len(starts), size).argmin(0)
        theta = theta.reshape(len(starts), size, 5)[winner, np.arange(size)]
        found.append(_minimise(theta, data, weight, delta, 100 - steps)[0])
        if progress:
            progress(first + size, resamples)
    return np.concatenate(found)
