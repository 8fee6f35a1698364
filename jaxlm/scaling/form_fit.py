"""One law of `forms` on one table: parameters, intervals, profiles, and how well it predicts what
it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.scaling import form_intervals as intervals
from jaxlm.scaling import robust
from jaxlm.scaling.columns import Columns
from jaxlm.scaling.forms import FORMS, Form
from jaxlm.scaling.frontier import Refusal
from jaxlm.scaling.robust import Table
from jaxlm.schema import UserError, hint

Json = dict[str, Any]


def fit(
    data: Columns,
    name: str,
    huber_delta: float = 1e-3,
    residual: robust.Residual | None = None,
    fixed: Mapping[str, float] | None = None,
    drop_largest: int = 0,
    starts: int = 300,
    bootstrap: int = 1000,
    resample: intervals.Resample = "runs",
    profile: bool = True,
    seed: int = 0,
    at: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Json:
    """The law `name` on the rows that are not held out, as JSON values (jaxlm.law/1).

    `drop_largest`: rows left out, those with the largest targets. `fixed`: parameters that are
    given (where all are, the law is only evaluated). `residual`: of the logarithm or of the value;
    None: as the law says. `huber_delta`: inf is least squares. `profile`: also profile intervals.
    `at`: a point to predict. The dict holds
    `parameters` {name: {value, se, ci95, profile95, undetermined}}, `derived`, `objective`,
    `starts_at_optimum`, `noise`, `left_out` (errors of each budget predicted from the others, of
    the largest from the smaller ones, and of a naive guess), `held_out`, `at`, `points`,
    `residuals`, `warnings` and `draws`. Raises Refusal where the table cannot carry the law,
    UserError.
    """
    form = form_of(name)
    _check(form, huber_delta, residual, fixed or {}, bootstrap, resample, starts)
    data, rng = _without_largest(data, form, drop_largest), np.random.default_rng(seed)
    whole = Table(
        form, {c: data.values[c] for c in form.columns}, data.values[form.target],
        residual or form.residual, huber_delta, dict(fixed or {}),
    )  # fmt: skip
    table = whole.rows(~data.held)
    _carry(table)
    theta, values = robust.minimise(table, robust.starts(table, starts, rng))
    best, objective = theta[values.argmin()], float(values.min())
    _identify(table, best)
    others = _others(theta, values)
    drawn = intervals.resampled(table, best, others, resample, bootstrap, rng, progress)
    errors = intervals.errors(table, best)
    dof = len(table.target) - len(table.fitted)
    profiles = intervals.profiles(table, best, objective, drawn, rng) if profile and len(
        drawn) else {}  # fmt: skip
    law = {k: float(v[0]) for k, v in robust.natural(table, best[None]).items()}
    draws, levels = robust.natural(table, drawn), intervals.levels(dof)
    result = {
        **_head(table, data, {"bootstrap": bootstrap, "resample": resample, "seed": seed}),
        "objective": objective,
        "starts_at_optimum": float((values <= objective * (1 + 1e-6) + 1e-30).mean()),
        "parameters": _parameters(table, law, draws, levels, profiles),
        "derived": _derived(form, law, draws, levels),
        "noise": {
            "relative" if table.residual == "log" else "absolute": float(
                np.sqrt((errors**2).sum() / dof)
            ),
            "dof": dof,
        },
        "levels": levels,
        "left_out": _left_out(table, data.group[~data.held], best, others),
        "points": _points(table, data),
        "residuals": errors.tolist(),
        "draws": {k: intervals.thin(v) for k, v in draws.items() if k in table.fitted},
    }
    result["warnings"] = [*data.warnings, *_warnings(table, best, result)]
    result["held_out"] = _scored(whole.rows(data.held), data, result)
    result["at"] = predict(result, {k: np.array([v]) for k, v in at.items()})[0] if at else None
    return result


def _points(table: Table, data: Columns) -> Json:
    """The rows that were fitted, for plots."""
    return {
        "names": [n for n, h in zip(data.name, data.held, strict=True) if not h],
        "columns": {k: v.tolist() for k, v in table.columns.items()},
        "target": table.target.tolist(),
    }


def _head(table: Table, data: Columns, asked: Json) -> Json:
    return {
        "format": "jaxlm.law/1",
        "law": table.form.name,
        "formula": table.form.formula,
        "source": table.form.source,
        "n": len(table.target),
        "convention": data.convention,
        "dropped": list(data.dropped),
        "residual": table.residual,
        "huber_delta": table.delta if np.isfinite(table.delta) else None,
        "fixed": dict(table.fixed),
        **asked,
    }


def _scored(held: Table, data: Columns, result: Json) -> list[Json]:
    """What the law says of the held-out rows, and what they measured."""
    names = [n for n, h in zip(data.name, data.held, strict=True) if h]
    return [
        {"name": n, "measured": float(y), "error_relative": p["value"] / float(y) - 1} | p
        for n, y, p in zip(names, held.target, predict(result, held.columns), strict=True)
    ]


def _without_largest(data: Columns, form: Form, drop: int) -> Columns:
    fitted = np.flatnonzero(~data.held)
    if not 0 <= drop < len(fitted):
        raise UserError(f"--drop-largest-loss: expected 0 to {len(fitted) - 1}, got {drop}")
    order = np.argsort(data.values[form.target][fitted], kind="stable")
    return data.drop(fitted[order[len(fitted) - drop :]], f"one of the {drop} largest")


def form_of(name: str) -> Form:
    if name not in FORMS:
        raise UserError(f"--law: no such law: {name!r}; {hint(name, FORMS)}")
    return FORMS[name]


def values_of(result: Json) -> dict[str, float]:
    return {k: p["value"] for k, p in result["parameters"].items()}


def draws_of(result: Json) -> dict[str, np.ndarray]:
    """[r] of every parameter; a fixed one is repeated."""
    found = {k: np.array(v) for k, v in result["draws"].items()}
    r = len(next(iter(found.values()), ()))
    return {k: found.get(k, np.full(r, v)) for k, v in values_of(result).items()}


def predict(result: Json, columns: Mapping[str, np.ndarray]) -> list[Json]:
    """At each row of `columns`: the law's `value`, `ci95_law`, and `ci95` of what one run measures
    there, its own scatter included. Intervals are None without resamples. Raises UserError."""
    form = FORMS[result["law"]]
    for needed in form.columns:
        if needed not in columns:
            raise UserError(f"--at: {form.name} needs {needed}, as in --at={needed}=1e9")
    value = robust.law(form, values_of(result), columns)
    draws = draws_of(result)
    rows = len(value)
    if not len(next(iter(draws.values()))):
        return [{"value": float(v), "ci95_law": None, "ci95": None} for v in value]
    losses = robust.law(form, draws, columns)
    noise = result["noise"]
    rng = np.random.default_rng([result["seed"], 1])
    error = rng.standard_normal(losses.shape)
    if "relative" in noise:
        measured = losses * np.exp(noise["relative"] * error)
    else:
        measured = losses + noise["absolute"] * error
    bands = [np.percentile(x, result["levels"], axis=0).T.tolist() for x in (losses, measured)]
    return [
        {"value": float(value[i]), "ci95_law": bands[0][i], "ci95": bands[1][i]}
        for i in range(rows)
    ]


# ------------------------------------------------------------------------------------------ checks


def _check(
    form: Form,
    delta: float,
    residual: str | None,
    fixed: Mapping[str, float],
    bootstrap: int,
    resample: str,
    starts: int,
) -> None:
    names = (*form.coefficients, *(f.name for f in form.free))
    for key in fixed:
        if key not in names:
            raise UserError(f"--fix: {form.name} has no parameter {key!r}; {hint(key, names)}")
        if key in form.coefficients and not fixed[key] >= 0:
            raise UserError(f"--fix: {key}: expected a number of at least 0, got {fixed[key]}")
    if not delta > 0:
        raise UserError(f"--huber-delta: expected a number above 0, got {delta}")
    if residual not in (None, "log", "value"):
        raise UserError(f"--residual: expected log or value, got {residual!r}")
    if form.signs and residual == "log":
        raise UserError(f"--residual: {form.name} may fall below 0; expected value, got log")
    if bootstrap < 0 or bootstrap == 1:
        raise UserError(f"--bootstrap: expected 0 (no intervals) or at least 2, got {bootstrap}")
    if resample not in ("runs", "residuals"):
        raise UserError(f"--resample: expected runs or residuals, got {resample!r}")
    if starts < 1:
        raise UserError(f"--starts: expected at least 1, got {starts}")


def _carry(table: Table) -> None:
    """Raises Refusal where there are too few different points, or a column that never varies."""
    k = len(table.fitted)
    rows = np.stack([np.log(table.columns[c]) for c in table.form.columns], 1)
    distinct = len(np.unique(np.round(rows, 6), axis=0))
    if distinct < k + 1:
        raise Refusal(f"{distinct} distinct points, {k + 1} needed for {k} parameters")
    for name, values in zip(table.form.columns, rows.T, strict=True):
        if np.ptp(values) < 0.02:
            raise Refusal(f"{name} is the same in every run")
    if np.ptp(np.log(table.target)) < 1e-6:
        raise Refusal(f"every {table.form.target} is the same")


def _identify(table: Table, theta: np.ndarray) -> None:
    """Raises Refusal where a combination of parameters changes nothing that was measured."""
    low, high = robust.bounds(table)
    free = [k for k, n in enumerate(table.names)
            if n in table.fitted and low[k] < theta[k] < high[k]]  # fmt: skip
    if not free:
        return
    _, J = robust.jacobian(table, theta)
    J = J[:, free]
    J = J / np.maximum(np.linalg.norm(J, axis=0), 1e-300)
    _, s, v = np.linalg.svd(J, full_matrices=False)
    if s[-1] < 1e-6 * s[0]:
        mixed = [table.names[free[i]] for i in np.argsort(-np.abs(v[-1]))
                 if abs(v[-1][i]) > 0.1]  # fmt: skip
        raise Refusal(f"these points cannot tell {' and '.join(mixed)} apart")


# -------------------------------------------------------------------------------- fits, intervals


def _others(theta: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Up to three further minima [m, k] from which resamples also start."""
    order = np.argsort(values)
    chosen = [order[0]]
    for i in order[1:]:
        if len(chosen) < 4 and min(np.abs(theta[i] - theta[j]).max() for j in chosen) > 0.2:
            chosen.append(i)
    return theta[chosen[1:]]


def _parameters(
    table: Table,
    law: Mapping[str, float],
    draws: Mapping[str, np.ndarray],
    levels: Sequence[float],
    profiles: Mapping[str, Json],
) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for name in table.names:
        given = name in table.fixed
        ci = None if given else intervals.interval(draws[name], levels)
        profile = profiles.get(name)
        is_open = profile is not None and None in profile["ci95"]
        found[name] = {
            "value": law[name],
            "se": float(draws[name].std()) if ci else None,
            "ci95": ci,
            "profile95": profile["ci95"] if profile else None,
            "profile": {k: profile[k] for k in ("values", "objective")} if profile else None,
            "undetermined": (is_open and name not in table.form.asymptotes)
            or (ci is not None and intervals.too_wide(table.form, name, law[name], ci)),
        }
    return found


def _derived(
    form: Form, law: Mapping[str, float], draws: Mapping[str, np.ndarray], levels: Sequence[float]
) -> dict[str, Json]:
    if form.derived is None:
        return {}
    spread = form.derived(draws)
    return {k: {"value": float(v), "ci95": intervals.interval(np.asarray(spread[k]), levels)}
            for k, v in form.derived(law).items()}  # fmt: skip


def _warnings(table: Table, theta: np.ndarray, result: Json) -> list[str]:
    low, high = robust.bounds(table)
    said = [f"{n} is at its bound" for k, n in enumerate(table.names) if n in table.fitted
            and (theta[k] <= low[k] + 1e-6 or theta[k] >= high[k] - 1e-6)]  # fmt: skip
    said += [f"{n} is not determined by these points (see its intervals)"
             for n, p in result["parameters"].items() if p["undetermined"]]  # fmt: skip
    if result["starts_at_optimum"] < 0.02:
        said.append("fewer than 2 % of the starts reach the optimum: raise --starts")
    return said


# ------------------------------------------------------------------------- what it has not seen


def _left_out(table: Table, group: np.ndarray, best: np.ndarray, others: np.ndarray) -> Json | None:
    """Every budget predicted from all others, and the largest from the smaller ones, as errors of
    ln target (or of its value); beside the naive guess that the largest budget's best equals the
    one before. None below three budgets or where the rest cannot carry the law."""
    size = table.columns.get("flops", table.columns[table.form.columns[0]])
    if {"params", "tokens"} <= table.columns.keys():
        size = table.columns["params"] * table.columns["tokens"]
    labels = sorted(set(group), key=lambda g: float(np.log(size[group == g]).mean()))
    least = min(len(group) - int((group == g).sum()) for g in labels)
    if len(labels) < 3 or least < len(table.fitted) + 1:
        return None
    weight = np.array([(group != g).astype(float) for g in labels])
    from_ = np.concatenate([best[None], others, robust.starts(table, 8, np.random.default_rng(0))])
    theta, value = robust.minimise(
        table, np.tile(from_, (len(labels), 1)), np.repeat(weight, len(from_), 0)
    )
    winner = value.reshape(len(labels), -1).argmin(1)
    theta = theta.reshape(len(labels), len(from_), -1)[np.arange(len(labels)), winner]
    by_group, squares = [], []
    for label, at in zip(labels, theta, strict=True):
        error = intervals.errors(table, at)[group == label]
        by_group.append({"group": str(label), "rms": float(np.sqrt((error**2).mean())),
                         "mean": float(error.mean())})  # fmt: skip
        squares += (error**2).tolist()
    y = np.log(table.target) if table.residual == "log" else table.target
    naive = float(y[group == labels[-2]].min() - y[group == labels[-1]].min())
    return {
        "rms": float(np.sqrt(np.mean(squares))),
        "largest": by_group[-1] | {"naive": naive},
        "groups": by_group,
    }
