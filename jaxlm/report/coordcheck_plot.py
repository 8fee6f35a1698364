"""The coordinate check as one picture: sizes against width and against depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxlm.report.figure import PALETTE, logarithmic, new_plot, save_png, styled
from jaxlm.report.formats import general

_STYLES = {
    "stream_half_way": ("approach1", "o", "stream, half-way"),
    "stream_at_the_end": ("approach2", "s", "stream, at the end"),
    "logits": ("approach3", "^", "logits"),
    "update": ("ink", "D", "update of a matrix, spectral"),
}


def plot(found: dict[str, Any], folder: Path) -> Path:
    """`folder`/coordcheck.png: change after the steps (log) against size (log), by quantity."""
    title = (
        f"{found['parametrization']}, {found['optimizer']} at {found['learning_rate']:g}: change"
        f" after {found['steps']} steps"
    )
    with styled():
        drawn = new_plot("coordcheck", title, "")
        axes = drawn.figure.subplots(1, 2, sharey=True)
        for ax, direction in zip(axes, ("width", "depth"), strict=True):
            rows = [r for r in found["rows"] if r["direction"] == direction]
            sizes = [r["size"] for r in rows]
            for quantity, (color, marker, label) in _STYLES.items():
                ax.plot(sizes, [r[quantity] for r in rows], marker=marker, label=label,
                        color=PALETTE[color][0])  # fmt: skip
            ax.set(xscale="log", yscale="log", xlabel=direction)
            ax.set_xticks(sizes, [str(s) for s in sizes])
            ax.minorticks_off()
        values = [row[quantity] for row in found["rows"] for quantity in _STYLES]
        low, high = min(values) / 2, max(values) * 2  # what is flat should look so
        axes[0].set_ylim(low, high)
        logarithmic(axes[0].yaxis, low, high, lambda value: general(value, 2))
        drawn.figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2
        )
        return save_png(drawn, folder)
