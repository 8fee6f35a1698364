"""`report.html` of a single run: its losses, what probes and samples said, and what it had read."""

from __future__ import annotations

import json
from pathlib import Path

from jaxlm.files import write_bytes
from jaxlm.report import formats, run_plots
from jaxlm.report.artifacts import Json, Run, dicts, number, part, read_run
from jaxlm.report.figure import Plot, inline_svg, save_png
from jaxlm.report.formats import count, fixed, percent, power, seconds
from jaxlm.report.page import Child, Html, document, h, join, listing, section, table
from jaxlm.schema import UserError


def write_run_report(run_dir: str | Path) -> Path:
    """Writes `report.html` and one PNG per plot into the run's folder; gives the page's path.

    Reads files only, and whatever is there: a page of a run that is still going, or that failed,
    says what is missing. Raises UserError when there is no run at all, JaxlmError when the page
    cannot be written.
    """
    folder = Path(run_dir)
    if not any(
        (folder / name).is_file() for name in ("config.json", "metrics.jsonl", "record.json")
    ):
        raise UserError(f"report: expected a run's folder (with config.json), got {str(folder)!r}")
    run = read_run(folder)
    plots = run_plots.run_plots(run)
    for plot in plots:
        save_png(plot, folder)
    write_bytes(folder / "report.html", run_page(run, plots).encode())
    return folder / "report.html"


def run_page(run: Run, plots: list[Plot]) -> str:
    settings = {"model": run.config.get("model"), "optimizer": run.config.get("optimizer")}
    return document(
        f"{run.name} · jaxlm run",
        h("header", h("h1", run.name), h("p", _subtitle(run), class_="sub")),
        h("div", facts(_facts(run)), class_="card"),
        notices(_missing(run)),
        section("Training", figures(plots), id="plots") if plots else None,
        _probe_section(run),
        _sample_section(run),
        data_section(run.manifest),
        section("Configuration", raw("config.json", _json(run.config)))
        if any(settings.values())
        else None,
        footer(),
    )


# ------------------------------------------------------------ pieces that the sweep's page shares


def facts(rows: list[tuple[str, str | None, str]]) -> Html:
    """(name, value, remark) as a strip of large figures; rows without a value are left out."""
    shown = [
        h("div", h("dt", name), h("dd", value, h("small", remark) if remark else None))
        for name, value, remark in rows
        if value is not None
    ]
    return h("dl", *shown, class_="facts")


def notices(lines: list[str], title: str = "Not complete") -> Html | None:
    if not lines:
        return None
    return h("aside", h("h2", title), listing(lines), class_="card warn")


def figures(plots: list[Plot]) -> Html:
    return h("div", *(figure(plot) for plot in plots), class_="figures")


def figure(plot: Plot) -> Html:
    caption = h("figcaption", plot.title, h("span", plot.caption) if plot.caption else None)
    return h("figure", caption, Html(inline_svg(plot)), id=f"figure-{plot.name}")


def raw(title: str, content: str) -> Html:
    """Text to be copied, folded away."""
    return h("details", h("summary", title), h("pre", content), class_="raw")


def footer() -> Html:
    return h(
        "footer",
        "Written by jaxlm from the files in this folder. Nothing was loaded from elsewhere.",
    )


def sample(prompt: str, continuation: str, remark: str = "") -> Html:
    """A prompt in colour and what the model wrote after it."""
    shown = h("pre", h("b", prompt), continuation, dir="auto")
    return h("div", shown, h("p", remark, class_="note") if remark else None, class_="card sample")


def data_section(manifest: Json) -> Html:
    """What was read, and under which licence, from the data manifest."""
    if not manifest:
        return section("What was read", h("p", "No data manifest yet.", class_="note"), id="data")
    tokenizer = part(manifest.get("tokenizer"))
    splits = [(name, part(manifest.get(name))) for name in ("train", "eval")]
    sizes: list[tuple[str, str | None, str]] = [
        (
            {"train": "Training text", "eval": "Held-out text"}[name],
            f"{count(number(split.get('tokens')))} tokens",
            f"{formats.size(number(split.get('bytes')))}"
            f" in {count(number(split.get('documents')))} documents",
        )
        for name, split in splits
        if split
    ]
    vocabulary = number(tokenizer.get("vocab_size"))
    if tokenizer:
        kind = str(tokenizer.get("name") or tokenizer.get("kind") or "?")
        sizes.append(("Tokenizer", kind, f"{count(vocabulary)} token ids" if vocabulary else ""))
    return section(
        "What was read",
        h("div", facts(sizes), class_="card"),
        h("h3", "Sources and licences"),
        table(
            [
                "Source",
                "Licence of the text",
                "Licence of the package",
                "Language",
                "Documents#",
                "Text#",
                "Attribution",
            ],
            [_origin(row) for row in dicts(manifest.get("origins"))],
        ),
        _dropped(part(manifest.get("dropped"))),
        id="data",
    )


def _origin(row: Json) -> list[Child]:
    return [
        row.get("source"),
        row.get("text_licence"),
        row.get("package_licence"),
        row.get("language") or None,
        count(number(row.get("documents"))),
        formats.size(number(row.get("bytes"))),
        row.get("attribution") or None,
    ]


def _dropped(dropped: Json) -> Html | None:
    """Each reason and its count: nothing is left out in silence."""
    found = [f"{count(number(n))} {reason}" for reason, n in dropped.items() if number(n)]
    return h("p", f"Left out: {', '.join(found)}.", class_="note") if found else None


# ------------------------------------------------------------------------------------ the run


def _subtitle(run: Run) -> str:
    model = part(run.config.get("model"))
    shape = [f"{model[k]} {word}" for k, word in (("n_layers", "layers"),) if number(model.get(k))]
    if number(model.get("d_model")):
        shape.append(f"width {model['d_model']}")
    return " · ".join(
        [run.status, *shape, *([f"seed {run.config['seed']}"] if "seed" in run.config else [])]
    )


def _facts(run: Run) -> list[tuple[str, str | None, str]]:
    last = {
        k: v[-1] for k in ("eval/loss", "eval/bpb", "train/loss") if (v := run.curve(k, "step")[1])
    }
    loss = run.number("loss") or last.get("eval/loss")
    speed = sorted(run.curve("perf/tokens_per_s", "step")[1])
    steps = run.curve("train/loss", "step")[0]
    planned = number(part(run.config.get("train")).get("steps"))
    done = run.number("steps") or (steps[-1] if steps else None)
    per_step = run_plots.tokens_per_step(run)
    tokens = run.number("tokens") or (done * per_step if done and per_step else None)
    return [
        ("Held-out loss", fixed(loss), "nats per token"),
        (
            "Bits per byte",
            fixed(run.number("eval_bpb") or last.get("eval/bpb")),
            "on held-out text",
        ),
        (
            "Training loss",
            fixed(run.number("train_loss") or last.get("train/loss")),
            "nats per token, last",
        ),
        (
            "Parameters",
            count(run.number("params")),
            f"{count(run.number('params_effective'))} effective",
        ),
        ("Tokens D", count(tokens), f"{count(done)} of {count(planned)} steps" if planned else ""),
        ("Compute C", power(run.number("flops")), "training FLOPs"),
        ("Speed", count(speed[len(speed) // 2]) if speed else None, "tokens/s, median"),
        ("Time", seconds(run.number("wall_time_s")), ""),
    ]


def _missing(run: Run) -> list[str]:
    lines = list(run.notices)
    if not run.record:
        lines.append("record.json is not written yet: the run has not ended, or was stopped.")
    elif run.status != "finished":
        lines.append(f"The run ended as “{run.status}” at step {count(run.number('steps'))}.")
    if len(run.curve("train/loss", "step")[0]) < 2:
        lines.append("No loss curve yet: metrics.jsonl holds fewer than two logged steps.")
    if not run.curve("eval/loss", "step")[0] and run.number("loss") is None:
        lines.append("Not evaluated yet.")
    return lines


def _probe_section(run: Run) -> Html | None:
    found = run_plots.probes(run)
    if not found:
        return None
    rows = []
    for prompt, distributions in found.items():
        step, last = distributions[-1]
        top = sorted(last.items(), key=lambda pair: -pair[1])[:5]
        shown = join(
            [h("span", f"{formats.token(t)} {percent(p)}", class_="tag") for t, p in top], " "
        )
        rows.append([h("code", formats.short(prompt, 60)), shown, count(step)])
    return section(
        "Probe prompts",
        h("p", "The likeliest next tokens after each prompt, at the last step they were logged."),
        table(["Prompt", "Next token", "Step#"], rows),
        id="probes",
    )


def _sample_section(run: Run) -> Html | None:
    found = run_plots.samples(run)
    if not found:
        return None
    shown: list[Child] = []
    for prompt, rows in found.items():
        *earlier, (step, text) = rows
        shown.append(sample(prompt, text, f"at step {count(step)}"))
        if earlier:
            stride = max(1, len(earlier) // 6)
            before = [sample(prompt, t, f"at step {count(s)}") for s, t in earlier[::stride]]
            shown.append(h("details", h("summary", "Earlier in training"), *before))
    return section("Samples", *shown, id="samples")


def _json(value: Json) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)
