"""The plots of a single run: loss, bits per byte, tasks, learning rate, and what probes answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from jaxlm.report.artifacts import Json, Run, dicts, number, part
from jaxlm.report.figure import (
    MUTED,
    PALETTE,
    RAMP,
    Plot,
    Tip,
    key,
    logarithmic,
    new_plot,
    styled,
)  # fmt: skip
from jaxlm.report.formats import count, fixed, percent, short, token

MAX_PROBES = 6  # prompts with a plot of their own
MAX_TOKENS = 6  # lines in one of them
MAX_PANELS = 6  # scores of tasks, one above the other


def run_plots(run: Run) -> list[Plot]:
    """Every plot that the run's rows carry, in the order of the page."""
    with styled():
        found = [loss_plot(run), sources_plot(run), bits_plot(run), tasks_plot(run)]
        found.append(steps_plot(run))
        prompts = list(probes(run))[:MAX_PROBES]
        found += [probe_plot(run, prompt, i) for i, prompt in enumerate(prompts)]
    return [plot for plot in found if plot]


def binned(x: Sequence[float], y: Sequence[float], bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of (x, y) in `bins` intervals of equal width in log x: a readable curve."""
    x_n, y_n = np.asarray(x), np.asarray(y)
    keep = x_n > 0
    x_n, y_n = x_n[keep], y_n[keep]
    if len(x_n) <= bins:
        return x_n, y_n
    place = np.log(x_n / x_n.min()) / np.log(x_n.max() / x_n.min())
    index = np.minimum((place * bins).astype(int), bins - 1)
    rows = np.bincount(index, minlength=bins)
    x_b, y_b = (np.bincount(index, v, bins)[rows > 0] / rows[rows > 0] for v in (x_n, y_n))
    return x_b, y_b


def tokens_per_step(run: Run) -> float | None:
    batch = number(part(run.config.get("train")).get("global_batch_size"))
    length = number(part(run.config.get("model")).get("seq_len"))
    batch = batch or run.number("global_batch_size")
    length = length or run.number("seq_len")
    return batch * length if batch and length else None


def probes(run: Run) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """Prompt → [(step, {token text: probability})], in order of steps."""
    found: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for row in run.rows:
        step, prompt = number(row.get("step")), row.get("probe/prompt")
        if step is not None and isinstance(prompt, str):
            found.setdefault(prompt, []).append((step, _distribution(row)))
    return {prompt: sorted(rows, key=lambda r: r[0]) for prompt, rows in found.items()}


def _distribution(row: Json) -> dict[str, float]:
    top = row.get("probe/top")
    top = top if isinstance(top, list) else []
    pairs = [p for p in top if isinstance(p, list) and len(p) == 2]
    return {str(text): p for text, share in pairs if (p := number(share)) is not None}


def _curve(run: Run, name: str) -> tuple[list[float], list[float], str]:
    """(x, y, label of x): training tokens where they are known, else steps."""
    steps, values = run.curve(name, "step")
    per_step = tokens_per_step(run)
    if per_step is None:
        return steps, values, "optimizer step"
    return [s * per_step for s in steps], values, "training tokens D"


def _log_axis(axes: Axes, x: Sequence[float], label: str) -> None:
    axes.set_xscale("log")
    logarithmic(axes.xaxis, min(x), max(x), count)
    axes.set_xlabel(label + " (log scale)")


def loss_plot(run: Run) -> Plot | None:
    x, train, label = _curve(run, "train/loss")
    x_eval, held_out, _ = _curve(run, "eval/loss")
    if len(x) < 2:
        return None
    plot = new_plot(
        "loss",
        "Loss over training",
        "Grey: every logged step. Line: its mean in 80 intervals. Diamonds: held-out text.",
    )
    axes = plot.figure.add_subplot()
    axes.plot(x, train, color=MUTED, linewidth=0.7, alpha=0.35)
    axes.plot(*binned(x, train, 80), color=PALETTE["approach2"][0])
    for at, loss in zip(x_eval, held_out, strict=True):
        tip = Tip(f"held-out loss {fixed(loss)} nats/token at {count(at)} ({label})")
        plot.draw(axes, [at], [loss], tip, marker="D", color=PALETTE["approach1"][0])
    _log_axis(axes, [v for v in x if v > 0], label)
    axes.set_ylabel("loss (nats/token)")
    blue = key("training", color=PALETTE["approach2"][0])
    diamond = key("held-out", color=PALETTE["approach1"][0], marker="D", linestyle="")
    plot.legend([blue, diamond] if x_eval else [blue], columns=2)
    return plot


def _named(run: Run, prefix: str) -> list[str]:
    """The names of what is logged under `prefix` more than once, in the order it came."""
    names = dict.fromkeys(k for row in run.rows for k in row if k.startswith(prefix))
    return [name for name in names if len(run.curve(name, "step")[0]) > 1]


def sources_plot(run: Run) -> Plot | None:
    """The held-out loss of each source: what is learnt of one and forgotten of another."""
    names = _named(run, "eval/loss/")[: len(RAMP)]
    if len(names) < 2:
        return None
    plot = new_plot(
        "sources",
        "Held-out loss by source",
        "What is learnt of one, and what is forgotten of another.",
    )
    axes = plot.figure.add_subplot()
    keys = []
    for i, name in enumerate(names):
        x, y, label = _curve(run, name)
        style = {"color": RAMP[i * (len(RAMP) - 1) // (len(names) - 1)], "marker": "osD^vP"[i % 6]}
        source = short(name.removeprefix("eval/loss/"), 30)
        plot.draw(axes, x, y, Tip(f"{source}: {fixed(y[0])} → {fixed(y[-1])}"), **style)
        keys.append(key(source, **style))
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(lambda value, _: count(value) or "")
    axes.set_ylabel("loss (nats/token)")
    plot.legend(keys, columns=2)
    return plot


def tasks_plot(run: Run) -> Plot | None:
    """The scores of `train.tasks`, each with an axis of its own."""
    names = _named(run, "task/")[:MAX_PANELS]
    if not names:
        return None
    plot = new_plot(
        "tasks",
        "Tasks during training",
        "Scores of the tasks of train.tasks at each evaluation; at 0 before any step.",
        max(3.7, 1.4 * len(names)),
    )
    panels = plot.figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    color = PALETTE["approach3"][0]
    for axes, name in zip(panels, names, strict=True):
        x, y, label = _curve(run, name)
        _, task, metric = name.split("/", 2)
        axes.plot(x, y, color=color)
        for at, value in zip(x, y, strict=True):
            tip = Tip(f"{task}: {metric} {fixed(value)} at {count(at) or 0} ({label})")
            plot.draw(axes, [at], [value], tip, marker="D", color=color)
        axes.set_ylabel(f"{short(task, 20)}\n{metric}")
        axes.xaxis.set_major_formatter(lambda value, _: count(value) or "")
    panels[-1].set_xlabel(label)
    return plot


def bits_plot(run: Run) -> Plot | None:
    x, bits, label = _curve(run, "eval/bpb")
    if len(x) < 2:
        return None
    plot = new_plot(
        "bits_per_byte",
        "Held-out bits per byte",
        "Comparable between tokenizers: total loss in bits over the bytes of the text.",
    )
    axes = plot.figure.add_subplot()
    color = PALETTE["approach1"][0]
    axes.plot(x, bits, color=color)
    for at, value in zip(x, bits, strict=True):
        tip = Tip(f"{fixed(value)} bits per byte at {count(at)} ({label})")
        plot.draw(axes, [at], [value], tip, marker="D", color=color)
    _log_axis(axes, [v for v in x if v > 0], label)
    axes.set_ylabel("bits per byte")
    return plot


def steps_plot(run: Run) -> Plot | None:
    """Learning rate and gradient norm, one above the other."""
    panels = [
        ("learning_rate", "learning rate", "approach3"),
        ("train/grad_norm", "gradient norm", "prediction"),
    ]
    found = [(_curve(run, name), label, color) for name, label, color in panels]
    found = [panel for panel in found if len(panel[0][0]) > 1]
    if not found:
        return None
    plot = new_plot(
        "schedule",
        "Learning rate and gradient norm",
        "Before clipping. The horizontal axis is linear.",
    )
    all_axes = plot.figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, ((x, y, x_label), label, color) in zip(all_axes, found, strict=True):
        axes.plot(x, y, color=PALETTE[color][0], linewidth=1.3)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(lambda value, _: count(value) or "")
        all_axes[-1].set_xlabel(x_label)
    return plot


def probe_plot(run: Run, prompt: str, index: int) -> Plot | None:
    """Probability of the likeliest next tokens of `prompt` as training goes on."""
    rows = probes(run)[prompt]
    if len(rows) < 2:
        return None
    best: dict[str, float] = {}
    for _, distribution in rows:
        for text, share in distribution.items():
            best[text] = max(share, best.get(text, 0.0))
    last = rows[-1][1]
    names = sorted(best, key=lambda t: (-last.get(t, 0.0), -best[t]))[:MAX_TOKENS]
    plot = new_plot(
        f"probe_{index}",
        f"Next token after “{short(prompt, 40)}”",
        "Probability of the tokens likeliest at the end. A line breaks where a token was not "
        "among those logged.",
    )
    axes = plot.figure.add_subplot()
    marks = "osD^vP"
    keys = []
    for i, name in enumerate(names):
        style = {
            "color": RAMP[i * (len(RAMP) - 1) // max(1, len(names) - 1)],
            "marker": marks[i],
            "markersize": 4,
        }
        shares = [distribution.get(name, float("nan")) for _, distribution in rows]
        tip = Tip(f"{token(name)}: {percent(last.get(name))} at the end" if name in last
                  else f"{token(name)}: at most {percent(best[name])}")  # fmt: skip
        plot.draw(axes, [step for step, _ in rows], shares, tip, **style)
        keys.append(key(token(name), **style))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("probability")
    axes.xaxis.set_major_formatter(lambda value, _: count(value) or "")
    plot.legend(keys, columns=min(6, len(keys)) or 1)
    return plot


def samples(run: Run) -> dict[str, list[tuple[float, str]]]:
    """Prompt → [(step, continuation)], in order of steps."""
    found: dict[str, list[tuple[float, str]]] = {}
    for row in dicts(list(run.rows)):
        step, prompt = number(row.get("step")), row.get("sample/prompt")
        if step is not None and isinstance(prompt, str):
            found.setdefault(prompt, []).append((step, str(row.get("sample/text", ""))))
    return {prompt: sorted(rows) for prompt, rows in found.items()}
