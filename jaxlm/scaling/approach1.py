"""Approach 1: the lower envelope of the training curves (Hoffmann et al. 2022, section 3.1).

Every curve is smoothed and read on a logarithmic grid of FLOPs; the smallest loss over all runs is
the envelope, and the run that has it tells N* there. Three things differ from the paper, for a
learning rate that has not decayed yet makes a run look worse than its budget allows, and a ladder
has few sizes:

- a curve is scaled to end at its run's evaluated loss, where the table has the run; seeds of one
  size and budget are averaged;
- a run enters at most once: where it comes closest to the envelope's lower convex hull (in logs,
  where a law's frontier is convex), or at its end if that is as close within the curve's scatter,
  and only if it is the best run there. For schedules that decay to their horizon these are the ends
  of the best runs, for a constant learning rate the point of tangency of every size;
- N* and L* are the vertex of the parabola in ln N through the best size and its two neighbours.

A point whose best run is the smallest or the largest there is refused: its optimum is not
bracketed. Intervals: every run's loss moves by the noise of the ladder (see `isoflop.noise`), and
the best size and its parabola are taken anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.scaling import frontier, isoflop
from jaxlm.scaling.frontier import Optima, Refusal
from jaxlm.scaling.isoflop import BUDGET_WIDTH
from jaxlm.scaling.runs import Curve, Points
from jaxlm.schema import UserError

TOLERANCE = 0.02  # of a loss, above the hull: beyond it a point is not on the frontier
_GRID = 512
_SMOOTHING = 0.15  # of a curve's points: the window of the smoothing


class _Track(NamedTuple):
    """A smoothed curve: ln FLOPs and ln loss [p], the scatter that is left in ln loss, and how many
    runs it is the mean of."""

    params: float
    log_flops: np.ndarray
    log_loss: np.ndarray
    scatter: float
    runs: int
    name: str


class _Place(NamedTuple):
    """Where `run` is on the frontier: the grid point, and the tracks to compare it with there."""

    at: int
    run: int
    peers: np.ndarray


def fit(
    curves: Sequence[Curve], points: Points, resamples: int, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(result as JSON values, draws by name [r]). Raises Refusal, or UserError on a bad curve."""
    if not curves:
        raise Refusal("no training curves given")
    tracks = _merged([_track(c, points) for c in curves])
    sizes = len({t.params for t in tracks})
    if sizes < 3:
        raise Refusal(f"{sizes} sizes among the curves, three needed")
    log_flops, table = _table(tracks)
    chosen, refused = _frontier(log_flops, table, tracks)
    if len(chosen) < 2:
        why = "; ".join(f"C = {r['flops']:.2g}: {r['reason']}" for r in refused[:4])
        raise Refusal(f"{len(chosen)} points on the envelope, two needed ({why or 'none refused'})")
    noise = isoflop.noise(points, isoflop.slices(points)[0])
    at = np.array([p.at for p in chosen])
    flops, k = np.exp(log_flops[at]), points.flops_per_param_token
    here, curvature = _optima(flops, table[None, :, at], tracks, chosen, k, noise.relative)
    optima = Optima(flops, here.params[0], here.tokens[0], here.loss[0], here.se)
    law = frontier.fit(optima)
    sigma = noise.draw(resamples, rng)
    spread = sigma[:, None, None] / np.sqrt([t.runs for t in tracks])[:, None]
    moved = table[:, at] + spread * rng.standard_normal((resamples, len(tracks), 1))
    resampled, curvature_r = _optima(flops, moved, tracks, chosen, k, noise.relative)
    draws = frontier.draw(law, resampled, rng) | {"curvature": curvature_r, "noise": sigma}
    names = [tracks[p.run].name for p in chosen]
    result = {
        "a": law["params"][1],
        "b": law["tokens"][1],
        "minima": [row | {"name": n} for row, n in zip(optima.rows(), names, strict=True)],
        "refused": refused,
        "noise": dataclasses.asdict(noise),
        "curvature": float(curvature[0]),
        "frontier": law,
    }
    return result, draws


def _track(curve: Curve, points: Points) -> _Track:
    """The curve, smoothed, scaled to end at its run's loss in the table."""
    from scipy.signal import savgol_filter

    where = f"curve {curve.name or curve.params}"
    flops, loss = np.asarray(curve.flops, np.float64), np.asarray(curve.loss, np.float64)
    if flops.shape != loss.shape or flops.ndim != 1:
        raise UserError(f"{where}: expected two equally long rows of FLOPs and losses")
    good = np.isfinite(loss) & (loss > 0) & (flops > 0)
    if good.sum() < 3 or np.any(np.diff(flops[good]) <= 0):
        raise UserError(f"{where}: expected three points or more, rising FLOPs and losses above 0")
    log_flops, raw = np.log(flops[good]), np.log(loss[good])
    window = min(len(raw), max(3, round(_SMOOTHING * len(raw))))
    log_loss = savgol_filter(raw, window, 2)  # parabolas, so that a falling end stays where it is
    # Second differences see the scatter (variance times 6), not the trend. At a curve's end the
    # smoothing leaves 9 / window of the variance.
    scatter = np.median(np.abs(np.diff(raw, 2))) / 0.6745 * np.sqrt(min(1, 9 / window) / 6)
    if curve.name and curve.name in points.name:
        same = np.array([name == curve.name for name in points.name])
    else:
        # Seeds of one size at one budget share their mean: a curve without a name is any of them.
        sizes = np.abs(np.log(points.params / curve.params)) < 1e-6
        same = sizes & (np.abs(np.log(points.flops) - log_flops[-1]) < 0.02)
    if same.any():
        log_loss += np.log(points.loss[same]).mean() - log_loss[-1]
    return _Track(float(curve.params), log_flops, log_loss, float(scatter), 1, curve.name)


def _merged(tracks: Sequence[_Track]) -> list[_Track]:
    """One track per size and end: the mean of its seeds."""
    kinds: dict[tuple[float, float], list[_Track]] = {}
    for t in tracks:
        kinds.setdefault((t.params, round(float(t.log_flops[-1]), 3)), []).append(t)
    found = []
    for same in kinds.values():
        first, n = same[0], len(same)
        log_loss = np.mean([np.interp(first.log_flops, t.log_flops, t.log_loss) for t in same], 0)
        scatter = float(np.mean([t.scatter for t in same]) / np.sqrt(n))
        found.append(first._replace(log_loss=log_loss, scatter=scatter, runs=n))
    return found


def _table(tracks: Sequence[_Track]) -> tuple[np.ndarray, np.ndarray]:
    """(ln FLOPs [g], ln loss [tracks, g]), inf where a curve does not reach.

    From the smallest end of a run to the largest, ends included: before it no run was finished.
    Where all end together, from where all have begun. A finished run keeps its loss for another
    10 % of compute, so that runs of one budget end together.
    """
    ends = np.array([t.log_flops[-1] for t in tracks])
    slack = np.log(BUDGET_WIDTH)
    low = ends.min() if np.ptp(ends) > slack else max(t.log_flops[0] for t in tracks)
    grid = np.union1d(np.linspace(low, ends.max(), _GRID), ends)
    rows = []
    for t in tracks:
        reaches = (grid >= t.log_flops[0]) & (grid <= t.log_flops[-1] + slack)
        rows.append(np.where(reaches, np.interp(grid, t.log_flops, t.log_loss), np.inf))
    return grid, np.stack(rows)


def _frontier(
    log_flops: np.ndarray, table: np.ndarray, tracks: Sequence[_Track]
) -> tuple[list[_Place], list[dict[str, Any]]]:
    """(places that count, one per best run, rising in FLOPs; the others and why not)."""
    params = np.array([t.params for t in tracks])
    best = table.argmin(0)
    gap = table - _lower_hull(log_flops, table.min(0))
    chosen, refused = [], []
    for run in dict.fromkeys(best.tolist()):
        end = int(np.searchsorted(log_flops, tracks[run].log_flops[-1]))
        at = int(gap[run].argmin())
        if gap[run, end] <= gap[run, at] + 3 * tracks[run].scatter:
            at = end
        if best[at] != run or gap[run, at] > TOLERANCE:
            continue
        peers = _peers(log_flops[at], np.isfinite(table[:, at]), tracks)
        sizes = np.unique(params[peers])
        if len(sizes) < 3:
            reason = f"runs of {len(sizes)} sizes reach it"
        elif params[run] in (sizes[0], sizes[-1]):
            side = "smallest" if params[run] == sizes[0] else "largest"
            reason = f"the best run is the {side} of {len(sizes)} sizes there"
        else:
            chosen.append(_Place(at, run, peers))
            continue
        refused.append({"flops": float(np.exp(log_flops[at])), "reason": reason})
    return sorted(chosen, key=lambda place: place.at), refused


def _peers(log_flops: float, alive: np.ndarray, tracks: Sequence[_Track]) -> np.ndarray:
    """Tracks that end at this compute if they are of three sizes or more, else all that are there:
    next to finished runs those on their way to a larger budget have not decayed yet."""
    ends = np.array([t.log_flops[-1] for t in tracks])
    ending = np.flatnonzero(alive & (np.abs(ends - log_flops) < np.log(BUDGET_WIDTH)))
    if len({tracks[int(i)].params for i in ending}) >= 3:
        return ending
    return np.flatnonzero(alive & (ends > log_flops - 1e-6))


def _lower_hull(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The lower convex hull of (x, y), x rising, read at x (Andrew's monotone chain)."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            j, k = hull[-2], hull[-1]
            if (y[k] - y[j]) * (x[i] - x[j]) < (y[i] - y[j]) * (x[k] - x[j]):
                break
            hull.pop()
        hull.append(i)
    return np.interp(x, x[hull], y[hull])


def _optima(
    flops: np.ndarray,
    log_loss: np.ndarray,
    tracks: Sequence[_Track],
    places: Sequence[_Place],
    flops_per_param_token: float,
    noise: float,
) -> tuple[Optima, np.ndarray]:
    """(optima [r, k], relative curvature [r]) from ln losses [r, tracks, k]."""
    vertices = []
    for k, place in enumerate(places):
        params = np.array([tracks[i].params for i in place.peers])
        sizes = np.unique(params)
        rows = [log_loss[:, place.peers[params == n], k].min(1) for n in sizes]
        vertices.append(_vertex(np.log(sizes), np.exp(rows).T))
    log_size, loss, bend = (np.stack(v, 1) for v in zip(*vertices, strict=True))
    tokens = flops / (flops_per_param_token * np.exp(log_size))
    se = np.full(len(flops), noise)
    return Optima(flops, np.exp(log_size), tokens, loss, se), bend.mean(1)


def _vertex(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x*, y*, relative curvature) [r] of the parabola through the smallest inner y [r, sizes] and
    its two neighbours; x* stays between them."""
    r = np.arange(len(y))
    i = y[:, 1:-1].argmin(1) + 1
    left, right = x[i - 1] - x[i], x[i + 1] - x[i]
    below, above = y[r, i - 1] - y[r, i], y[r, i + 1] - y[r, i]
    bend = (above / right - below / left) / (right - left)
    slope = above / right - bend * right
    with np.errstate(divide="ignore", invalid="ignore"):
        move = np.where(bend > 0, -slope / (2 * bend), 0.0)
    move = np.clip(move, left, right)
    low = np.maximum(y[r, i] + slope * move + bend * move**2, 0.1 * y[r, i])
    return x[i] + move, low, bend / low
