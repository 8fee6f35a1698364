"""Did a change help? Paired runs, a sequential test, and what the change does to the law.

A pair is a run of A and a run of B with the same seed, data order, shape and budget; its gain is
ln loss(A) - ln loss(B). A test looks after every seed and ends as soon as it can tell. The looks
share one level, so that all of them together call an A/A pair different in 5 % (a constant
threshold on the p-value of a paired t-test, Pocock 1977, found by simulating this very test).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Json = dict[str, Any]
FIRST = 4  # pairs before the first look: fewer have no scatter to speak of
MOST = 12  # 97 % of the changes worth two noise floors are found by then
LEVEL = 0.05
_TRIALS = 40_000


class Pair(NamedTuple):
    """`scale`: what one budget and shape is called; `flops`: of A's run there."""

    seed: int
    scale: str
    flops: float
    loss_a: float
    loss_b: float

    @property
    def gain(self) -> float:
        """Relative improvement of the loss by B."""
        return float(np.log(self.loss_a / self.loss_b))


@functools.cache
def threshold(most: int, first: int = FIRST, level: float = LEVEL) -> float:
    """The p-value below which any look from pair `first` to `most` calls a difference."""
    d = np.random.default_rng(0).standard_normal((_TRIALS, most))
    return float(np.quantile(_p_values(d)[:, first - 1 :].min(1), level))


def _p_values(gains: np.ndarray) -> np.ndarray:
    """Two-sided p-values [r, n] of the paired t-test after each of the gains [r, n]."""
    from scipy.stats import t

    n = np.arange(1, gains.shape[1] + 1)
    mean = np.cumsum(gains, 1) / n
    variance = (np.cumsum(gains**2, 1) / n - mean**2) * n / np.maximum(n - 1, 1)
    statistic = np.abs(mean) / np.sqrt(np.maximum(variance, 1e-300) / n)
    return np.where(n > 1, 2 * t.sf(statistic, np.maximum(n - 1, 1)), 1.0)


def decide(
    gains: Sequence[float], smallest: float, most: int = MOST, first: int = min(FIRST, MOST)
) -> Json:
    """The verdict after these gains (one per seed, in order): "better" or "worse" (B than A), "no
    difference" of as much as `smallest`, or "open": another pair is needed.

    `ci95` holds at whichever look the test ends.
    """
    from scipy.stats import t

    d = np.asarray(gains, float)
    n, alpha = len(d), threshold(most, first)
    if n < 2:
        return {"verdict": "open", "pairs": n, "gain": float(d.mean()) if n else None,
                "ci95": None, "p": None, "threshold": alpha}  # fmt: skip
    p = float(_p_values(d[None])[0, -1])
    half = float(t.ppf(1 - alpha / 2, n - 1) * d.std(ddof=1) / np.sqrt(n))
    ci = [float(d.mean()) - half, float(d.mean()) + half]
    verdict = "open"
    if n >= first and p < alpha:
        verdict = "better" if d.mean() > 0 else "worse"
    elif n >= most or (n >= first and -smallest < ci[0] and ci[1] < smallest):
        verdict = "no difference"
    return {"verdict": verdict, "pairs": n, "gain": float(d.mean()), "ci95": ci, "p": p,
            "threshold": alpha}  # fmt: skip


def noise_floor(pairs: Sequence[Pair]) -> float | None:
    """Scatter of ln loss between seeds, pooled over both arms and all scales; None below two
    seeds."""
    squares, dof = 0.0, 0
    for scale in {p.scale for p in pairs}:
        for arm in ("loss_a", "loss_b"):
            losses = np.log([getattr(p, arm) for p in pairs if p.scale == scale])
            squares += float(((losses - losses.mean()) ** 2).sum())
            dof += len(losses) - 1
    return float(np.sqrt(squares / dof)) if dof else None


def compare(pairs: Sequence[Pair], most: int = MOST, smallest: float | None = None) -> Json:
    """All that the pairs say (jaxlm.compare/1 without its names).

    `smallest`: the relative gain that is worth finding; None: twice the noise floor. A seed counts
    once all its scales are there; its gain is the mean over them.
    """
    scales = sorted({p.scale: p.flops for p in pairs}.items(), key=lambda s: s[1])
    by_seed: dict[int, list[Pair]] = {}
    for p in pairs:
        by_seed.setdefault(p.seed, []).append(p)
    whole = [s for s in sorted(by_seed) if len(by_seed[s]) == len(scales)]
    floor = noise_floor(pairs)
    worth = smallest if smallest is not None else 2 * (floor or 0.0)
    gains = np.array([[next(p.gain for p in by_seed[s] if p.scale == name) for name, _ in scales]
                      for s in whole]).reshape(len(whole), len(scales))  # fmt: skip
    return {
        "noise_floor": floor,
        "smallest": worth,
        "effect": decide(gains.mean(1), worth, most),
        "scales": [
            {"scale": name, "flops": flops, **_mean(gains[:, i])}
            for i, (name, flops) in enumerate(scales)
        ],
        "law": _trend(gains, np.log([flops for _, flops in scales]), pairs),
        "pairs": [p._asdict() | {"gain": p.gain} for p in pairs],
    }


def _mean(values: np.ndarray) -> Json:
    """Mean and 95 % t-interval over seeds."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return {"gain": float(values.mean()) if n else None, "ci95": None, "seeds": n}
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    mean = float(values.mean())
    return {"gain": mean, "ci95": [mean - half, mean + half], "seeds": n}


def _trend(gains: np.ndarray, log_flops: np.ndarray, pairs: Sequence[Pair]) -> Json | None:
    """What the change does to the law: the gain's slope per decade of compute, over seeds; and the
    compute that A would need for what B reaches, by how A's best losses fall with compute."""
    budgets = np.unique(np.round(log_flops, 2))
    if len(budgets) < 2:
        return None
    x = log_flops - log_flops.mean()
    slopes = _mean(gains @ x / (x @ x) * np.log(10))
    verdict = "unknown"
    if slopes["ci95"]:
        low, high = slopes["ci95"]
        verdict = "holds" if low <= 0 <= high else "grows" if low > 0 else "shrinks"
    best: dict[float, float] = {}
    for p in pairs:
        key = round(float(np.log(p.flops)), 2)
        best[key] = min(best.get(key, np.inf), p.loss_a)
    falls = -float(np.polyfit(list(best), np.log(list(best.values())), 1)[0])
    mean = float(gains.mean()) if gains.size else 0.0
    return {
        "gain_per_decade": slopes["gain"],
        "ci95": slopes["ci95"],
        "verdict": verdict,
        "loss_exponent_of_a": falls,
        "compute_multiplier": float(np.exp(mean / falls)) if falls > 0 else None,
    }
