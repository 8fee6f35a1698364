"""A fit as tables in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from jaxlm.report.formats import count, general, interval, percent, power

_TITLES = {
    "approach1": "1 envelope of curves",
    "approach2": "2 IsoFLOP parabolas",
    "approach3": "3 L(N, D)",
}
Json = dict[str, Any]


def table(fits: Json) -> Group:
    """The exponents of all approaches, approach 3's parameters, approach 2's minima, the prediction
    where one was asked for, what was dropped, and the warnings; to be printed by rich."""
    parts: list[Any] = [
        f"{fits['n']} runs, N counted {fits['convention']};"
        f" 95 % intervals from {fits['bootstrap']} resamples",
        _exponents(fits),
    ]
    if "E" in fits["approach3"]:
        parts.append(_parameters(fits["approach3"]))
    if "a" in fits["approach2"]:
        parts.append(_minima(fits["approach2"]))
    if fits["for_compute"]:
        parts.append(_predictions(fits["for_compute"]))
    if fits.get("left_out"):
        parts.append(_foresight(fits["left_out"]))
    lines = [f"dropped: {d['name']} (loss {_number(d['loss'])}): {d['reason']}"
             for d in fits["dropped"]]  # fmt: skip
    lines += [f"warning: {line}" for line in fits["warnings"]]
    return Group(*parts, *map(escape, lines))


def _exponents(fits: Json) -> Table:
    found = Table("approach", "a (N* ~ C^a)", "95 %", "b (D* ~ C^b)", "95 %")
    for name, title in _TITLES.items():
        fit = fits[name]
        if "a" not in fit:
            found.add_row(title, _refused(fit))
            continue
        cells = [(f"{fit[k]:.3f}", interval(fit["ci95"][k]) or "–") for k in "ab"]
        found.add_row(title, *cells[0], *cells[1])
    return found


def _parameters(fit: Json) -> Table:
    found = Table("L = E + A/N^alpha + B/D^beta", "value", "standard error", "95 %")
    for name in ("E", "A", "B", "alpha", "beta"):
        bounds = " … ".join(_number(v) for v in fit["ci95"][name] or [])
        found.add_row(name, _number(fit[name]), _number(fit["se"][name]), bounds or "–")
    found.add_row("objective", f"{fit['objective']:.6g}", "", "")
    return found


def _minima(fit: Json) -> Table:
    found = Table("C (FLOPs)", "N*", "D*", "loss", title="IsoFLOP minima")
    rows = [*fit["minima"], *fit["refused"]]
    for row in sorted(rows, key=lambda row: row["flops"]):
        cells = [count(row.get("params")) or "–", count(row.get("tokens")) or "–"]
        last = f"{row['loss']:.4f}" if "loss" in row else f"refused: {row['reason']}"
        found.add_row(power(row["flops"], 3), *cells, last)
    return found


def _predictions(asked: Json) -> Table:
    found = Table("approach", "loss", "95 % of a run", "±", "N*", "D*",
                  title=f"At C = {power(asked['flops'], 3)} FLOPs")  # fmt: skip
    for name, title in _TITLES.items():
        p = asked[name]
        if "refused" in p:
            found.add_row(title, "–", _refused(p))
            continue
        cells = [f"{p['loss']:.4f}", interval(p["ci95"], 4) or "–", percent(p["half_width"]) or "–"]
        found.add_row(title, *cells, count(p["params"]), count(p["tokens"]))
    return found


def _foresight(rows: list[Json]) -> Table:
    title = f"The largest budget, {power(rows[0]['flops'], 3)} FLOPs, from those below"
    found = Table("approach", "budgets up to", "predicted", "measured", "error", title=title)
    for row in rows:
        losses = [f"{row[k]:.4f}" for k in ("predicted", "measured")]
        told = power(row["flops"] / row["extrapolation"], 3)
        found.add_row(_TITLES[row["estimator"]], told, *losses, percent(row["error"], 2))
    return found


def _refused(fit: Json) -> str:
    return escape(f"refused: {fit['refused']}")


def _number(value: float | None) -> str:
    return general(value, 5) or "–"
