"""HTML for the reports: escaping, tables, and the page around them.

A page is one file that loads nothing and runs nothing: styles are inside, there is no script, and
the content security policy forbids both scripts and the network. All text passes `h`, which
escapes it: what a model writes may well be markup.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from jaxlm.report.figure import theme_css
from jaxlm.report.formats import clean

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
VOID = ("meta", "br", "hr", "img")


class Html(str):
    """Text that is HTML already."""


Child = str | float | None


def text(value: object) -> Html:
    """`value` escaped; control characters and lone surrogates become visible signs."""
    return Html(html.escape(clean(value)))


def h(tag: str, *children: Child, **attributes: str | int | None) -> Html:
    """An element. `class_` is class, `aria_label` aria-label; children and values are escaped."""
    pairs = (
        (k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items() if v not in (None, "")
    )
    opened = "".join([tag, *(f' {k}="{text(v)}"' for k, v in pairs)])
    if tag in VOID:
        return Html(f"<{opened}>")
    return Html(f"<{opened}>{join(children)}</{tag}>")


def join(children: Iterable[Child], separator: str = "") -> Html:
    shown = (c if isinstance(c, Html) else text(c) for c in children if c is not None)
    return Html(separator.join(shown))


def table(head: Sequence[str], rows: Sequence[Sequence[Child]], ids: Sequence[str] = ()) -> Html:
    """A table that scrolls sideways by itself. Columns whose head ends in '#' hold numbers."""
    kinds = ["n" if name.endswith("#") else "" for name in head]

    def cells(tag: str, row: Sequence[Child]) -> Html:
        shown = ("–" if c is None else c for c in row)
        return join(h(tag, c, class_=k) for c, k in zip(shown, kinds, strict=True))

    body = [
        h("tr", cells("td", row), id=ids[i] if ids else None, tabindex="-1" if ids else None)
        for i, row in enumerate(rows)
    ]
    top = h("thead", h("tr", cells("th", [name.rstrip("#") for name in head])))
    return h("div", h("table", top, h("tbody", *body)), class_="scroll", tabindex="0")


def section(title: str, *children: Child, id: str = "") -> Html:
    return h("section", h("h2", title), *children, id=id)


def listing(items: Iterable[Child], class_: str = "") -> Html:
    return h("ul", *(h("li", item) for item in items), class_=class_)


def tokens_css() -> str:
    """Colours by name, light and dark, for a page with styles of its own."""
    return theme_css() + TOKENS


def document(title: str, *body: Child) -> str:
    """The whole page."""
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=POLICY),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("meta", name="referrer", content="no-referrer"),
        h("title", title),
        h("style", Html(theme_css() + CSS)),
    )
    return f"<!doctype html>\n{h('html', head, h('body', h('main', *body)), lang='en')}\n"


TOKENS = """
:root{--page:#f6f8fa;--card:#ffffff;--line:#d1d9e0;--link:#0969da;
--good:#1a7f37;--good-bg:#e6f6ea;--bad:#b3261e;--bad-bg:#fdeceb;--warn:#8a5a00;--warn-bg:#fff5dc;
--wait:#59636e;--wait-bg:#eef1f4}
@media (prefers-color-scheme:dark){:root{--page:#010409;--card:#0d1117;--line:#30363d;
--link:#6cb6ff;--good:#56d364;--good-bg:#0f2417;--bad:#ff8f87;--bad-bg:#2d1414;--warn:#e3b341;
--warn-bg:#2a2110;--wait:#9198a1;--wait-bg:#161b22}}
"""

CSS = (
    TOKENS
    + """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 12px}
h3{font-size:1rem;margin:18px 0 6px}
p{margin:6px 0 10px;max-width:78ch}
a{color:var(--link)}
.sub,figcaption span,.note{color:var(--muted)}
.sub{margin:0 0 20px}
.card,figure,details{background:var(--card);border:1px solid var(--line);border-radius:10px}
.card{padding:16px 20px;overflow-wrap:anywhere}
.verdict{border-left:6px solid var(--wait)}
.verdict h2{margin:0 0 10px;font-size:1.3rem}
.verdict.good{border-left-color:var(--good)}.verdict.good h2{color:var(--good)}
.verdict.bad{border-left-color:var(--bad)}.verdict.bad h2{color:var(--bad)}
.verdict p{margin-bottom:0}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px 24px;margin:0}
.facts div{min-width:0}
.facts dt{color:var(--muted);font-size:.82rem}
.facts dd{margin:0;font-size:1.35rem;font-weight:600;line-height:1.3;
font-variant-numeric:tabular-nums}
.facts dd small{display:block;font-size:.82rem;font-weight:400;color:var(--muted)}
.card+.card{margin-top:14px}
.sample{padding:4px 6px}.sample .note{margin:0 16px 8px;font-size:.85rem}
.verdict p{margin-top:12px}
.warn{background:var(--warn-bg);border-color:var(--warn)}
.warn h2{margin:0 0 6px;font-size:1rem;color:var(--warn)}
.warn ul{margin:0;padding-left:20px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:16px}
figure{margin:0;padding:14px 16px 12px;min-width:0}
figcaption{font-weight:600;line-height:1.4;margin-bottom:4px}
figcaption span{display:block;font-weight:400;font-size:.87rem}
figure svg{display:block;width:100%;height:auto;overflow:visible}
figure.none p{margin:22px 0;color:var(--muted)}
svg *{stroke-linejoin:round}
svg text{font-family:inherit!important}
svg .pt{cursor:pointer;outline:none}
svg .hit{fill:none;stroke:transparent;stroke-width:9px;pointer-events:stroke}
svg .tip{visibility:hidden;fill:var(--ink);font-size:9px;font-weight:600;pointer-events:none}
svg .pt:hover .tip,svg .pt:focus .tip{visibility:visible}
svg .pt:hover use,svg .pt:focus use{stroke:var(--ink)!important;stroke-width:2px!important}
svg .pt:hover path:not(.hit),svg .pt:focus path:not(.hit){stroke-width:2.6px!important}
svg:has(.pt:hover) .pt:not(:hover){opacity:.45}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.85rem}
th,td{padding:6px 9px;text-align:left;white-space:nowrap;border-bottom:1px solid var(--line)}
tbody tr:last-child td{border-bottom:0}
th{color:var(--muted);font-weight:600}
td:first-child,th:first-child{position:sticky;left:0;background:var(--card)}
td:last-child{white-space:normal;min-width:9ch}
.n{text-align:right;font-variant-numeric:tabular-nums}
tr:target td,tr:focus td{background:var(--warn-bg)}
.tag{display:inline-block;padding:0 8px;border-radius:9px;font-size:.8rem;background:var(--wait-bg);
color:var(--wait)}
.tag.good{background:var(--good-bg);color:var(--good)}
.tag.bad{background:var(--bad-bg);color:var(--bad)}
.tag.warn{color:var(--warn)}
pre{margin:0;padding:12px 16px;overflow-x:auto;font:13px/1.5 ui-monospace,Menlo,Consolas,
"DejaVu Sans Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere}
pre b{color:var(--approach2)}
details{padding:0;margin-top:12px}
summary{cursor:pointer;padding:10px 16px;font-weight:600}
details pre{border-top:1px solid var(--line);max-height:420px;overflow:auto}
details.raw pre{white-space:pre;overflow-wrap:normal}
footer{margin-top:44px;color:var(--muted);font-size:.85rem}
@media (max-width:600px){main{padding:18px 12px 40px}figure{padding:12px 10px}
.card{padding:14px}.facts{grid-template-columns:repeat(2,1fr);gap:12px 14px}}
@media print{body{background:none}.figures{display:block}figure{break-inside:avoid;margin:0 0 12px}}
"""
)
