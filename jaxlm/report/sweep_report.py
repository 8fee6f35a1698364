"""`report.html`, what people look at: of a sweep (here) and of a single run (`run_report`).

A page is made from the files in a folder and from nothing else, so it can be made again at any
time, also of a sweep that is still running or whose fit was refused: it then says what is missing.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from jaxlm.files import write_bytes
from jaxlm.report import references
from jaxlm.report import sweep_text as words
from jaxlm.report.artifacts import Run, SweepFolder, dicts, number, part, read_sweep
from jaxlm.report.figure import Plot, save_png
from jaxlm.report.fitted import Approach, approaches
from jaxlm.report.formats import clean, count, fixed, general, interval, percent, power, seconds
from jaxlm.report.page import Child, Html, document, h, join, section, table
from jaxlm.report.plots import sweep_plots
from jaxlm.report.run_report import (
    data_section,
    facts,
    figure,
    footer,
    notices,
    raw,
    sample,
)  # fmt: skip


def write_sweep_report(sweep_dir: str | Path) -> Path:
    """Writes `report.html`, one PNG per plot and `runs.csv` into the folder; gives the page's path.

    Raises UserError when there is no such folder, JaxlmError when the page cannot be written.
    """
    sweep = read_sweep(sweep_dir)
    plots = sweep_plots(sweep.runs, sweep.fit, sweep.prediction, sweep.score)
    for plot in plots.values():
        if plot:
            save_png(plot, sweep.dir)
    write_bytes(sweep.dir / "runs.csv", runs_csv(sweep.runs).encode())
    write_bytes(sweep.dir / "report.html", sweep_page(sweep, plots).encode())
    return sweep.dir / "report.html"


def sweep_page(sweep: SweepFolder, plots: dict[str, Plot | None]) -> str:
    shown = [figure(plot) if plot else _no_figure(name) for name, plot in plots.items()]
    return document(
        f"{sweep.name} · jaxlm sweep",
        h("header", h("h1", sweep.name), h("p", words.subtitle(sweep), class_="sub")),
        _verdict(sweep),
        h("div", facts(words.facts(sweep)), class_="card"),
        notices(words.missing(sweep)),
        notices(words.warnings(sweep), "Warnings and refusals"),
        section("Plots", h("p", words.PLOTS), h("div", *shown, class_="figures"), id="plots"),
        _fits(sweep),
        section(
            "Runs",
            _runs(sweep.runs),
            raw("The same as CSV (also in runs.csv)", runs_csv(sweep.runs)),
            id="runs",
        ),
        _samples(sweep),
        data_section(sweep.manifest),
        section(
            "Methods",
            *(h("p", text) for text in words.methods(sweep)),
            raw("BibTeX", references.used(part(sweep.sweep.get("sweep")))),
            id="methods",
        ),
        footer(),
    )


def _no_figure(name: str) -> Html:
    title, reason = words.NO_FIGURE[name]
    return h("figure", h("figcaption", title), h("p", reason), class_="none", id=f"figure-{name}")


def _verdict(sweep: SweepFolder) -> Html:
    """The headline: was the held-out run predicted?"""
    kind, title, text = words.verdict(sweep)
    predicted, measured = number(sweep.prediction.get("loss")), number(sweep.score.get("measured"))
    error = words.relative_error(sweep)
    ci95 = interval(words.predicted_interval(sweep))
    rows: list[tuple[str, str | None, str]] = [
        ("Predicted loss", fixed(predicted), f"95 %: {ci95}" if ci95 else "no interval"),
        ("Measured loss", fixed(measured), "nats per token, held-out text"),
        ("Error", percent(error, 2), "measured / predicted − 1"),
        ("At compute", power(number(sweep.prediction.get("flops"))), words.extrapolation(sweep)),
    ]
    shown = [h("h2", title), facts(rows) if predicted is not None else None, h("p", text)]
    return h("div", *shown, class_=f"card verdict {kind}", id="verdict")


# ----------------------------------------------------------------------------------------- tables


def _runs(runs: tuple[Run, ...]) -> Html:
    head = ["Run", "Role", "Budget#", "N effective#", "N all#", "N no embedding#", "D#",
            "D/N#", "Learning rate#", "Loss#", "Bits/byte#", "Time#", "Status"]  # fmt: skip
    rows: list[list[Child]] = []
    for run in runs:
        params, tokens = run.number("params_effective"), run.number("tokens")
        kind = {"finished": "good", "diverged": "bad", "failed": "bad"}.get(run.status, "")
        rows.append([
            run.name,
            run.role or None,
            power(run.budget),
            count(params),
            count(run.number("params")),
            count(run.number("params_non_embedding")),
            count(tokens),
            count(tokens / params) if tokens and params else None,
            general(run.number("learning_rate"), 3),
            fixed(run.number("loss"), 4),
            fixed(run.number("eval_bpb"), 4),
            seconds(run.number("wall_time_s")),
            h("span", run.status, class_=f"tag {kind}".strip()),
        ])  # fmt: skip
    return table(head, rows, ids=[f"run-{i}" for i in range(len(runs))])


def runs_csv(runs: tuple[Run, ...]) -> str:
    """One row per member, every plain value of its record; empty where there is none yet."""
    names = ["name", "role", "status", "budget"]
    for run in runs:
        names += [
            k for k, v in run.record.items() if k not in names and not isinstance(v, (dict, list))
        ]
    names = [name for name in names if name != "format"]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        known = {"name": run.name, "role": run.role, "status": run.status, "budget": run.budget}
        row = run.record | known
        writer.writerow({k: clean(v) if isinstance(v, str) else v for k, v in row.items()})
    return out.getvalue()


def _fits(sweep: SweepFolder) -> Html | None:
    if not sweep.fit:
        return None
    head = ["Approach", "a (N* ∝ Cᵃ)#", "95 %#", "b (D* ∝ Cᵇ)#", "95 %#", "Remark"]
    rows: list[list[Child]] = []
    for approach in approaches(sweep.fit):
        numbers_shown: list[Child] = [None, None, None, None]
        if not approach.refused:
            numbers_shown = [f(approach, k) for k in "ab" for f in (_value, _bounds)]
        rows.append([approach.label, *numbers_shown, _remark(sweep, approach)])
    second, third = (Approach(n, part(sweep.fit.get(n))) for n in ("approach2", "approach3"))
    shown = [_foresight(sweep), _minima(second), _parameters(third)]
    return section("Fits", table(head, rows), *shown, id="fits")


def _value(approach: Approach, key: str) -> str | None:
    return fixed(approach.value(key))


def _bounds(approach: Approach, key: str) -> str | None:
    return interval(approach.ci95(key))


def _remark(sweep: SweepFolder, approach: Approach) -> Child:
    if approach.refused:
        return h("span", f"refused: {approach.refused}", class_="tag warn")
    named = sweep.prediction.get("estimator") == approach.name
    return "made the prediction" if named else None


def _foresight(sweep: SweepFolder) -> Html | None:
    """The largest budget as each approach foretold it from the smaller ones."""
    rows: list[list[Child]] = []
    for row in dicts(sweep.fit.get("left_out")):
        reach, flops = number(row.get("extrapolation")), number(row.get("flops"))
        below = power(flops / reach) if flops and reach else None
        losses = [fixed(number(row.get(k)), 4) for k in ("predicted", "measured")]
        rows.append([Approach(str(row.get("estimator")), {}).label, below, power(flops), *losses,
                     percent(number(row.get("error")), 2)])  # fmt: skip
    if not rows:
        return None
    head = ["Approach", "Told up to#", "Asked for#", "Predicted#", "Measured#", "Error#"]
    title = h("h3", "The largest budget, foretold from the smaller ones")
    return join([title, table(head, rows)])


def _minima(second: Approach) -> Html | None:
    """The minimum of every budget, and those that the parabola could not give."""
    rows: list[tuple[float, list[Child]]] = []
    for m in second.minima:
        flops, params, tokens = (number(m.get(k)) for k in ("flops", "params", "tokens"))
        loss = fixed(number(m.get("loss")), 4)
        rows.append((flops or 0.0, [power(flops), count(params), count(tokens), loss, None]))
    for flops, reason in second.refused_minima:
        tag = h("span", f"refused: {reason}", class_="tag warn")
        rows.append((flops or 0.0, [power(flops), None, None, None, tag]))
    if not rows:
        return None
    head = ["Budget C#", "N*#", "D*#", "Loss#", "Remark"]
    by_budget = [row for _, row in sorted(rows, key=lambda r: r[0])]
    return join([h("h3", "IsoFLOP minima (approach 2)"), table(head, by_budget)])


def _parameters(third: Approach) -> Html | None:
    """The parametric law with standard errors and intervals."""
    if third.law is None:
        return None
    rows: list[list[Child]] = [
        [name, general(third.value(name), 5), general(third.error(name), 3),
         " … ".join(general(v, 4) or "" for v in ci) if (ci := third.ci95(name)) else None]
        for name in ("E", "A", "B", "alpha", "beta")
    ]  # fmt: skip
    objective = third.value("objective")
    remark = (
        f"Objective at the optimum: {general(objective, 6)}." if objective is not None else None
    )
    title = h("h3", "L(N, D) = E + A/N^alpha + B/D^beta (approach 3)")
    head = ["Parameter", "Estimate#", "Standard error#", "95 %#"]
    return join([title, table(head, rows), h("p", remark, class_="note") if remark else None])


def _samples(sweep: SweepFolder) -> Html:
    shown = [
        sample(str(s.get("prompt", "")), str(s.get("text", "")))
        for s in dicts(sweep.samples.get("samples"))
    ]
    if not shown:
        return section("Samples", h("p", "No samples yet.", class_="note"), id="samples")
    said = f"Written by {sweep.samples.get('run', 'a member')}; the prompt in colour."
    return section("Samples", h("p", said), *shown, id="samples")
