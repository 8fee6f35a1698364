"""A plot as a PNG file, and as inline SVG that follows the page and whose points answer.

Figures are drawn once, in the light palette, for both PNG and page. Inline, every palette colour
becomes a CSS variable (so that dark mode re-colours the plot) and every artist with a tip becomes
a link to its run that shows the tip while it is hovered or focused. No script is needed.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from jaxlm.files import write_bytes
from jaxlm.report.formats import clean

# Name → (light, dark). Hues after Okabe & Ito (2008), which stay apart for the colour-blind;
# the ramps are viridis without its end that vanishes against the page.
PALETTE = {
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9198a1"),
    "grid": ("#e4e8ec", "#262c34"),
    "edge": ("#fefefe", "#0d1117"),
    "approach1": ("#d55e00", "#ff8f3f"),
    "approach2": ("#0072b2", "#56b4e9"),
    "approach3": ("#00835f", "#2cc59b"),
    "prediction": ("#b0488a", "#e79cc9"),
    "ramp0": ("#440154", "#8f7bd1"),
    "ramp1": ("#472b7a", "#6f8fd6"),
    "ramp2": ("#3b518a", "#4fa3cf"),
    "ramp3": ("#2c718e", "#35b3bd"),
    "ramp4": ("#218f8d", "#35c29f"),
    "ramp5": ("#2aa76f", "#62d07c"),
    "ramp6": ("#4aa83f", "#9ad95a"),
    "ramp7": ("#7a9a12", "#cfe04a"),
}
TITLE_GID = "title"
INK, MUTED, GRID, EDGE = (PALETTE[n][0] for n in ("ink", "muted", "grid", "edge"))
RAMP = [PALETTE[f"ramp{i}"][0] for i in range(8)]

STYLE = {
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a run may be called $x$
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 6.5,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxlm",
    "savefig.dpi": 160,
}


@dataclass(frozen=True)
class Tip:
    """What an artist says when it is pointed at, and the place on the page it leads to."""

    text: str
    href: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure, the words around it, and the tips of its artists by gid."""

    name: str  # file name without suffix
    title: str
    figure: Figure
    caption: str = ""
    tips: dict[str, Tip] = field(default_factory=dict)

    def draw(self, axes: Axes, x: Any, y: Any, tip: Tip | None = None, **style: Any) -> None:
        """A point or a line that answers with `tip`."""
        gid = None
        if tip:
            gid = f"pt{len(self.tips)}"
            self.tips[gid] = tip
        axes.plot(x, y, gid=gid, **style)

    def legend(self, handles: list[Line2D], columns: int = 1) -> None:
        """Below the axes, so that it covers no data."""
        self.figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def new_plot(name: str, title: str, caption: str, height: float = 3.7) -> Plot:
    """An empty plot of one size for all: two in a row on a screen, one on a phone."""
    figure = Figure(figsize=(5.4, height), layout="constrained")
    figure.suptitle(title, gid=TITLE_GID, fontsize=10.5, fontweight="bold")
    return Plot(name, title, figure, caption)


def key(label: str, **style: Any) -> Line2D:
    """A legend entry."""
    return Line2D([], [], label=label, **style)


def styled() -> Any:
    """The context in which every figure is made and drawn."""
    return matplotlib.rc_context(STYLE | {"font.family": _fonts()})  # type: ignore[arg-type]


@functools.cache
def _fonts() -> list[str]:
    """DejaVu, which matplotlib brings, then what this machine has for the other scripts."""
    wanted = ("Noto Sans CJK JP", "Noto Sans", "IPAexGothic", "Hiragino Sans", "Yu Gothic")
    installed = font_manager.get_font_names()
    return ["DejaVu Sans", *(name for name in wanted if name in installed)]


def logarithmic(axis: Axis, low: float, high: float, label: Callable[[float], str | None]) -> None:
    """Ticks at round values, six or so, each named by `label(value)`."""
    decades = math.log10(high / low) if 0 < low < high else 0.0
    steps = next(steps for limit, steps in _STEPS if decades < limit)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20) if steps else MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value) or ""))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


# Decades shown → digits of the ticks; within half a decade they are evenly spaced.
_STEPS: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0.5, ()),
    (1.3, (1.0, 2.0, 3.0, 5.0)),
    (2.3, (1.0, 2.0, 5.0)),
    (3.6, (1.0, 3.0)),
    (math.inf, (1.0,)),
)


def save_png(plot: Plot, folder: Path) -> Path:
    """`folder`/NAME.png, about 860 pixels wide. Raises JaxlmError where it cannot be written."""
    buffer = io.BytesIO()
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script without a font: boxes
        plot.figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    plot.figure.set_layout_engine("none")  # laid out now; what is drawn next keeps its places
    path = folder / f"{plot.name}.png"
    write_bytes(path, buffer.getvalue())
    return path


def theme_css() -> str:
    """The palette as CSS variables, light and dark."""
    light, dark = ("".join(f"--{n}:{c[i]};" for n, c in PALETTE.items()) for i in (0, 1))
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def inline_svg(plot: Plot) -> str:
    """The plot as an <svg> element for an HTML page."""
    buffer = io.StringIO()
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has other fonts
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        plot.figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    root = ElementTree.fromstring(buffer.getvalue())
    _plain_names(root)
    width, height = (float(v) for v in root.get("viewBox", "0 0 1 1").split()[2:])
    root.attrib = {"viewBox": f"0 0 {width:g} {height:g}", "role": "group"}
    root.set("aria-label", clean(plot.title))
    for parent in root.iter():
        for child in list(parent):
            if child.tag in ("style", "metadata") or child.get("id") == TITLE_GID:
                parent.remove(child)
    for element in list(root.iter()):
        tip = plot.tips.get(element.get("id", ""))
        if tip:
            _answering(element, tip, width)
    _private_ids(root, plot.name)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _themed(value) if key == "style" else _shorter(key, value))
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    for variable, (light, _) in PALETTE.items():
        style = style.replace(light, f"var(--{variable})")
    return style


def _shorter(key: str, value: str) -> str:
    """Coordinates to 0.01 pt: a third of the size."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", value) if key in ("d", "x", "y", "transform") else value


def _plain_names(root: ElementTree.Element) -> None:
    """Without XML namespaces, as HTML wants inline SVG."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {k.rpartition("}")[2]: v for k, v in element.attrib.items()}


def _answering(element: ElementTree.Element, tip: Tip, width: float) -> None:
    """`element` becomes a link with a tooltip, a read-out above the axes and a wider target."""
    element.tag = "a"
    element.attrib = {"class": "pt"} | ({"href": tip.href} if tip.href else {"tabindex": "0"})
    for path in [p for p in element.findall("path") if "fill: none" in p.get("style", "")]:
        wide = copy.copy(path)
        wide.attrib = {**path.attrib, "class": "hit", "style": ""}
        element.append(wide)
    title = ElementTree.Element("title")
    title.text = clean(tip.text)
    element.insert(0, title)
    at = {"class": "tip", "x": f"{width / 2:g}", "y": "10", "text-anchor": "middle"}
    ElementTree.SubElement(element, "text", at).text = title.text


def _private_ids(root: ElementTree.Element, name: str) -> None:
    """Ids that nothing refers to go; the others get the figure's name in front."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(#|href="#)(\w+)', text))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
            continue
        element.set("id", f"{name}-{element.get('id')}")
    for element in root.iter():
        if element.tag == "use":
            element.set("href", f"#{name}-{element.get('href', '')[1:]}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("#", f"#{name}-"))
