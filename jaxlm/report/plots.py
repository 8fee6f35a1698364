"""The plots of a sweep: loss curves, IsoFLOP parabolas, optima, the bet on the held-out run.

Each function gives a `Plot`, or None where its data is not there yet. N is the effective parameter
count, D training tokens, C training FLOPs, losses are nats/token on held-out text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from jaxlm.report import points
from jaxlm.report.artifacts import Json, Run, dicts, number, numbers, part
from jaxlm.report.figure import (
    EDGE,
    INK,
    MUTED,
    Plot,
    Tip,
    key,
    logarithmic,
    new_plot,
    save_png,
    styled,
)  # fmt: skip
from jaxlm.report.fitted import Approach, curves
from jaxlm.report.formats import count, fixed, power, short
from jaxlm.report.law_plots import optima, optimal_loss, residuals
from jaxlm.report.points import Point
from jaxlm.report.run_plots import binned

MINIMUM = {"marker": "v", "markersize": 8, "color": INK, "markeredgecolor": EDGE,
           "linestyle": "", "zorder": 5}  # fmt: skip
REFUSED = {"marker": "x", "markersize": 9, "markeredgewidth": 2, "color": INK,
           "linestyle": "", "zorder": 5}  # fmt: skip


def sweep_plots(
    runs: Sequence[Run], fit: Json, prediction: Json, score: Json
) -> dict[str, Plot | None]:
    """Every plot of a sweep by name, in the order of the page; None where data is missing."""
    convention = str(fit.get("convention", "effective"))
    found = points.of_runs(runs, convention) if runs else points.of_fit(fit)
    lines = curves(fit, number(prediction.get("flops")))
    with styled():
        return {
            "loss_curves": loss_curves(runs),
            "isoflop": isoflop(found, fit),
            "optimal_params": optima(found, fit, prediction, "params", lines),
            "optimal_tokens": optima(found, fit, prediction, "tokens", lines),
            "optimal_loss": optimal_loss(found, fit, prediction, score, lines),
            "residuals": residuals(found, fit),
        }


def plot_fit(fit: Json, out_dir: str | Path) -> list[Path]:
    """PNG files of a fit without run folders (`jaxlm fit` on a CSV); gives their paths.

    Raises JaxlmError where they cannot be written.
    """
    plots = sweep_plots([], fit, part(fit.get("for_compute")), {}).values()
    return [save_png(plot, Path(out_dir)) for plot in plots if plot]


# ------------------------------------------------------------------------------------------ plots


def loss_curves(runs: Sequence[Run]) -> Plot | None:
    """Training loss of all members against compute, coloured by size."""
    drawn = []
    for i, run in enumerate(runs):
        x, y = run.curve("train/loss")
        x_n, y_n = binned(x, y, 80)
        if len(x_n) > 1:
            drawn.append((i, run, x_n, y_n))
    if not drawn:
        return None
    sizes = {i: run.number("params_effective") or 0.0 for i, run, _, _ in drawn}
    colors = points.levels(n for n in sizes.values() if n) | (
        {0.0: MUTED} if 0.0 in sizes.values() else {}
    )
    plot = new_plot(
        "loss_curves",
        "Training loss of every member",
        "Means in 80 intervals. Colour: effective parameters N. Marks: final held-out loss.",
        height=4.2,
    )
    axes = plot.figure.add_subplot()
    for i, run, x_n, y_n in drawn:
        color = colors[sizes[i]]
        loss, flops = run.number("loss"), run.number("flops")
        said = f"{run.name}: N {count(sizes[i]) if sizes[i] else '?'}, {run.status}"
        tip = Tip(said + (f", loss {fixed(loss)}" if loss else ""), f"#run-{i}")
        width = 2.2 if run.role == "holdout" else 1.2
        plot.draw(axes, x_n, y_n, tip, color=color, linewidth=width)
        if loss and flops:
            plot.draw(axes, [flops], [loss], tip, **points.mark(run.role, color))
    all_x = [v for _, _, x, _ in drawn for v in (x[0], x[-1])]
    points.flop_axis(axes, all_x)
    axes.set_yscale("log")
    all_y = [v for _, _, _, y in drawn for v in y]
    logarithmic(axes.yaxis, min(all_y), max(all_y), lambda v: f"{v:g}")
    axes.set_ylabel("loss (nats/token)")
    keys = points.level_keys(colors, "N", lambda v: count(v) if v else "not known yet")
    plot.legend([*keys, *points.role_keys(run.role for _, run, _, _ in drawn)], columns=5)
    return plot


def isoflop(found: Sequence[Point], fit: Json) -> Plot | None:
    """Loss against N at each budget, with the parabola of approach 2 and its minimum."""
    members = [p for p in found if p.budget]
    if not members:
        return None
    second = Approach("approach2", part(fit.get("approach2")))
    colors = points.levels(p.budget for p in members if p.budget)
    plot = new_plot(
        "isoflop",
        "IsoFLOP parabolas",
        "Colour: compute budget C in FLOPs. Bars: spread of replicates. Dotted, with a cross: "
        "no minimum could be had.",
        height=4.2,
    )
    axes = plot.figure.add_subplot()
    keys = points.level_keys(colors, "C", power, marker="o", linestyle="")
    refused = _parabolas(plot, axes, second, colors)
    for budget, color in colors.items():
        _spread(axes, [p for p in members if p.budget == budget], color)
    for p in members:
        plot.draw(
            axes,
            [p.params],
            [p.loss],
            p.tip,
            **points.mark(p.role, colors[p.budget or 0], len(members)),
        )
    for m in second.minima:
        _minimum(plot, axes, m)
    if second.minima:
        keys.append(key("minimum", **MINIMUM))
    if refused:
        keys.append(key("refused", **REFUSED))
    axes.set_xscale("log")
    low, high = min(p.params for p in members), max(p.params for p in members)
    logarithmic(axes.xaxis, low, high, count)
    axes.set_xlabel(points.words_of(str(fit.get("convention", "effective"))))
    axes.set_ylabel("held-out loss (nats/token)")
    plot.legend([*keys, *points.role_keys(p.role for p in members)], columns=3)
    return plot


def _spread(axes: Axes, members: Sequence[Point], color: str) -> None:
    """A bar over the losses of runs of one size: what the seed alone does."""
    for params in {p.params for p in members}:
        losses = [p.loss for p in members if p.params == params]
        if len(losses) > 1:
            ends = [min(losses), max(losses)]
            axes.plot([params] * 2, ends, color=color, linewidth=4, alpha=0.35)


def _parabolas(plot: Plot, axes: Axes, second: Approach, colors: dict[float, str]) -> bool:
    """loss = c0 + c1 x + c2 x², x = ln N, over the fitted sizes; tells whether one was refused."""
    reasons = {c: reason for c, reason in second.refused_minima if c}
    crossed = False
    for parabola in dicts(second.values.get("parabolas")):
        budget = number(parabola.get("flops"))
        coefficients = numbers(parabola.get("coefficients"), 3)
        params = numbers(parabola.get("params"))
        if not budget or not coefficients or not params:
            continue
        color = colors[min(colors, key=lambda c: abs(np.log(c / budget)))]
        x = np.linspace(np.log(min(params)) - 0.1, np.log(max(params)) + 0.1, 60)
        y = np.polynomial.polynomial.polyval(x, coefficients)
        reason = next((r for c, r in reasons.items() if abs(np.log(c / budget)) < 1e-3), None)
        style = "-" if reason is None else (0, (1, 1.5))
        axes.plot(np.exp(x), y, color=color, linewidth=1.3, linestyle=style, alpha=0.8)
        if reason:
            crossed = True
            tip = Tip(f"C {power(budget)}: {short(reason, 70)}")
            at = int(np.argmin(y))
            plot.draw(axes, [np.exp(x[at])], [y[at]], tip, **REFUSED)
    return crossed


def _minimum(plot: Plot, axes: Axes, minimum: Json) -> None:
    params, loss = number(minimum.get("params")), number(minimum.get("loss"))
    if params and loss:
        said = f"minimum at C {power(number(minimum.get('flops')))}: N* {count(params)}"
        tip = Tip(f"{said}, D* {count(number(minimum.get('tokens')))}, loss {fixed(loss)}")
        plot.draw(axes, [params], [loss], tip, **MINIMUM)
