"""The plots of a law of `scaling.forms` (`jaxlm fit --law=… --out=DIR`): what it says of every run,
its curve where it has one variable, and the profile of every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxlm.report.artifacts import Json
from jaxlm.report.figure import (
    INK,
    MUTED,
    PALETTE,
    Plot,
    key,
    logarithmic,
    new_plot,
    save_png,
    styled,
)  # fmt: skip
from jaxlm.report.formats import general, power
from jaxlm.scaling import form_fit
from jaxlm.scaling.forms import FORMS

LAW = PALETTE["approach3"][0]
HELD = PALETTE["prediction"][0]
_BEYOND = 10.0  # how far past the runs a curve is drawn
_ROOM = 4.0  # a profile is drawn up to so many times its rise at the ends of the interval
_STAR: Json = {"marker": "*", "markersize": 11, "linestyle": "", "color": HELD}
_DOT: Json = {"marker": "o", "markersize": 5, "linestyle": "", "color": LAW, "alpha": 0.8}


def plot_laws(laws: Sequence[Json], out_dir: str | Path) -> list[Path]:
    """PNG files law_NAME_*.png of the laws that were fitted; gives their paths. Raises
    JaxlmError."""
    made = []
    for law in laws:
        if "refused" not in law:
            with styled():
                plots = [measured(law), curve(law), profiles(law)]
            made += [save_png(plot, Path(out_dir)) for plot in plots if plot]
    return made


def measured(law: Json) -> Plot:
    """Predicted against measured, and the residuals that were fitted."""
    log, target = law["residual"] == "log", FORMS[law["law"]].target.replace("_", " ")
    plot = new_plot(
        f"law_{law['law']}_measured", f"{law['law']}: predicted against measured", "", height=4.4
    )
    above, below = plot.figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    y, errors = np.array(law["points"]["target"]), np.array(law["residuals"])
    said = y * np.exp(errors) if log else y + errors
    unit = 100 if log else 1
    above.plot(y, said, **_DOT)
    below.plot(y, unit * errors, **_DOT)
    keys = [key(f"{len(y)} runs in the fit", **_DOT)]
    for row in law["held_out"]:
        band = row["ci95"] or [row["value"]] * 2
        reach = [[row["value"] - band[0]], [band[1] - row["value"]]]
        off = row["value"] / row["measured"] - 1 if log else row["value"] - row["measured"]
        above.errorbar([row["measured"]], [row["value"]], yerr=reach, color=HELD, capsize=3)
        above.plot([row["measured"]], [row["value"]], **_STAR)
        below.plot([row["measured"]], [unit * off], **_STAR)
    keys += [key("held out, 95 % of a run", **_STAR)] if law["held_out"] else []
    ends = [min(above.get_xlim()[0], y.min()), max(above.get_xlim()[1], y.max())]
    above.plot(ends, ends, color=MUTED, linewidth=1, zorder=1)
    below.axhline(0, color=MUTED, linewidth=1, zorder=1)
    above.set_ylabel(f"predicted {target}")
    below.set_ylabel("error (%)" if log else "error")
    below.set_xlabel(f"measured {target}")
    plot.legend(keys, columns=2)
    return plot


def curve(law: Json) -> Plot | None:
    """The law and its 95 % band over its variable, beyond the runs too; None if it has several."""
    form = FORMS[law["law"]]
    if len(form.columns) > 1:
        return None
    [name] = form.columns
    x, y = np.array(law["points"]["columns"][name]), np.array(law["points"]["target"])
    # Compute and sizes grow; a loss that another is read off falls.
    grows = not name.startswith("loss")
    low, high = (x.min(), x.max() * _BEYOND) if grows else (x.min() / 1.3, x.max())
    at = np.geomspace(low, high, 80)
    rows = form_fit.predict(law, {name: at})
    value = np.array([r["value"] for r in rows])
    plot = new_plot(f"law_{law['law']}_curve", f"{law['law']}: {law['formula']}", "")
    axes = plot.figure.add_subplot()
    seen = (at >= x.min()) & (at <= x.max())
    axes.plot(at, value, color=LAW, linewidth=1)
    axes.plot(at[seen], value[seen], color=LAW, linewidth=2.2)
    if rows[0]["ci95_law"]:
        band = np.array([r["ci95_law"] for r in rows])
        axes.fill_between(at, *band.T, color=LAW, alpha=0.12, linewidth=0)
    axes.plot(x, y, **_DOT)
    axes.set_xscale("log")
    label = power if grows else (lambda v: general(v, 3))
    logarithmic(axes.xaxis, low, high, label)
    if grows and (y > 0).all() and (value > 0).all():
        axes.set_yscale("log")
        shown = [*y, *value]
        logarithmic(axes.yaxis, min(shown), max(shown), lambda v: f"{v:.3g}")
    axes.set_xlabel(name.replace("_", " "))
    axes.set_ylabel(form.target.replace("_", " "))
    plot.legend([key("runs", **_DOT), key("the law, 95 %", color=LAW, linewidth=2)], columns=2)
    return plot


def profiles(law: Json) -> Plot | None:
    """The objective's rise over each parameter, the others at their best; None without profiles."""
    found = {k: p for k, p in law["parameters"].items() if p["profile"]}
    if not found:
        return None
    rows = -(-len(found) // 2)
    plot = new_plot(
        f"law_{law['law']}_profiles", f"{law['law']}: profiles", "", height=0.8 + 1.8 * rows
    )
    cells = plot.figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, (name, p) in zip(cells, found.items(), strict=False):
        x, rise = np.array(p["profile"]["values"]), np.array(p["profile"]["objective"])
        rise = rise / law["objective"] - 1
        bounds = [v for v in p["profile95"] if v is not None]
        most = _ROOM * max(np.interp(bounds, x, rise), default=np.inf)
        x, rise = x[rise <= most], rise[rise <= most]
        axes.plot(x, rise, color=LAW, marker=".", markersize=3)
        axes.axvline(p["value"], color=INK, linewidth=1)
        for bound in bounds:
            axes.axvline(bound, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
        if x.min() > 0 and x.max() / x.min() > 10:
            axes.set_xscale("log")
            logarithmic(axes.xaxis, x.min(), x.max(), lambda v: general(v, 2))
        axes.set_xlabel(name)
    for axes in cells[len(found) :]:
        axes.remove()
    plot.figure.supylabel("rise of the objective (share)", fontsize=9)
    line: Json = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 2))}
    plot.legend([key("optimum", color=INK, linewidth=1), key("95 %", **line)], columns=2)
    return plot
