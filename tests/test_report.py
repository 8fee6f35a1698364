"""The pages: what they say, in numbers; that text stays text; and that partial folders work."""

from __future__ import annotations

import csv
import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig
from jaxlm.report import formats
from jaxlm.report.artifacts import read_sweep
from jaxlm.report.plots import plot_fit
from jaxlm.report.run_report import write_run_report
from jaxlm.report.sweep_report import sweep_page, write_sweep_report
from jaxlm.report.sweep_text import noise_floor
from jaxlm.scaling import laws, runs
from jaxlm.schema import UserError, to_dict

# ------------------------------------------------- a sweep's folder, as one would find it on disk

E, A, B, ALPHA, BETA = 0.6, 18.0, 50.6, 0.30, 0.30
BUDGETS = {3e11: (18e3, 29e3, 49e3, 92e3), 5.2e11: (29e3, 49e3, 92e3, 147e3),
           9e11: (29e3, 49e3, 92e3, 213e3)}  # fmt: skip
HELD_OUT = (3.6e12, 147e3)


def planted(params: float, flops: float) -> float:
    return E + A / params**ALPHA + B / (flops / 6 / params) ** BETA


def write_json(path: Path, kind: str, **values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": f"jaxlm.{kind}/1", **values}))


def write_run(folder: Path, name: str, role: str, budget: float, params: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    tokens = budget / 6 / params
    steps = max(40, round(tokens / 512))
    loss = planted(params, budget) + rng.normal(0, 0.01)
    config = {
        "name": name, "seed": seed,
        "model": {"d_model": 48, "n_layers": 2, "seq_len": 128, "vocab_size": 256},
        "optimizer": {"name": "adamw", "learning_rate": 3e-3},
        "train": {"steps": steps, "global_batch_size": 4, "probes": ["The sky is"]},
    }  # fmt: skip
    write_json(folder / "config.json", "config", config=config, fingerprint=f"{seed:016x}")
    rows = []
    for step in range(50, steps + 1, 50):
        share = step / steps
        now = loss + 3.4 * np.exp(-8 * share**0.4) + 0.15 * min(1, (1 - share) / 0.3)
        rows.append({
            "step": step, "tokens": step * 512, "flops": budget * share,
            "train/loss": now + rng.normal(0, 0.01),
            "train/grad_norm": 1 / (0.3 + share) + rng.exponential(0.1),
            "learning_rate": 3e-3 * min(1, share / 0.05, (1 - share) / 0.3 + 1e-3),
            "perf/tokens_per_s": 41_000 + rng.normal(0, 500),
        })  # fmt: skip
    for k in range(1, 6):
        step, at = steps * k // 5, loss + (1.5 - 0.3 * k)
        rows.append({"step": step, "eval/loss": at, "eval/bpb": at / np.log(2),
                     "eval/perplexity": float(np.exp(at))})  # fmt: skip
        top = [["b", 0.12 * k], [" ", 0.3 / k], ["\n", 0.05], ["\x00", 0.01]]
        rows.append({"step": step, "probe/prompt": "The sky is", "probe/top": top})
        rows.append({"step": step, "sample/prompt": "def main(",
                     "sample/text": f"argv):\n    return {k}"})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {
        "name": name, "fingerprint": f"{seed:016x}", "role": role, "status": "finished",
        "budget": budget, "seed": seed, "d_model": 48, "n_layers": 2, "n_heads": 3,
        "seq_len": 128, "vocab_size": 256, "params": params * 0.8,
        "params_non_embedding": params * 0.7, "params_effective": params,
        "flops_per_token": 6 * params, "tokens": tokens, "flops": budget, "steps": steps,
        "global_batch_size": 4, "learning_rate": 3e-3, "loss": loss,
        "eval_bpb": loss / np.log(2), "train_loss": loss - 0.02, "wall_time_s": budget / 2e10,
    }  # fmt: skip
    write_json(folder / "record.json", "record", **record)
    return record


def fit_of(folder: Path) -> dict:
    """As `sweep` makes it, with fewer resamples."""
    table = runs.from_folder(folder / "runs")
    curves = []
    for name, params in zip(table.name, table.params, strict=True):
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "flops" in row]
        flops, losses = ([row[k] for row in rows] for k in ("flops", "train/loss"))
        curves.append((params, flops, losses, name))
    return laws.fit(table, curves, bootstrap=100, for_compute=HELD_OUT[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"))


def write_sweep(folder: Path) -> Path:
    members, records = [], []
    for i, (budget, sizes) in enumerate(BUDGETS.items()):
        cells = [("fit", n, 0) for n in sizes]
        if i == 0:
            cells += [("replicate", sizes[1], 1), ("replicate", sizes[1], 2)]
        for role, params, seed in cells:
            name = f"c{budget:.1e}-n{params:.0f}-s{seed}"
            workdir = folder / "runs" / name
            records.append(write_run(workdir, name, role, budget, params, len(records)))
            members.append({"name": name, "role": role, "budget": budget, "workdir": str(workdir)})
    budget, params = HELD_OUT
    held_out = write_run(folder / "runs" / "held-out", "held-out", "holdout", budget, params, 99)
    members.append({"name": "held-out", "role": "holdout", "budget": budget, "workdir": ""})
    base = to_dict(Config(
        model=ModelConfig(parametrization="completep"), data=DataConfig(eval_fraction=0.05),
        optimizer=OptimizerConfig(name="muon", schedule="wsd", decay_fraction=0.2),
    ))  # fmt: skip
    sweep = {"name": "planted", "estimator": "approach2", "holdout_flops": budget, "base": base,
             "halve": [0.25]}  # fmt: skip
    write_json(folder / "sweep.json", "sweep", sweep=sweep, members=members)
    fit = fit_of(folder)
    write_json(folder / "fit.json", "fit", **{k: v for k, v in fit.items() if k != "format"})
    bet = laws.predict(fit, "approach2", budget)
    write_json(
        folder / "prediction.json", "prediction", **bet, made_at="2026-08-01T10:00:00+0000",
        sha256="ab" * 32,
    )  # fmt: skip
    write_json(
        folder / "score.json", "score", measured=held_out["loss"], predicted=bet["loss"],
        error_relative=held_out["loss"] / bet["loss"] - 1, prediction_sha256="ab" * 32,
        inside_interval=bet["ci95"][0] <= held_out["loss"] <= bet["ci95"][1], verdict="predicted",
    )  # fmt: skip
    samples = [{"prompt": "def main(", "text": "argv):\n    return 0\n"}]
    write_json(folder / "samples.json", "samples", run="held-out", samples=samples)
    origin = {
        "source": "stdlib", "location": "/usr/lib/python3", "language": "python",
        "text_licence": "PSF-2.0", "package_licence": "PSF-2.0", "attribution": "PSF",
        "documents": 900, "bytes": 12_000_000,
    }  # fmt: skip
    split = {"documents": 855, "bytes": 11_400_000, "tokens": 11_400_855}
    write_json(
        folder / "data" / "manifest.json", "data", train=split, origins=[origin],
        eval={"documents": 45, "bytes": 600_000, "tokens": 600_045}, dropped={"duplicate": 3},
        tokenizer={"name": "bytes", "kind": "bytes", "vocab_size": 256},
    )  # fmt: skip
    return folder


# --------------------------------------------------------------------------------- reading a page


class Page(HTMLParser):
    """Elements with their attributes, tables as lists of cells, and the text."""

    def __init__(self, source: str | Path):
        super().__init__()
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        self.source = text
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.skip = self.in_cell = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        self.skip = tag in ("style", "title")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.skip = False
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += "" if self.skip else data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, first_head: str) -> list[dict[str, str]]:
        rows = next(t for t in self.tables if t[0][0] == first_head)
        return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]

    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.elements if "id" in a]


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page(write_sweep_report(finished))


def words(folder: Path) -> Page:
    """The page without its plots, which take most of the time."""
    return Page(sweep_page(read_sweep(folder), {}))


def read_json(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def changed(folder: Path, name: str, **values: object) -> None:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "sweep")


# ---------------------------------------------------------------------------------- what it says


def test_headline_gives_the_bet_and_its_outcome(page: Page, finished: Path) -> None:
    bet, score = read_json(finished, "prediction"), read_json(finished, "score")
    card = page.source[page.source.index('id="verdict"') :][:1500]
    for shown in (
        "✓ The held-out run was predicted",
        f"{bet['loss']:.3f}",
        f"{bet['ci95'][0]:.3f} … {bet['ci95'][1]:.3f}",
        f"{score['measured']:.3f}",
        f"{100 * score['error_relative']:.2f} %".replace("-", "−"),
        "3.6×10¹²",
        "approach 2",
        "inside its 95 % interval",
    ):
        assert shown in card, shown


def test_a_missed_bet_is_called_missed(copied: Path) -> None:
    bet = read_json(copied, "prediction")
    changed(copied, "score", measured=1.1 * bet["loss"], inside_interval=False, verdict="missed")
    text = words(copied).text
    assert "✗ The held-out run was missed" in text
    assert "10.00 % above the prediction, outside its 95 % interval" in text


def test_a_prediction_that_came_too_late_or_was_changed_is_denounced(copied: Path) -> None:
    event = {"event": "start", "time": 1785578400.0 - 3600}  # an hour before made_at
    (copied / "runs" / "held-out" / "events.jsonl").write_text(json.dumps(event) + "\n")
    changed(copied, "prediction", sha256="cd" * 32)
    text = words(copied).text
    assert "after the held-out run began" in text
    assert "changed after it was scored" in text


def test_table_of_runs_agrees_with_their_records(page: Page, finished: Path) -> None:
    rows = page.table("Run")
    members = read_json(finished, "sweep")["members"]
    assert [row["Run"] for row in rows] == [m["name"] for m in members]
    for row in rows:
        record = read_json(finished / "runs" / row["Run"], "record")
        assert float(row["Loss"]) == pytest.approx(record["loss"], abs=5e-5)
        assert float(row["Bits/byte"]) == pytest.approx(record["eval_bpb"], abs=5e-5)
        assert float(row["Learning rate"]) == record["learning_rate"]
        assert amount(row["N effective"]) == pytest.approx(record["params_effective"], rel=5e-3)
        assert amount(row["D"]) == pytest.approx(record["tokens"], rel=5e-3)
        ratio = record["tokens"] / record["params_effective"]
        assert float(row["D/N"]) == pytest.approx(ratio, rel=5e-3)
        assert (row["Role"], row["Status"]) == (record["role"], "finished")


def amount(text: str) -> float:
    """'18.3k' → 18300."""
    units = {"k": 1e3, "M": 1e6, "B": 1e9}
    return float(text.rstrip("kMB")) * units.get(text[-1], 1.0)


def test_csv_on_the_page_and_beside_it_holds_every_record(page: Page, finished: Path) -> None:
    text = (finished / "runs.csv").read_text()
    assert text in page.text
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == len(read_json(finished, "sweep")["members"])
    for row in rows:
        record = read_json(finished / "runs" / row["name"], "record")
        for key in set(record) - {"format"}:
            want = record[key]
            assert (float(row[key]) == want) if isinstance(want, float) else row[key] == str(want)


def test_fits_stand_beside_each_other_with_their_intervals(page: Page, finished: Path) -> None:
    fit, rows = read_json(finished, "fit"), page.table("Approach")
    assert len(rows) == 3
    for row, name in zip(rows, ("approach1", "approach2", "approach3"), strict=True):
        shown = float(row["a (N* ∝ Cᵃ)"].replace("−", "-"))
        assert shown == pytest.approx(fit[name]["a"], abs=6e-4)
    minima = page.table("Budget C")
    assert [float(r["Loss"]) for r in minima] == [
        pytest.approx(m["loss"], abs=6e-5) for m in fit["approach2"]["minima"]
    ]
    law = {r["Parameter"]: float(r["Estimate"]) for r in page.table("Parameter")}
    assert law["alpha"] == pytest.approx(fit["approach3"]["alpha"], rel=1e-4)
    for warning in fit["warnings"]:
        assert warning.split(": ")[-1][1:] in page.text


def test_noise_floor_is_the_scatter_of_replicates(finished: Path) -> None:
    cell = (3e11, 29e3)
    records = [read_json(p.parent, "record") for p in finished.glob("runs/*/record.json")]
    losses = [r["loss"] for r in records if (r["budget"], r["params_effective"]) == cell]
    assert len(losses) == 3
    assert noise_floor(read_sweep(finished)) == pytest.approx(np.std(losses, ddof=1))


def test_licences_samples_methods_and_references_are_there(page: Page) -> None:
    origin = page.table("Source")[0]
    assert (origin["Licence of the text"], origin["Documents"]) == ("PSF-2.0", "900")
    for shown in ("argv):\n    return 0", "3 duplicate", "11.4M tokens", "unembedding",
                  "2001.08361", "2203.15556", "2404.10102", "5 % of the documents"):  # fmt: skip
        assert shown in page.text, shown


# -------------------------------------------------------------------------------- the file itself


def test_page_is_one_file_that_asks_for_nothing(page: Page, finished: Path) -> None:
    assert len(page.source.encode()) < 3_000_000
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "base"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert "://" not in value or tag == "meta", (tag, name, value)
            assert name not in ("src", "srcset") and "url(http" not in value
    policy = [a["content"] for t, a in page.elements if a.get("http-equiv")]
    assert policy and "default-src 'none'" in policy[0] and "script-src" not in policy[0]
    assert "@import" not in page.source and "url(" not in page.source.split("</style>")[0]


def test_the_methods_are_those_of_this_sweep(page: Page) -> None:
    for said in ("muon, peak learning rate 0.003, CompleteP parametrisation from width",
                 "schedule wsd with 5 % of the steps for warm-up, falling over the last 20 %",
                 "the worse half by training loss ended at 25 %",
                 "yang2022tensor", "dey2025completep", "jordan2024muon", "hu2024minicpm",
                 "jamieson2016non"):  # fmt: skip
        assert said in page.text, said
    for other in ("loshchilov2017decoupled", "hagele2024scaling"):
        assert other not in page.text


def test_every_point_names_its_run_and_leads_to_its_row(page: Page, finished: Path) -> None:
    ids = page.ids()
    assert len(ids) == len(set(ids))
    links = [a["href"] for t, a in page.elements if t in ("a", "use") and "href" in a]
    assert links and {link[1:] for link in links} <= set(ids)
    titles = re.findall(r"<title>([^<]*)</title>", page.source)
    for member in read_json(finished, "sweep")["members"]:
        assert sum(t.startswith(member["name"] + ":") for t in titles) >= 3, member["name"]


def test_plots_follow_dark_mode(page: Page) -> None:
    svg = "".join(re.findall(r"<svg.*?</svg>", page.source, re.S))
    assert page.source.count("<svg") == 6
    assert not re.findall(r"#[0-9a-f]{6}\b", svg), "a colour that dark mode cannot change"
    assert "prefers-color-scheme:dark" in page.source


def test_png_files_are_plots(page: Page, finished: Path) -> None:
    names = {p.stem for p in finished.glob("*.png")}
    assert names == {"loss_curves", "isoflop", "optimal_params", "optimal_tokens",
                     "optimal_loss", "residuals"}  # fmt: skip
    for path in finished.glob("*.png"):
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 800 and height > 500
        assert len(data) > 15_000, path.name


def test_writing_again_gives_the_same_bytes(page: Page, finished: Path) -> None:
    again = write_sweep_report(finished).read_text(encoding="utf-8")
    assert again == page.source


# ------------------------------------------------------------------------------ text stays text

HOSTILE = (
    "</script><script>document.title='pwned'</script>",
    "<img src=x onerror=document.title='pwned'>",
    "\"><svg onload=document.title='pwned'>",
    "' autofocus onfocus='document.title=1",
    "</pre></title></style><h4 id=pwned>",
    "]]><!--<![CDATA[ --> &lt;b&gt; &amp; $x^2$ {{7*7}}",
    "javascript:document.title='pwned'",
    "\x00\x1b[31m\u202e\ud800 \x7f 日本語 🙂",
)


@pytest.fixture(scope="module")
def hostile(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep, and in it a run, with pages full of markup that nobody should run."""
    copied = shutil.copytree(finished, tmp_path_factory.mktemp("hostile") / "sweep")
    every = " ".join(HOSTILE)
    changed(copied, "samples", run=every, samples=[{"prompt": t, "text": t} for t in HOSTILE])
    sweep = read_json(copied, "sweep")
    sweep["sweep"]["name"] = every
    sweep["members"][0]["name"] = every
    sweep["members"][0]["workdir"] = "runs/" + sweep["members"][1]["name"]
    changed(copied, "sweep", **sweep)
    origin = read_json(copied / "data", "manifest")["origins"][0]
    origin |= {"source": every, "text_licence": every, "attribution": every}
    changed(copied / "data", "manifest", origins=[origin], dropped={every: 1})
    fit = read_json(copied, "fit")
    changed(copied, "fit", warnings=list(HOSTILE), approach1={"refused": every}, convention=every)
    for parabola in fit["approach2"]["parabolas"]:
        parabola["names"] = [every] * len(parabola["names"])
    changed(copied, "prediction", made_at=every, sha256=every, method=every, estimator=every)
    changed(copied, "score", verdict=every)
    run = copied / "runs" / "held-out"
    changed(run, "record", status=every)
    config = read_json(run, "config")["config"]
    changed(run, "config", config={**config, "name": every, "model": {**config["model"]}})
    rows = [{"step": i, "probe/prompt": t, "probe/top": [[u, 0.1] for u in HOSTILE]}
            for i in (1, 2) for t in HOSTILE]  # fmt: skip
    rows += [{"step": 1, "sample/prompt": t, "sample/text": t} for t in HOSTILE]
    with open(run / "metrics.jsonl", "a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    write_sweep_report(copied)
    write_run_report(run)
    return copied


def test_what_models_and_people_write_stays_text(hostile: Path) -> None:
    for folder in (hostile, hostile / "runs" / "held-out"):
        page = Page(folder / "report.html")
        tags = {tag for tag, _ in page.elements}
        assert not tags & {"script", "img", "iframe", "h4"}
        assert "pwned" not in page.ids()
        for _, attributes in page.elements:
            assert not [name for name in attributes if name.startswith("on")]
            assert "javascript:" not in attributes.get("href", "")
        shown = page.text
        for text in HOSTILE[:-1]:
            assert text in shown
        assert "\\x00\\x1b[31m\u202e? \\x7f 日本語 🙂" in shown
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", page.source)


# ------------------------------------------------------------------------- what is not there yet


def test_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    page = Page(write_sweep_report(tmp_path))
    for said in (
        "sweep.json is missing",
        "No runs yet",
        "No fit yet",
        "No held-out run",
        "No member has finished yet",
        "No samples yet",
        "No data manifest yet",
    ):
        assert said in page.text, said
    assert not list(tmp_path.glob("*.png"))


def test_running_sweep_shows_what_there_is(copied: Path) -> None:
    for name in ("fit", "prediction", "score", "samples"):
        (copied / f"{name}.json").unlink()
    names = [m["name"] for m in read_json(copied, "sweep")["members"]]
    shutil.rmtree(copied / "runs" / names[-1])
    running = copied / "runs" / names[-2]
    (running / "record.json").unlink()
    with open(running / "metrics.jsonl", "a") as f:
        f.write('{"step": 99, "train/lo')  # being written
    page = Page(write_sweep_report(copied))
    assert "13 of 15 members finished" in page.text
    assert "The sweep is not finished: 1 running, 1 waiting of 15 members." in page.text
    assert "No fit yet" in page.text and "No prediction yet" in page.text
    assert "Approach 2 will predict its loss" in page.text.replace("approach", "Approach")
    assert [r["Status"] for r in page.table("Run")][-2:] == ["running", "waiting"]
    assert "figure-loss_curves" in page.ids() and page.source.count("<svg") == 2


def test_refused_fits_are_said_with_their_reason(copied: Path) -> None:
    reasons = {f"approach{i}": {"refused": f"reason {i}"} for i in (1, 2, 3)}
    changed(copied, "fit", **reasons, warnings=[])
    (copied / "prediction.json").unlink()
    (copied / "score.json").unlink()
    page = words(copied)
    for i, row in enumerate(page.table("Approach"), 1):
        assert row["Remark"] == f"refused: reason {i}"
        assert f"Approach {i} refused: reason {i}" in page.text


def test_refused_minimum_is_crossed_out_in_plot_table_and_warnings(copied: Path) -> None:
    fit = read_json(copied, "fit")
    second = fit["approach2"]
    budget = second["minima"].pop()["flops"]
    second["refused"] = [{"flops": budget, "reason": "the parabola opens downwards"}]
    changed(copied, "fit", **fit)
    page = Page(write_sweep_report(copied))
    assert page.table("Budget C")[-1]["Remark"] == "refused: the parabola opens downwards"
    assert page.source.count("the parabola opens downwards") >= 4  # list, table, tip twice
    assert "Approach 2, C = 9×10¹¹: refused" in page.text


def test_thin_or_foreign_fit_shows_the_numbers_it_has(copied: Path) -> None:
    (copied / "fit.json").write_text(json.dumps({
        "n": 3, "approach1": None, "approach2": {"a": 0.5, "minima": [{"flops": 3e11}, 7]},
        "approach3": {"a": float("nan"), "E": "x"}, "warnings": None, "points": [1],
    }))  # fmt: skip
    page = Page(write_sweep_report(copied))
    assert [row["a (N* ∝ Cᵃ)"] for row in page.table("Approach")] == ["–", "0.500", "–"]
    assert page.source.count("<svg") == 2 and page.source.count("<figure") == 6
    assert page.text.count("No approach has given a result yet") >= 1


@pytest.mark.parametrize("name", ["sweep", "fit", "prediction", "score", "samples"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"members": 3, "samples": {}}'])
def test_damaged_file_is_named_and_the_rest_shown(copied: Path, name: str, content: str) -> None:
    (copied / f"{name}.json").write_text(content)
    shutil.rmtree(copied / "runs")
    text = words(copied).text
    assert f"{name}.json" in text or content.startswith('{"')


def test_damaged_metrics_and_diverged_runs_are_said(copied: Path) -> None:
    first, second = (m["name"] for m in read_json(copied, "sweep")["members"][:2])
    (copied / "runs" / first / "metrics.jsonl").write_text("\x00\x00\n{}\n")
    changed(copied / "runs" / second, "record", status="diverged", loss=None, eval_bpb=None)
    page = words(copied)
    assert "metrics.jsonl:1: damaged" in page.text
    assert f"1 diverged: {second}" in page.text
    row = page.table("Run")[1]
    assert (row["Status"], row["Loss"]) == ("diverged", "–")


def test_no_such_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_sweep_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected a run's folder"):
        write_run_report(tmp_path)


# --------------------------------------------------------------------------------- a single run


def test_run_page_shows_loss_evals_probes_samples_and_sources(finished: Path) -> None:
    folder = finished / "runs" / "held-out"
    record, page = read_json(folder, "record"), Page(write_run_report(folder))
    assert page.source.count("<svg") == 4
    for shown in (
        f"{record['loss']:.3f}",
        f"{record['eval_bpb']:.3f}",
        "def main(argv):",
        "Next token after “The sky is”",
        "PSF-2.0",
        '"global_batch_size": 4',
    ):
        assert shown in page.text, shown
    probe = page.table("Prompt")[0]
    assert (probe["Prompt"], probe["Next token"].split(" %")[0]) == ("The sky is", "b 60.0")
    names = {p.stem for p in folder.glob("*.png")}
    assert names == {"loss", "bits_per_byte", "schedule", "probe_0"}


def test_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", "config", config={"name": "new", "seed": 3})
    text = Page(write_run_report(tmp_path)).text
    for said in ("record.json is not written yet", "No loss curve yet", "Not evaluated yet"):
        assert said in text


# ------------------------------------------------------------------------------------ a bare fit


def test_fit_of_a_csv_is_plotted_without_runs(tmp_path: Path) -> None:
    rows = [(n, c, planted(n, c)) for c in (1e18, 1e19, 1e20, 1e21)
            for n in np.geomspace(0.3, 3, 5) * (c / 6 / 20) ** 0.5]  # fmt: skip
    lines = ["params,flops,loss", *(f"{n},{c},{loss}" for n, c, loss in rows)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    found = laws.fit(runs.from_csv(tmp_path / "table.csv"), bootstrap=50, for_compute=1e24)
    paths = plot_fit(found, tmp_path / "plots")
    assert {p.stem for p in paths} == {"isoflop", "optimal_params", "optimal_tokens",
                                       "optimal_loss", "residuals"}  # fmt: skip
    assert all(p.stat().st_size > 15_000 for p in paths)


# --------------------------------------------------------------------------------- in a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-background-networking", f"--user-data-dir={profile}", *flags, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_browser_shows_the_page_and_runs_nothing(hostile: Path, tmp_path: Path) -> None:
    path = hostile / "report.html"
    dom = browse(path, tmp_path / "profile", "--dump-dom").stdout
    assert "<title>pwned" not in dom and 'id="pwned"' not in dom and "</main>" in dom
    shot = tmp_path / "shot.png"
    dark = "--blink-settings=preferredColorScheme=0"
    browse(path, tmp_path / "profile", dark, f"--screenshot={shot}", "--window-size=1200,1400")
    pixels = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(np.uint8)
    assert pixels.shape == (1400, 1200, 3)
    assert tuple(pixels[3, 3]) == (1, 4, 9), "the page is not dark"
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


# --------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    "shown, expected",
    [
        (formats.count(18_300), "18.3k"),
        (formats.count(999_700), "1M"),
        (formats.count(64), "64"),
        (formats.power(3e11), "3×10¹¹"),
        (formats.power(5.2e-12), "5.2×10⁻¹²"),
        (formats.power(1e18), "10¹⁸"),
        (formats.general(81_300, 3), "8.13×10⁴"),
        (formats.general(-0.5712, 3), "−0.571"),
        (formats.percent(-0.0064, 2), "−0.64 %"),
        (formats.seconds(5.6 * 60), "5.6 min"),
        (formats.size(12e9), "12GB"),
        (formats.count(None), None),
    ],
)
def test_numbers_are_written_for_people(shown: str | None, expected: str | None) -> None:
    assert shown == expected


def test_a_run_s_page_shows_tasks_and_what_is_forgotten_of_a_source(tmp_path: Path) -> None:
    write_run(tmp_path, "tuned", "single", 3e11, 49e3, 0)
    old, new = [2.0, 2.3, 2.6], [4.0, 2.5, 2.2]
    rows = [
        {"step": 100 * i, "eval/loss/old": a, "eval/loss/new": b,
         "task/imdb/accuracy": 0.5 + i / 8, "task/en-ja/chrf": 10.0 * i}
        for i, (a, b) in enumerate(zip(old, new, strict=True))
    ]  # fmt: skip
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    page = write_run_report(tmp_path).read_text()
    for name, tips in (
        ("sources", ("old: 2.000 → 2.600", "new: 4.000 → 2.200")),
        ("tasks", ("imdb: accuracy 0.750", "en-ja: chrf 20.000")),
    ):
        assert f'id="figure-{name}"' in page and (tmp_path / f"{name}.png").exists()
        assert all(tip in page for tip in tips)
