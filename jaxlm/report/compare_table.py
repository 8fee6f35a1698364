"""What a comparison of A and B found, in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from jaxlm.report.formats import percent, power

Json = dict[str, Any]
_VERDICTS = {
    "better": "B is better than A",
    "worse": "B is worse than A",
    "no difference": "no difference was found",
    "open": "open: another seed is needed",
}


def table(found: Json) -> Group:
    effect, law = found["effect"], found["law"]
    scales = Table("scale", "C (FLOPs)", "seeds", "gain of B", "95 %")
    for row in found["scales"]:
        scales.add_row(escape(row["scale"]), power(row["flops"], 3), str(row["seeds"]),
                       percent(row["gain"], 2) or "–", _band(row["ci95"]))  # fmt: skip
    lines = [
        f"A: {found['a']}",
        f"B: {found['b']}",
        f"{_VERDICTS[effect['verdict']]}: gain {percent(effect['gain'], 2)} of the loss"
        f" (95 %: {_band(effect['ci95'])}) after {effect['pairs']} seeds; a run scatters by"
        f" {percent(found['noise_floor'], 2) or '–'}, and {percent(found['smallest'], 2)} is held"
        " worth finding",
    ]
    if law:
        times = f"{law['compute_multiplier']:.2f} ×" if law["compute_multiplier"] else "–"
        lines.append(
            f"the gain {law['verdict']} with compute:"
            f" {percent(law['gain_per_decade'], 2) or '–'} per decade (95 %: {_band(law['ci95'])});"
            f" A would need {times} the compute for what B reaches"
        )
    lines += [f"no pair: {name}" for name in found["unpaired"]]
    return Group(*map(escape, lines[:2]), scales, *map(escape, lines[2:]))


def _band(bounds: list[float] | None) -> str:
    if bounds is None:
        return "–"
    return " … ".join(percent(v, 2) or "–" for v in bounds)
