"""The fitter of every law in `forms`: many starts, resamples and profiles solved at once.

Minimised is the Huber loss, summed, of ln(law) - ln(measured) (Hoffmann et al. 2022, eq. 3), or of
law - measured. Each problem is a damped Newton iteration on exact second derivatives, which jax
takes from the law; float64 throughout, for the sum is about 1e-3 and its valleys are long. Before
that, every coefficient is referred to the middle of the data (the mean of its term's log), which
takes the correlation of 0.9999 out of a coefficient and its exponent, and every start solves its
coefficients by non-negative least squares (variable projection). A parameter is held by equal
bounds, so that a profile is nothing but more problems. Problems leave the batch when they are done
and others take their place; one compilation per form and table serves them all.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.scaling.forms import Form

Residual = Literal["log", "value"]
_BATCH = 64  # problems at once per thread: their arrays stay in the cache
_STEPS = 4  # Newton steps before finished problems leave the batch
_TOLERANCE = 1e-12  # of the objective: a smaller gain ends a problem


@dataclass(frozen=True)
class Table:
    """What is fitted: columns of the form, float64 [n], the measured target [n], and the values of
    parameters that are given and not fitted."""

    form: Form
    columns: dict[str, np.ndarray]
    target: np.ndarray
    residual: Residual = "log"
    delta: float = 1e-3
    fixed: Mapping[str, float] = field(default_factory=dict)

    def rows(self, keep: np.ndarray) -> Table:
        columns = {k: v[keep] for k, v in self.columns.items()}
        return Table(
            self.form, columns, self.target[keep], self.residual, self.delta, dict(self.fixed)
        )

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.form.coefficients, *(f.name for f in self.form.free))

    @property
    def fitted(self) -> tuple[str, ...]:
        return tuple(n for n in self.names if n not in self.fixed)


class _Problems(NamedTuple):
    """A batch, first axis r: where each is, how good, its damping, whether it is done; its weights
    [r, n], its measurements [r, n] and its bounds [r, k]."""

    theta: Any
    value: Any
    damping: Any
    done: Any
    weight: Any
    target: Any
    low: Any
    high: Any


# --------------------------------------------------------------------------------- a law as numbers


def float64(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with 64-bit numbers on the CPU, also in a thread of its own."""

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            return call(*args, **kwargs)

    return wrapped


def _scale(form: Form, columns: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """(smallest, largest / smallest) of the column that a free parameter is measured in."""
    units = [columns[f.unit] if f.unit else jnp.ones(1) for f in form.free]
    return [(u.min(), u.max() / u.min()) for u in units]


def _unpack(
    form: Form, fixed: tuple[tuple[str, float], ...], theta: Any, columns: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Any], Any]:
    """(natural parameters, ln coefficients, outer power) at theta [k]."""
    given, p, count = dict(fixed), {}, len(form.coefficients)
    for at, free, (unit, span) in zip(theta[count:], form.free, _scale(form, columns), strict=True):
        if free.scale == "log":
            natural = jnp.exp(at)
        elif free.scale == "within":
            natural = unit * span**at
        else:
            natural = unit * at
        p[free.name] = given.get(free.name, natural)
    power = form.power(p) if form.power else 1.0
    logs = []
    for at, name, term in zip(
        theta, form.coefficients, (form.anchors or form.terms)(p, columns), strict=False
    ):
        log = jnp.log(given[name]) if name in given else at / power - jnp.mean(term)
        p[name] = jnp.exp(log)
        logs.append(log)
    return p, logs, power


def _predict(form: Form, p: Any, logs: Any, power: Any, columns: Any, log: bool) -> Any:
    """The law [n], or its logarithm."""
    terms = jnp.stack([a + t + 0 * columns[form.columns[0]] for a, t in
                       zip(logs, form.terms(p, columns), strict=True)])  # fmt: skip
    signs = jnp.array(form.signs or (1,) * len(terms))[:, None]
    if not log:
        return (signs * jnp.exp(terms)).sum(0) ** power
    return power * jax.nn.logsumexp(terms, axis=0)


def law(form: Form, parameters: Mapping[str, Any], columns: Mapping[str, Any]) -> np.ndarray:
    """The law at `columns`. Parameters are scalars or [r]; columns [m] or [r, m]; gives [m] or
    [r, m]."""
    p = {k: np.asarray(v, np.float64) for k, v in parameters.items()}
    if any(v.ndim for v in p.values()):
        p = {k: v[..., None] for k, v in p.items()}
    at = {k: np.atleast_1d(np.asarray(columns[k], np.float64)) for k in form.columns}
    return np.asarray(float64(_law(form))(p, at))


@functools.cache
def _law(form: Form) -> Any:
    def value(p: Any, columns: Any) -> Any:
        power = form.power(p) if form.power else 1.0
        signs = form.signs or (1,) * len(form.coefficients)
        parts = [s * p[n] * jnp.exp(t) for s, n, t in
                 zip(signs, form.coefficients, form.terms(p, columns), strict=True)]  # fmt: skip
        shape = columns[form.columns[0]] * 0
        return (sum(parts) + shape) ** power

    return jax.jit(value)


@float64
def natural(table: Table, theta: np.ndarray) -> dict[str, np.ndarray]:
    """The law's own parameters at theta [r, k]; an asymptote at its lower bound is 0."""
    call = _natural(table.form, tuple(sorted(table.fixed.items())))
    found = {name: np.empty(len(theta)) for name in table.names}
    for rows in np.split(np.arange(len(theta)), range(_BATCH, len(theta), _BATCH)):
        if len(rows):
            p = call(theta[np.resize(rows, _BATCH)], table.columns)  # one shape, one compilation
            for name in table.names:
                value = np.broadcast_to(np.asarray(p[name]), _BATCH)
                found[name][rows] = value[: len(rows)]
    low, _ = bounds(table)
    for name in table.form.asymptotes:
        if name not in table.fixed:
            k = table.names.index(name)
            found[name][theta[:, k] <= low[k] + 1e-9] = 0.0
    return found


@functools.cache
def _natural(form: Form, fixed: tuple[tuple[str, float], ...]) -> Any:
    def one(theta: Any, columns: Any) -> Any:
        return _unpack(form, fixed, theta, columns)[0]

    return jax.jit(jax.vmap(one, (0, None)))


def bounds(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """(low [k], high [k]) of theta: coefficients about the size of the target, in its logarithm."""
    y = np.log(table.target)
    low, high = [], []
    for name in table.form.coefficients:
        asymptote = name in table.form.asymptotes
        low.append(y.min() - (7 if asymptote else 20))
        high.append(y.min() if asymptote else y.max() + 10)
    for free in table.form.free:
        low.append(np.log(free.low) if free.scale == "log" else free.low)
        high.append(np.log(free.high) if free.scale == "log" else free.high)
    low_k, high_k = np.array(low), np.array(high)
    for k, name in enumerate(table.names):
        if name in table.fixed:
            low_k[k] = high_k[k] = 0.0  # not looked at
    return low_k, high_k


# ------------------------------------------------------------------------------------------ starts


@float64
def starts(table: Table, count: int, rng: np.random.Generator) -> np.ndarray:
    """theta [r, k] of at most `count` starts: the free parameters' starting values, all with all
    (a random choice where those are more; jittered repeats where they are fewer than `count`), and
    the coefficients that fit best at each."""
    axes = [
        [0.0] if f.name in table.fixed else np.log(f.starts) if f.scale == "log" else f.starts
        for f in table.form.free
    ]
    grid = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")], 1)
    if len(grid) > count:
        grid = grid[rng.choice(len(grid), count, replace=False)]
    low, high = (b[len(table.form.coefficients) :] for b in bounds(table))
    while len(grid) < count:
        more = grid[: count - len(grid)]
        grid = np.concatenate(
            [grid, np.clip(more + 0.1 * (high - low) * rng.uniform(-1, 1, more.shape), low, high)]
        )
    return np.array([_projected(table, free) for free in grid])


def _projected(table: Table, free: np.ndarray) -> np.ndarray:
    """theta with the coefficients that fit the (relative) residuals best at these parameters."""
    from scipy.optimize import nnls

    form, fixed = table.form, tuple(sorted(table.fixed.items()))
    low, high = bounds(table)
    count = len(form.coefficients)
    theta = np.concatenate([np.clip(np.log(np.median(table.target)), low[:count], high[:count]),
                            free])  # fmt: skip
    for _ in range(2 if form.anchors else 1):
        basis, power = map(np.asarray, _basis(form, fixed)(theta, table.columns))
        y = table.target ** (1 / power)
        weight = 1 / y if table.residual == "log" else np.ones_like(y)
        signs = np.array(form.signs or (1,) * count)
        found, _ = nnls((signs * basis * weight[:, None]), y * weight)
        theta[:count] = np.clip(power * np.log(np.maximum(found, 1e-300)), low[:count],
                                high[:count])  # fmt: skip
        theta[:count] = np.maximum(theta[:count], np.log(table.target.min()) - 7)
    return theta


@functools.cache
def _basis(form: Form, fixed: tuple[tuple[str, float], ...]) -> Any:
    def terms(theta: Any, columns: Any) -> tuple[Any, Any]:
        """Each term [n, K] without its coefficient, referred to the middle of the data."""
        p, _, power = _unpack(form, fixed, theta, columns)
        middle = [jnp.mean(t) for t in (form.anchors or form.terms)(p, columns)]
        ones = jnp.ones_like(columns[form.columns[0]])
        found = [jnp.exp(t - m) * ones
                 for t, m in zip(form.terms(p, columns), middle, strict=True)]  # fmt: skip
        return jnp.stack(found, 1), jnp.asarray(power)

    return jax.jit(terms)


# ------------------------------------------------------------------------------------- the minimum


def _model(form: Form, fixed: Any, residual: Residual) -> Callable[[Any, Any], Any]:
    def model(theta: Any, columns: Any) -> Any:
        return _predict(form, *_unpack(form, fixed, theta, columns), columns, residual == "log")

    return model


@functools.cache
def _advance(form: Form, fixed: Any, residual: Residual, delta: float) -> Any:
    """A few Newton steps of a batch of problems, compiled."""
    model = _model(form, fixed, residual)

    def objective(theta: Any, columns: Any, target: Any, weight: Any) -> Any:
        r = jnp.abs(model(theta, columns) - target)
        return (weight * jnp.where(r <= delta, 0.5 * r * r, delta * (r - 0.5 * delta))).sum()

    def step(s: _Problems, columns: Any) -> _Problems:
        """One problem, one step; a step that does not lower the objective is not taken and the
        damping (of Levenberg and Marquardt, on the diagonal of J'J) rises."""
        k = s.theta.shape[0]
        r = model(s.theta, columns) - s.target
        J = jax.jacfwd(model)(s.theta, columns)
        psi = s.weight * jnp.clip(r, -delta, delta)
        gradient = psi @ J
        fixed_ = ((s.theta <= s.low) & (gradient >= 0)) | ((s.theta >= s.high) & (gradient <= 0))
        bend = jax.hessian(lambda t: (psi * model(t, columns)).sum())(s.theta)
        H = (J * (s.weight * (jnp.abs(r) <= delta))[:, None]).T @ J + bend
        scale = (s.weight * delta / jnp.maximum(jnp.abs(r), delta)) @ (J * J)
        free = ~fixed_
        H = jnp.where(free[:, None] & free[None, :], H, 0.0)
        H += jnp.diag(s.damping * (scale + 1e-12 * scale.max() + 1e-300) + fixed_)
        move = -jnp.linalg.solve(H, jnp.where(free, gradient, 0.0))
        move = jnp.where(jnp.isfinite(move), move, 0.0)
        new = jnp.clip(s.theta + jnp.clip(move, -1, 1), s.low, s.high)
        found = objective(new, columns, s.target, s.weight)
        better = (found < s.value) & ~s.done
        gain = s.value - found
        over = jnp.where(better, gain <= _TOLERANCE * s.value, jnp.abs(move).max() < 1e-9)
        damping = jnp.maximum(s.damping * jnp.where(better, 0.2, 6.0), 1e-9)
        return s._replace(
            theta=jnp.where(better, new, s.theta),
            value=jnp.where(better, found, s.value),
            damping=jnp.where(s.done, s.damping, damping),
            done=s.done | over | (damping > 1e9) | (k == 0),
        )

    @jax.jit
    def advance(s: _Problems, columns: Any) -> _Problems:
        value = jax.vmap(objective, (0, None, 0, 0))(s.theta, columns, s.target, s.weight)
        s = s._replace(value=value)
        steps = jax.vmap(step, (0, None))
        return jax.lax.fori_loop(0, _STEPS, lambda _, t: steps(t, columns), s)

    return advance


def minimise(
    table: Table,
    theta: np.ndarray,
    weight: np.ndarray | None = None,
    target: np.ndarray | None = None,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    iterations: int = 300,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(theta [r, k], objective [r]) from the starts theta [r, k].

    `weight`: [r, n] or [1, n] per run; `target`: [r, n] measurements in place of the table's;
    `low`, `high`: [r, k] in place of `bounds`. `progress(done, all)` counts finished problems.
    """
    r, n = len(theta), len(table.target)
    default = bounds(table)
    one = np.ones((1, n)) if weight is None else weight
    y = table.target[None] if target is None else target
    y = np.log(y) if table.residual == "log" else y
    full = _Problems(
        theta=np.array(theta, np.float64),
        value=np.full(r, np.inf),
        damping=np.full(r, 1e-2),
        done=np.zeros(r, bool),
        weight=np.broadcast_to(one, (r, n)),
        target=np.broadcast_to(y, (r, n)),
        low=np.broadcast_to(default[0] if low is None else low, theta.shape),
        high=np.broadcast_to(default[1] if high is None else high, theta.shape),
    )
    full.theta[:] = np.clip(full.theta, full.low, full.high)
    fixed = tuple(sorted(table.fixed.items()))
    delta = min(float(table.delta), 1e100)  # inf/inf is no number
    advance = _advance(table.form, fixed, table.residual, delta)
    spent = np.zeros(r, int)
    columns = {k: table.columns[k] for k in table.form.columns}

    def batch(rows: np.ndarray) -> np.ndarray:
        padded = np.resize(rows, _BATCH)
        out = float64(advance)(_Problems(*(a[padded] for a in full)), columns)
        for name in ("theta", "value", "damping", "done"):
            getattr(full, name)[rows] = np.asarray(getattr(out, name))[: len(rows)]
        spent[rows] += _STEPS
        return rows

    threads = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
    with ThreadPoolExecutor(threads or 1) as pool:
        while len(live := np.flatnonzero(~full.done & (spent < iterations))):
            parts = [live[i : i + _BATCH] for i in range(0, len(live), _BATCH)]
            list(pool.map(batch, parts[: 2 * (threads or 1)]))
            if progress:
                progress(int((full.done | (spent >= iterations)).sum()), r)
    return full.theta, full.value


@float64
def jacobian(table: Table, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(predictions [n], their derivatives [n, k]) at theta [k], in the residual's terms."""
    call = _jacobian(table.form, tuple(sorted(table.fixed.items())), table.residual)
    value, slope = call(theta, {k: table.columns[k] for k in table.form.columns})
    return np.asarray(value), np.asarray(slope)


@functools.cache
def _jacobian(form: Form, fixed: tuple[tuple[str, float], ...], residual: Residual) -> Any:
    model = _model(form, fixed, residual)
    return jax.jit(lambda t, columns: (model(t, columns), jax.jacfwd(model)(t, columns)))
