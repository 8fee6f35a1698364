"""Finished runs as points of a plot: what a point says, its colour and its mark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from jaxlm.report.artifacts import Json, Run, dicts, number, numbers, part
from jaxlm.report.figure import EDGE, MUTED, RAMP, Tip, key, logarithmic
from jaxlm.report.formats import count, fixed, power

ROLES = {"fit": "o", "replicate": "o", "holdout": "*"}


# How the fit counts N → (field of the record, words).
COUNTS = {
    "effective": ("params_effective", "effective parameters N"),
    "all": ("params", "parameters N, all"),
    "non_embedding": ("params_non_embedding", "parameters N without embeddings"),
}


@dataclass(frozen=True)
class Point:
    """A finished run as the fits see it; `budget` is None for a row that is in no IsoFLOP slice."""

    name: str
    role: str
    budget: float | None
    params: float
    tokens: float
    flops: float
    loss: float
    tip: Tip


def of_runs(runs: Sequence[Run], convention: str) -> list[Point]:
    """The runs whose record carries all that a plot needs; `#run-i` is run i's table row."""
    counted = COUNTS.get(convention, COUNTS["effective"])[0]
    found = []
    for i, run in enumerate(runs):
        n, d, c, loss = (run.number(name) for name in (counted, "tokens", "flops", "loss"))
        if n and d and c and loss:
            tip = Tip(_said(run.name, n, d, c, loss), f"#run-{i}")
            found.append(Point(run.name, run.role, run.budget or c, n, d, c, loss, tip))
    return found


def of_fit(fit: Json) -> list[Point]:
    """The rows of the table that was fitted; budgets as approach 2 sliced it."""
    table = part(fit.get("points"))
    columns = [numbers(table.get(k)) or [] for k in ("params", "tokens", "flops", "loss")]
    names = table.get("names")
    names = names if isinstance(names, list) else [""] * len(columns[0])
    if len({len(names), *map(len, columns)}) > 1:
        return []
    budgets = {
        (name, loss): number(parabola.get("flops"))
        for parabola in dicts(part(fit.get("approach2")).get("parabolas"))
        for name, loss in zip(parabola.get("names", []), parabola.get("loss", []), strict=False)
    }
    return [
        Point(
            str(name),
            "fit",
            budgets.get((name, loss)),
            n,
            d,
            c,
            loss,
            Tip(_said(name, n, d, c, loss)),
        )
        for name, n, d, c, loss in zip(names, *columns, strict=True)
    ]


def _said(name: str, n: float, d: float, c: float, loss: float) -> str:
    return f"{name}: N {count(n)}, D {count(d)}, C {power(c)}, loss {fixed(loss)}"


def levels(values: Iterable[float]) -> dict[float, str]:
    """Value → colour, dark (small) to bright (large); more than eight share with neighbours."""
    distinct = sorted(set(values))
    if len(distinct) <= len(RAMP):
        steps = np.linspace(0, len(RAMP) - 1, len(distinct)).round().astype(int)
    else:
        steps = np.arange(len(distinct)) * len(RAMP) // len(distinct)
    return {value: RAMP[step] for value, step in zip(distinct, steps.tolist(), strict=True)}


def level_keys(
    colors: dict[float, str], symbol: str, label: Callable[[float], str | None], **style: Any
) -> list[Line2D]:
    """A legend entry per colour; of values that share one, the range."""
    shared: dict[str, list[float]] = {}
    for value, color in colors.items():
        shared.setdefault(color, []).append(value)
    ends = {color: sorted({v[0], v[-1]}) for color, v in shared.items()}
    return [
        key(f"{symbol} " + " to ".join(label(v) or "?" for v in range_of), color=color, **style)
        for color, range_of in ends.items()
    ]


def mark(role: str, color: str, crowd: int = 0) -> dict[str, Any]:
    """Style of a run's point: filled, hollow for a replicate, a star for the held-out run; small
    in a crowd."""
    hollow = role == "replicate"
    return {
        "marker": ROLES.get(role, "o"),
        "markersize": 13 if role == "holdout" else 6.5 if crowd < 60 else 4,
        "color": color,
        "markerfacecolor": "none" if hollow else color,
        "markeredgecolor": color if hollow else EDGE,
        "markeredgewidth": 1.4 if hollow else 0.8,
        "linestyle": "",
        "zorder": 4,
    }


def role_keys(roles: Iterable[str]) -> list[Line2D]:
    names = {"fit": "in the fit", "replicate": "replicate", "holdout": "held out"}
    found = set(roles)
    return [key(text, **mark(role, MUTED)) for role, text in names.items() if role in found]


def flop_axis(axes: Axes, flops: Sequence[float]) -> None:
    axes.set_xscale("log")
    logarithmic(axes.xaxis, min(flops), max(flops), power)
    axes.set_xlabel("training compute C (FLOPs)")


def words_of(convention: str) -> str:
    return COUNTS.get(convention, ("", "parameters N"))[1]
