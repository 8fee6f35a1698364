"""A page that shows what a model makes of a prompt: tokens, attention maps, what may follow.

One file without scripts: a map is chosen by a link to it (`:target`), its cells are a small PNG.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.files import write_bytes
from jaxlm.report.formats import fixed, percent, token
from jaxlm.report.page import Html, document, h, section, table
from jaxlm.report.run_report import footer, sample

INK = (0, 114, 178)  # of a weight of 1; a weight of 0 lets the page show through
LOOKS = 4  # strongest looks told of each head


def write_inspect_page(model: str, prompt: str, found: dict[str, Any], out: Path) -> Path:
    """`found` is what `LanguageModel.inspect` gives. Raises JaxlmError if it cannot be written."""
    write_bytes(out, page(model, prompt, found).encode())
    return out


def page(model: str, prompt: str, found: dict[str, Any]) -> str:
    texts = [token(entry["text"]) for entry in found["tokens"]]
    maps = np.asarray(found["maps"], np.float32)
    n, heads, t, _ = maps.shape
    about = f"{model}: {t} tokens, {n} layers of {heads} heads"
    return document(
        "jaxlm inspect",
        h("style", Html(CSS)),
        h("h1", "What the model makes of it"),
        h("p", about, class_="sub"),
        sample(prompt, ""),
        tokens_section(texts, found, maps),
        maps_section(texts, maps),
        footer(),
    )


def tokens_section(texts: list[str], found: dict[str, Any], maps: np.ndarray) -> Html:
    head = ["Token#", "Text", "Id#", "Looks farther at"]
    head += ["What may follow"] if found["next"] else []
    rows = []
    for i, entry in enumerate(found["tokens"]):
        row = [str(i), h("code", texts[i]), str(entry["id"]), look(texts, maps, i)]
        if found["next"]:
            said = [
                h("span", h("code", token(text)), " ", percent(share), class_="said")
                for text, share in found["next"][i]
            ]
            row.append(h("span", *said))
        rows.append(row)
    return section("Tokens", table(head, rows), id="tokens")


def look(texts: list[str], maps: np.ndarray, i: int) -> Html | None:
    """Which token a token looks at most, of all layers and heads: leaving out the first and itself,
    where heads rest that have nothing to do, and its neighbours, at which some always look."""
    weights = maps[:, :, i].copy()
    weights[:, :, [0, *range(max(0, i - 1), min(len(texts), i + 2))]] = 0
    layer, head, j = np.unravel_index(weights.argmax(), weights.shape)
    if weights[layer, head, j] < 0.01:
        return None
    where = h("a", f"layer {layer}, head {head}", href=f"#map-{layer}-{head}")
    share = percent(float(weights[layer, head, j]), 0)
    return h("span", h("code", texts[int(j)]), f" {share} in ", where)


def maps_section(texts: list[str], maps: np.ndarray) -> Html:
    n, heads, _, _ = maps.shape
    top = h("tr", h("th", "layer"), *(h("th", str(i)) for i in range(heads)))
    rows = []
    for layer in range(n):
        cells = []
        for head in range(heads):
            name = f"layer {layer}, head {head}"
            image = h("img", src=png(maps[layer, head]), alt=name, class_="cells")
            cells.append(h("td", h("a", image, href=f"#map-{layer}-{head}", title=name)))
        rows.append(h("tr", h("th", str(layer)), *cells))
    grid = h("div", h("table", h("thead", top), h("tbody", *rows)), class_="scroll maps")
    note = (
        "A row of a map is a token that looks, a column one that is looked at; the darker, the"
        " more. Choose a map to see it with its tokens."
    )
    large = [
        enlarged(texts, maps[layer, head], layer, head)
        for layer in range(n)
        for head in range(heads)
    ]
    return section("Attention, layer by head", h("p", note, class_="note"), *large, grid, id="maps")


def enlarged(texts: list[str], weights: np.ndarray, layer: int, head: int) -> Html:
    """One map with its tokens, and its strongest looks in words."""
    t = len(texts)
    columns = h("div", *(h("span", text) for text in texts), class_="columns")
    rows = h("div", *(h("span", text) for text in texts), class_="rows")
    image = h("img", src=png(weights), alt="", class_="cells", style=f"width:{18 * t}px")
    told = weights.copy()
    told[:, 0] = 0
    np.fill_diagonal(told, 0)
    order = np.argsort(-told, axis=None)[:LOOKS]
    looks = [
        h("li", h("code", texts[i]), " → ", h("code", texts[j]), f" {fixed(float(told[i, j]), 2)}")
        for i, j in zip(*np.unravel_index(order, told.shape), strict=True)
        if told[i, j] >= 0.01
    ]
    return h(
        "div",
        h("h3", f"Layer {layer}, head {head}"),
        h("div", h("div", h("i"), columns, rows, image, class_="large"), class_="wide"),
        h("ul", *looks) if looks else h("p", "It rests on the first token or on each itself."),
        h("a", "close", href="#maps"),
        class_="card map",
        id=f"map-{layer}-{head}",
    )


def png(weights_ts: np.ndarray) -> str:
    """A data URI: a pixel per weight, as opaque as the weight is large."""
    from PIL import Image

    rgba = np.empty((*weights_ts.shape, 4), np.uint8)
    rgba[..., :3] = INK
    rgba[..., 3] = np.clip(np.sqrt(weights_ts) * 255, 0, 255)  # the root shows the faint ones too
    file = io.BytesIO()
    Image.fromarray(rgba, "RGBA").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


CSS = """
.cells{display:block;image-rendering:pixelated;border:1px solid var(--line)}
.maps table{width:auto}.maps td,.maps th{padding:3px 4px;border:0;text-align:center}
.maps .cells{width:56px;height:56px}.maps a:hover .cells,.maps a:focus .cells{outline:2px solid
var(--link)}
.map{display:none;margin-bottom:14px;scroll-margin-top:12px}.map:target{display:block}
.wide{overflow-x:auto}
.large{display:grid;grid-template-columns:max-content max-content;width:max-content}
.large span{font:12px/18px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre;color:var(--ink)}
.columns{display:flex;align-items:flex-end}.columns span{writing-mode:vertical-rl;width:18px;
text-orientation:sideways;transform:rotate(180deg)}
.rows{text-align:right;padding:1px 6px 0 0}.rows span{display:block;height:18px}
.large .cells{aspect-ratio:1}
.said{display:inline-block;margin-right:12px;white-space:nowrap}
code{font:13px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:var(--wait-bg);
border-radius:4px;padding:0 4px;white-space:pre}
"""
