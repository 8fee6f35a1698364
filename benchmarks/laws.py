"""Approach 3's law: 4,500 starts and 4,000 warm resamples, against scipy's L-BFGS one by one.

    python benchmarks/laws.py epoch_chinchilla.csv    (the README's published law; 240 points)

scipy gets the analytic gradient, runs to 1e-15 of the objective x 1e6, and is timed on 100 of each.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from scipy.optimize import minimize

from jaxlm.scaling import robust, runs
from jaxlm.scaling.forms import FORMS

STARTS, RESAMPLES, TIMED = 4500, 4000, 100


def scipy_objective(theta, x, z, y, weight, delta=1e-3):
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * x, b - beta * z, np.full_like(x, e)])
    top = terms.max(0)
    share = np.exp(terms - top)
    total = share.sum(0)
    r, (p, q, s) = top + np.log(total) - y, share / total
    value = np.where(abs(r) <= delta, 0.5 * r * r, delta * (abs(r) - 0.5 * delta))
    g = weight * np.clip(r, -delta, delta)
    slope = [(g * p).sum(), (g * q).sum(), (g * s).sum(), -(g * p * x).sum(), -(g * q * z).sum()]
    return 1e6 * (weight * value).sum(), 1e6 * np.array(slope)


def main(path: str) -> None:
    columns = {"params": "Model Size", "flops": "Training FLOP", "loss": "loss"}
    points = runs.from_csv(path, columns)
    points = points.drop(np.argsort(points.loss)[-5:], "as published")
    data = {"params": points.params, "tokens": points.tokens}
    table, rng, n = (
        robust.Table(FORMS["chinchilla"], data, points.loss),
        np.random.default_rng(0),
        240,
    )
    clocks = [(time.perf_counter(), time.process_time())]
    theta, value = robust.minimise(table, robust.starts(table, STARTS, rng))
    clocks.append((time.perf_counter(), time.process_time()))
    weight = rng.dirichlet(np.ones(n), RESAMPLES) * n
    robust.minimise(table, np.tile(theta[value.argmin()], (RESAMPLES, 1)), weight)
    clocks.append((time.perf_counter(), time.process_time()))
    best = value.min()
    hit = (value < best * (1 + 1e-6)).mean()
    (w0, c0), (w1, c1), (w2, c2) = clocks
    print(f"jaxlm: starts {w1 - w0:.2f} s (CPU {c1 - c0:.2f}), {hit:.1%} at {best:.7g};"
          f" resamples {w2 - w1:.2f} s (CPU {c2 - c1:.2f}); compilation included")  # fmt: skip
    x, z, y = np.log(points.params), np.log(points.tokens), np.log(points.loss)
    how = {"maxiter": 15000, "maxfun": 15000, "ftol": 1e-15, "gtol": 1e-10}
    natural = robust.natural(table, theta[[value.argmin()]])
    law = {k: v[0] for k, v in natural.items()}
    warm = [*(np.log(law[k]) for k in "ABE"), law["alpha"], law["beta"]]
    c3, reached = time.process_time(), 0
    for _ in range(TIMED):
        start = rng.uniform([0, 0, -1, 0, 0], [25, 25, 1, 2, 2])
        found = minimize(
            scipy_objective, start, (x, z, y, np.ones(n)), "L-BFGS-B", True, options=how
        )
        reached += found.fun / 1e6 < best * (1 + 1e-6)
    c4 = time.process_time()
    for i in range(TIMED):
        minimize(scipy_objective, warm, (x, z, y, weight[i]), "L-BFGS-B", True, options=how)
    c5 = time.process_time()
    whole = (STARTS * (c4 - c3) + RESAMPLES * (c5 - c4)) / TIMED
    share, ratio = reached / TIMED, whole / (c2 - c0)
    print(f"scipy: {whole:.0f} s of CPU in all, {share:.0%} at the optimum; ratio {ratio:.0f}")


if __name__ == "__main__":
    main(sys.argv[1])
