"""The plots of the laws: optima against compute, the bet on the held-out run, residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from jaxlm.report.artifacts import Json, number, numbers, part
from jaxlm.report.figure import INK, MUTED, PALETTE, Plot, Tip, key, logarithmic, new_plot
from jaxlm.report.fitted import Approach, Curve, approaches, fitted_range
from jaxlm.report.formats import count, fixed, percent, power
from jaxlm.report.points import Point, flop_axis, mark, role_keys
from jaxlm.scaling import approach3

COLORS = {name: PALETTE[name][0] for name in ("approach1", "approach2", "approach3")}
DASHES = {"approach1": (0, (5, 2)), "approach2": "-", "approach3": (0, (1, 1.2))}
MARKS = {"approach1": "s", "approach2": "D", "approach3": "^"}
BET = PALETTE["prediction"][0]


def optima(
    found: Sequence[Point], fit: Json, prediction: Json, quantity: str, lines: dict[str, Curve]
) -> Plot | None:
    """Compute-optimal N (`quantity` "params") or D ("tokens") against C, all three approaches."""
    symbol, words, exponent = {
        "params": ("N*", "Compute-optimal parameters", "a"),
        "tokens": ("D*", "Compute-optimal tokens", "b"),
    }[quantity]
    plot = new_plot(
        f"optimal_{quantity}",
        words,
        f"{symbol} ∝ C{'ᵃ' if exponent == 'a' else 'ᵇ'}, with 95 % intervals of {exponent} and of "
        "the lines, which thin out where they extrapolate.",
        height=4.0,
    )
    axes = plot.figure.add_subplot()
    reach: list[float] = []
    keys = []
    for approach in approaches(fit):
        style = {"color": COLORS[approach.name], "linestyle": DASHES[approach.name]}
        marker = {"marker": MARKS[approach.name], "markersize": 5.5}
        reach += _line(axes, lines.get(approach.name), quantity, fit, style)
        for m in approach.minima:
            value, c = number(m.get(quantity)), number(m.get("flops"))
            if value and c:
                reach.append(c)
                tip = Tip(f"{approach.short}: {symbol} {count(value)} at C {power(c)}")
                plot.draw(axes, [c], [value], tip, color=style["color"], linestyle="", **marker)
        marked = marker if approach.minima and not approach.refused else {}
        keys.append(key(_exponent(approach, exponent), **style, **marked))
    if not reach:
        return None
    target, value = number(prediction.get("flops")), number(prediction.get(quantity))
    if value and target:
        tip = Tip(
            f"predicted before the held-out run: {symbol} {count(value)} at C {power(target)}"
        )
        plot.draw(axes, [target], [value], tip, **mark("holdout", BET))
        keys.append(key("predicted for the held-out run", **mark("holdout", BET)))
        reach.append(target)
    flop_axis(axes, reach)
    shown = [getattr(p, quantity) for p in found] + ([value] if value else [])
    _frame(axes, shown, lines, quantity, count)
    axes.set_ylabel({"params": "N* (parameters)", "tokens": "D* (tokens)"}[quantity])
    plot.legend(keys)
    return plot


def _exponent(approach: Approach, name: str) -> str:
    if approach.refused:
        return f"{approach.label}: no result"
    ci95 = approach.ci95(name)
    inside = f"  [{fixed(ci95[0], 2)}, {fixed(ci95[1], 2)}]" if ci95 else ""
    return f"{approach.label}: {name} = {fixed(approach.value(name), 2)}{inside}"


def _line(
    axes: Axes, curve: Curve | None, quantity: str, fit: Json, style: dict[str, Any]
) -> list[float]:
    """The fitted line, thin beyond the fitted compute, and its band; gives its ends in C."""
    if curve is None:
        return []
    largest = (fitted_range(fit) or (0.0, np.inf))[1]
    y = curve.values[quantity]
    for part_of, width in ((curve.flops <= largest, 2.0), (curve.flops >= largest, 1.0)):
        axes.plot(curve.flops[part_of], y[part_of], linewidth=width, **style)
    band = curve.ci95.get(quantity)
    if band is not None:
        axes.fill_between(curve.flops, *band.T, color=style["color"], alpha=0.1, linewidth=0)
    return [float(curve.flops[0]), float(curve.flops[-1])]


def _frame(
    axes: Axes, shown: Sequence[float], lines: dict[str, Curve], quantity: str, label: Any
) -> None:
    """A log axis over `shown` and the steadiest line: a wild one must not flatten the others."""
    axes.set_yscale("log")
    if shown:
        middle = np.log(np.median(shown))
        ends = [float(c.values[quantity][-1]) for c in lines.values()]
        steady = sorted((v for v in ends if v > 0), key=lambda v: abs(np.log(v) - middle))[:1]
        low, high = min([*shown, *steady]), max([*shown, *steady])
        room = (high / low) ** 0.07
        axes.set_ylim(low / room, high * room)
    logarithmic(axes.yaxis, *axes.get_ylim(), label)


def optimal_loss(
    found: Sequence[Point], fit: Json, prediction: Json, score: Json, lines: dict[str, Curve]
) -> Plot | None:
    """The best loss at each compute, its extrapolation, the bet and what came of it."""
    if not lines:
        return None
    bet = [number(prediction.get("loss")), *(numbers(prediction.get("ci95"), 2) or [])]
    plot = new_plot(
        "optimal_loss",
        "Compute-optimal loss" + (", and the bet on the held-out run" if bet[0] else ""),
        ("Bar: 95 % interval of the prediction, written before the run. " if bet[0] else "")
        + "Bands: 95 % intervals of the laws. Lines thin out where they extrapolate.",
        height=4.4,
    )
    axes = plot.figure.add_subplot()
    keys, reach = [], []
    for approach in approaches(fit):
        if approach.name in lines:
            style = {"color": COLORS[approach.name], "linestyle": DASHES[approach.name]}
            reach += _line(axes, lines[approach.name], "loss", fit, style)
            keys.append(key(approach.label, **style))
    for p in found:
        if p.role != "holdout":
            style = mark(p.role, MUTED) | {"markersize": 4.5, "alpha": 0.75}
            plot.draw(axes, [p.flops], [p.loss], p.tip, **style)
    keys += role_keys(p.role for p in found if p.role != "holdout")
    keys += _bet(plot, axes, found, prediction, number(score.get("measured")))
    flop_axis(axes, reach)
    shown = [p.loss for p in found] + [v for v in bet if v]
    _frame(axes, shown, lines, "loss", lambda v: f"{v:.3g}")
    axes.set_ylabel("held-out loss (nats/token)")
    plot.legend(keys, columns=2)
    return plot


def _bet(plot: Plot, axes: Axes, found: Sequence[Point], prediction: Json,
         measured: float | None) -> list[Any]:  # fmt: skip
    """The prediction with its interval, and the measurement; their legend entries."""
    target, loss = number(prediction.get("flops")), number(prediction.get("loss"))
    if not target or not loss:
        return []
    style = {"color": BET, "marker": "o", "markersize": 7, "markerfacecolor": "none"}
    ci95 = numbers(prediction.get("ci95"), 2)
    said = f"predicted {fixed(loss)}" + (f" [{fixed(ci95[0])}, {fixed(ci95[1])}]" if ci95 else "")
    if ci95:
        axes.errorbar([target], [loss], yerr=[[loss - ci95[0]], [ci95[1] - loss]], color=BET,
                      linewidth=2, capsize=5, zorder=4)  # fmt: skip
    plot.draw(axes, [target], [loss], Tip(said), **style, zorder=5)
    keys = [key("predicted before", **style, linewidth=2)]
    held_out = [p for p in found if p.role == "holdout"]
    for p in held_out:
        plot.draw(axes, [p.flops], [p.loss], p.tip, **mark("holdout", INK))
    if not held_out and measured:
        plot.draw(
            axes, [target], [measured], Tip(f"measured {fixed(measured)}"), **mark("holdout", INK)
        )
    if held_out or measured:
        keys.append(key("measured after", **mark("holdout", INK)))
    return keys


def residuals(found: Sequence[Point], fit: Json) -> Plot | None:
    """Predicted against measured loss of every run, by the parametric law, and the difference."""
    third = Approach("approach3", part(fit.get("approach3")))
    if third.refused or third.law is None or not found:
        return None
    plot = new_plot(
        "residuals",
        "Predicted against measured",
        "Every run by the parametric law (approach 3). Below: predicted − measured, relative.",
        height=4.4,
    )
    above, below = plot.figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    edges = [min(p.loss for p in found), max(p.loss for p in found)]
    above.plot(edges, edges, color=MUTED, linewidth=1)
    below.axhline(0, color=MUTED, linewidth=1)
    for p in found:
        predicted = float(approach3.loss(third.law, p.params, p.tokens))
        error = predicted / p.loss - 1
        said = f"predicted {fixed(predicted)}, measured {fixed(p.loss)}, {percent(error)}"
        tip = Tip(f"{p.name}: {said}", p.tip.href)
        style = mark(p.role, INK if p.role == "holdout" else COLORS["approach3"], len(found))
        plot.draw(above, [p.loss], [predicted], tip, **style)
        plot.draw(below, [p.loss], [100 * error], tip, **style)
    above.set_ylabel("predicted (nats/token)")
    below.set_ylabel("error (%)")
    below.set_xlabel("measured loss (nats/token)")
    plot.legend(role_keys(p.role for p in found), columns=3)
    return plot
