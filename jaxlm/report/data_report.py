"""`report.html` of a folder of shards: what was read, what each step left, what was dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data import card, inspect
from jaxlm.files import read_jsonl, write_bytes
from jaxlm.report import formats
from jaxlm.report.artifacts import Json
from jaxlm.report.figure import RAMP, Plot, logarithmic, new_plot, save_png, styled
from jaxlm.report.formats import count, percent
from jaxlm.report.page import Child, Html, document, h, join, section, table
from jaxlm.report.run_report import data_section, facts, figures, footer

MAX_SAMPLES = 40


def write_data_report(out: str | Path) -> Path:
    """Writes the page and its plots into the folder. Raises UserError if it holds no shards."""
    folder = Path(out)
    found = card.summary(folder)
    with styled():
        plots = [_lengths(inspect.lengths(folder))]
    for plot in plots:
        save_png(plot, folder)
    manifest = _json(folder / "manifest.json")
    page = document(
        f"{folder.resolve().name} · jaxlm data",
        h("header", h("h1", folder.resolve().name), h("p", _subtitle(found), class_="sub")),
        h("div", facts(_facts(found)), class_="card"),
        _funnel(found),
        section("Shares", _shares(found), id="shares"),
        section("Lengths", figures(plots), id="lengths"),
        _dropped(folder),
        data_section(manifest),
        footer(),
    )
    write_bytes(folder / "report.html", page.encode())
    return folder / "report.html"


def _json(path: Path) -> Json:
    import json

    return json.loads(path.read_text("utf-8"))


def _subtitle(found: Json) -> str:
    dates = " … ".join(found["dates"])
    return " · ".join(filter(None, (f"fingerprint {found['fingerprint']}", dates)))


def _facts(found: Json) -> list[tuple[str, str | None, str]]:
    tokens, size = found["tokens"], found["bytes"]
    words, lost = found["tokenizer"], sum(found["dropped"].values())
    lossless = "every text comes back" if words["lossless"] else "loses some text"
    return [
        ("Documents", count(found["documents"]), f"{count(found['held_out_documents'])} held out"),
        ("Text", formats.size(size), ""),
        ("Tokens", count(tokens), f"{size / max(1, tokens):.2f} bytes per token"),
        ("Tokenizer", str(words["name"]), f"{count(words['vocab_size'])} ids, {lossless}"),
        (
            "Records read",
            count(found["records"]),
            f"{count(lost)} left out",
        ),
    ]


def _funnel(found: Json) -> Html:
    """Each step with what it left and why it dropped the rest; tokens as if all text were alike."""
    per_token = found["bytes"] / max(1, found["tokens"])
    rows: list[list[Child]] = []
    steps: list[dict[str, Any]] = found["clean"].get("steps", [])
    before = None
    if not steps:
        rows.append(["read", count(found["records"]), None, None, None, None])
    for step in steps:
        left = step["documents"] / before if before else 1.0
        lost = f"−{percent(1 - left)}" if left < 1 else None
        why = [f"{count(n)} {reason}" for reason, (n, _) in step.get("dropped", {}).items()]
        rows.append(_row(step["step"], step["documents"], step["bytes"], per_token, lost, why))
        before = step["documents"] or before
    apart = {k: n for k, n in found["dropped"].items() if ": " not in k}
    why = [f"{count(n)} {reason}" for reason, n in apart.items()]
    rows.append(_row("shards", found["documents"], found["bytes"], per_token, None, why))
    changed = [f"{count(n)} × {what}" for what, n in found["clean"].get("changed", {}).items()]
    return section(
        "What each step left",
        table(["Step", "Documents#", "Lost#", "Text#", "Tokens, about#", "Dropped"], rows),
        h("p", f"Changed: {', '.join(changed)}.", class_="note") if changed else None,
        id="funnel",
    )


def _row(
    step: str, documents: int, size: int, per_token: float, lost: str | None, why: list[str]
) -> list[Child]:
    tokens = count(size / per_token)
    return [step, count(documents), lost, formats.size(size), tokens, ", ".join(why) or None]


def _shares(found: Json) -> Html:
    names = (("Language", "languages"), ("Licence of the text", "licences"))
    tables = [
        table(
            [title, "Text#", "Share#"],
            [[k, formats.size(v), percent(v / found["bytes"])] for k, v in found[name].items()],
        )
        for title, name in names
    ]
    return h("div", *tables, class_="figures")


def _lengths(tokens: np.ndarray) -> Plot:
    """Documents by their length, on a logarithmic axis."""
    plot = new_plot("lengths", "Documents by length", "tokens of each training document")
    axes = plot.figure.add_subplot()
    low, high = max(1, int(tokens.min())), int(tokens.max()) + 1
    edges = np.geomspace(low, high, 40)
    axes.hist(tokens, bins=edges.tolist(), color=RAMP[3])
    axes.set_xscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("documents")
    logarithmic(axes.xaxis, low, high, count)
    return plot


def _dropped(folder: Path) -> Html | None:
    path = folder / "dropped.jsonl"
    rows = [r for r in read_jsonl(path) if "step" in r] if path.exists() else []
    if not rows:
        return None
    near = [r for r in rows if "cluster" in r]
    others = [r for r in rows if "cluster" not in r][:MAX_SAMPLES]
    clusters: dict[int, list[Json]] = {}
    for row in near:
        clusters.setdefault(row["cluster"], []).append(row)
    pairs = [g for g in clusters.values() if len(g) > 1][:8]
    return section(
        "Some of what was dropped",
        *(_sample(r, f"{r['step']}: {r['reason']}") for r in others),
        h("h3", "Near-duplicates found") if pairs else None,
        *(
            h("div", join([_sample(r, r["reason"]) for r in group[:3]]), class_="card")
            for group in pairs
        ),
        id="dropped",
    )


def _sample(row: Json, title: str) -> Html:
    text = h("pre", formats.short(str(row["text"]), 400), dir="auto")
    place = " · ".join(filter(None, (str(row["path"]), str(row["language"]))))
    return h("div", h("p", h("b", title), " ", place, class_="note"), text, class_="card sample")
