"""Fitted laws of `scaling.forms` as tables in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from jaxlm.report.formats import count, general, percent, power

Json = dict[str, Any]


def table(laws: list[Json]) -> Group:
    """Every law's parameters and what they lead to; several laws side by side at the end."""
    parts: list[Any] = []
    for law in laws:
        if "refused" in law:
            parts.append(escape(f"{law['law']}: refused: {law['refused']}"))
            continue
        parts += [*_law(law), ""]
    if len(laws) > 1:
        parts.append(_comparison(laws))
    return Group(*parts)


def _law(law: Json) -> list[Any]:
    kind = "ln" if law["residual"] == "log" else "value"
    delta = "least squares" if law["huber_delta"] is None else f"Huber {law['huber_delta']:g}"
    head = (
        f"{law['law']}: {law['formula']} ({law['source']})\n{law['n']} runs, {law['convention']};"
        f" {delta} of the {kind}; objective {law['objective']:.9g}, reached by"
        f" {law['starts_at_optimum']:.0%} of the starts; 95 % intervals from {law['bootstrap']}"
        f" resamples of the {law['resample']}"
    )
    found = Table("parameter", "value", "standard error", "95 %", "95 % by profile")
    for name, p in law["parameters"].items():
        given = " (given)" if name in law["fixed"] else ""
        value = "not determined" if p["undetermined"] else _number(p["value"])
        found.add_row(name + given, value, _number(p["se"]), _band(p["ci95"]),
                      _band(p["profile95"]))  # fmt: skip
    for name, p in law["derived"].items():
        found.add_row(name, _number(p["value"]), "", _band(p["ci95"]), "")
    parts: list[Any] = [escape(head), found]
    parts += [_held_out(law["held_out"])] if law["held_out"] else []
    lines = [*_seen_ahead(law), *_uses(law)]
    lines += [f"dropped: {d['name']}: {d['reason']}" for d in law["dropped"]]
    lines += [f"warning: {line}" for line in law["warnings"]]
    return [*parts, *map(escape, lines)]


def _seen_ahead(law: Json) -> list[str]:
    left, unit = law["left_out"], law["residual"] == "log"
    if left is None:
        return ["too few budgets to leave any out: nothing says how well this law predicts"]
    rms, mean, naive = (
        percent(v, 2) if unit else general(v, 3)
        for v in (left["rms"], left["largest"]["mean"], left["largest"]["naive"])
    )
    return [
        f"each of {len(left['groups'])} budgets predicted from the others: error {rms} (rms);"
        f" the largest: {mean} (mean), {naive} if nothing had changed since the one before"
    ]


def _uses(law: Json) -> list[str]:
    lines = []
    if p := law["at"]:
        lines.append(f"there: {_number(p['value'])}, 95 % of a run {_band(p['ci95'])}")
    if (s := law["stops"]) is not None:
        where = power(s["at"], 3) or "nowhere within reach"
        lines.append(
            f"doubling the largest compute gains {percent(s['gain_of_doubling'], 2)}; a doubling"
            f" gains less than one run's scatter ({percent(s['scatter'], 2)}) from C = {where} on"
            f" (95 %: {_band(s['at_ci95'])})"
        )
    if o := law["for_compute"]:
        if o["refused"]:
            return [*lines, f"at C = {power(o['flops'], 3)}: refused: {o['refused']}"]
        lines.append(
            f"at C = {power(o['flops'], 3)} = {o['flops_per_param_token']:.3g} N D:"
            f" N* {count(o['params'])} ({_counts(o['params_ci95'])}),"
            f" D* {count(o['tokens'])} ({_counts(o['tokens_ci95'])}),"
            f" {_number(o['loss'])} ({_band(o['ci95_law'])});"
            f" half the size costs {percent(o['cost_of_half_size'], 2)},"
            f" twice {percent(o['cost_of_double_size'], 2)}"
        )
    return lines


def _held_out(rows: list[Json]) -> Table:
    found = Table("held out", "measured", "predicted", "error", "95 % of a run", "inside")
    for row in rows:
        ci = row["ci95"]
        inside = "–" if ci is None else "yes" if ci[0] <= row["measured"] <= ci[1] else "no"
        found.add_row(escape(row["name"]), _number(row["measured"]), _number(row["value"]),
                      percent(row["error_relative"], 4), _band(ci), inside)  # fmt: skip
    return found


def _comparison(laws: list[Json]) -> Table:
    """By what each law says of budgets that it has not seen, the best first."""
    found = Table("law", "fitted", "objective", "others predicted (rms)", "largest (rms)")

    def error(law: Json) -> float:
        return law["left_out"]["rms"] if law.get("left_out") else float("inf")

    for law in sorted(laws, key=error):
        if "refused" in law:
            found.add_row(law["law"], "", "", "refused", "")
            continue
        left = law["left_out"]
        cells = [percent(left["rms"], 3), percent(left["largest"]["rms"], 3)] if left else ["–"] * 2
        free = len(law["parameters"]) - len(law["fixed"])
        found.add_row(law["law"], str(free), f"{law['objective']:.6g}", *cells)
    return found


def _number(value: float | None) -> str:
    return general(value, 5) or "–"


def _band(bounds: list[float | None] | None) -> str:
    if bounds is None:
        return "–"
    return " … ".join("open" if v is None else _number(v) for v in bounds)


def _counts(bounds: list[float] | None) -> str:
    return "no interval" if bounds is None else " … ".join(count(v) or "–" for v in bounds)
