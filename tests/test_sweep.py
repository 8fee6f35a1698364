"""A sweep from lint to score: killed anywhere, redone nowhere, its bet made first."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from faults import QUICK, command, words

from jaxlm import api, main, pyfile
from jaxlm import experiment as experiments
from jaxlm.files import read_json, read_jsonl
from jaxlm.model.scale import size
from jaxlm.scaling import ladder
from jaxlm.scaling import sweep as stages
from jaxlm.scaling.workers import worker_environment
from jaxlm.train import record

EXPERIMENT = """
import jax.numpy as jnp
from jaxlm.config import *

def flat(done, hyper):  # its own schedule, for the workers to find
    return jnp.ones_like(done)

def get_sweep():
    base = Config(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, seq_len=16, scan_layers=False),
        data=DataConfig(sources=({text!r},), eval_sequences=8, eval_fraction=0.2, max_epochs=20),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="sweep.py:flat"),
        train=TrainConfig(global_batch_size=8, steps_per_dispatch=5, log_every=5,
                          checkpoint_every=20),
    )
    shapes = (Shape(8, 1), Shape(16, 1), Shape(24, 1))
    return Sweep({fields})
"""
WHOLE = """
        base=base, rungs=tuple(Rung(c, shapes) for c in (1e8, 2e8, 4e8)), holdout_flops=1.6e9,
        holdout_shapes=(Shape(16, 1), Shape(24, 1)), estimator="approach3", bootstrap=20,
        vary=(("optimizer.learning_rate", (1e-2, 1e6)),), population="on", workers=2,
        sample_prompts=("the ",),
"""
LONG = """
        base=base, rungs=(Rung(1.5e9, shapes[:2]), Rung(1e8, shapes[:1])), workers=2, bootstrap=2,
"""
SHORT = """
        base=base, rungs=(Rung(1e8, shapes[:2]),), workers=1, bootstrap=2, keep_checkpoints="none",
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, QUICK[name])
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def experiment(folder, fields):
    """sweep.py in `folder`, whose own parts are named relative to it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = words(folder / "text")
    (folder / "sweep.py").write_text(EXPERIMENT.format(text=str(text), fields=fields))
    return folder / "sweep.py"


def exits(*arguments):
    with pytest.raises(SystemExit) as e:
        main.main(list(map(str, arguments)))
    return e.value.code


def stamps(folder):
    """When each file was last written; locks are taken anew."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p: p.stat().st_mtime_ns for p in files}


# ---------------------------------------------------------------------------------- lint to score


def test_a_sweep_from_one_command_to_its_page(tmp_path, monkeypatch, capsys):
    path, folder = experiment(tmp_path / "mine", WHOLE), tmp_path / "sweep"
    monkeypatch.chdir(tmp_path)
    arguments = ("sweep", f"--config={path}", f"--workdir={folder}", "--json")
    assert exits(*arguments) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    sweep = experiments.load(path)
    planned = ladder.members(sweep)

    # Half of the members diverge, together with one that does not; those are fitted.
    rows = {m.name: record.read(folder / "runs" / m.name) for m in planned}
    good = [n for n in rows if n.endswith("=0.01")]
    assert {n for n, r in rows.items() if r.status == "finished"} == set(good) and len(good) == 9
    assert {r.status for r in rows.values()} == {"finished", "diverged"}
    fit = read_json(folder / "fit.json", "fit")
    assert fit["n"] == 9
    assert {d["name"] for d in fit["dropped"]} == set(rows) - set(good)

    # A member of a population is its lone run.
    alone = next(m for m in planned if m.name == "c2.0e8-d8-l1-s0-learning_rate=0.01")
    data = dataclasses.replace(sweep.base.data, dir=str(folder / "data"))
    lone = api.train(dataclasses.replace(alone.config, data=data), tmp_path / "alone")
    assert lone.fingerprint == rows[alone.name].fingerprint
    assert rows[alone.name].loss == pytest.approx(lone.loss, rel=1e-4)
    ours, theirs = (
        [r["train/loss"] for r in read_jsonl(f / "metrics.jsonl") if "train/loss" in r]
        for f in (folder / "runs" / alone.name, tmp_path / "alone")
    )
    assert ours == pytest.approx(theirs, rel=1e-3) and len(ours) == alone.config.train.steps / 5

    # The bet stood before the run that decides it began.
    prediction, score = (read_json(folder / f"{n}.json", n) for n in ("prediction", "score"))
    held_out = folder / "runs" / prediction["run"]
    began = read_jsonl(held_out / "events.jsonl")[0]["time"]
    assert (folder / "prediction.json").stat().st_mtime < began
    measured = record.read(held_out)
    assert measured.role == "holdout" and prediction["run"] not in rows
    assert score["measured"] == measured.loss and score["predicted"] == prediction["loss"]
    assert score["prediction_sha256"] == prediction["sha256"]
    assert summary["score"] == score and summary["report"] == str(folder / "report.html")
    assert prediction["run_params"] == measured.params_effective
    nearest = min(sweep.holdout_shapes, key=lambda s: abs(math.log(
        size(ladder.sized(sweep.base.model, s)).params_effective / prediction["params"]
    )))  # fmt: skip
    assert nearest.d_model == measured.d_model

    # What people look at.
    page = (folder / "report.html").read_text()
    assert prediction["run"] in page and all(name in page for name in rows)
    assert len(list(folder.glob("*.png"))) >= 5
    best = min([*good, prediction["run"]], key=lambda n: record.read(folder / "runs" / n).loss)
    assert read_json(folder / "samples.json", "samples")["run"] == best
    assert [p.parent.name for p in folder.glob("runs/*/checkpoints")] == [best]
    [text] = api.generate(folder, ["the "], max_new_tokens=4, temperature=0)
    assert [text] == api.generate(folder / "runs" / best, ["the "], max_new_tokens=4, temperature=0)

    # The same again does nothing, and what changes later does not change the bet.
    before = stamps(folder)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert exits(*arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
    assert stamps(folder) == before
    changed = {**fit, "inputs": "others", "approach3": {**fit["approach3"], "E": 9.0}}
    assert stages.predict(sweep, folder, changed, print) == prediction
    assert exits(*arguments, "--config.base.train.global_batch_size=16") == 2
    assert "holds another sweep (differs in base)" in capsys.readouterr().err
    path.write_text(path.read_text() + "# changed\n")
    monkeypatch.setattr(pyfile, "_used", {})  # as in a new process
    assert exits(*arguments) == 2
    assert "differs in the code that it refers to" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_at_a_url_is_there_for_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sweep = experiments.load(experiment(tmp_path / "mine", SHORT))
    url = "memory://test_sweep/short"
    page = api.sweep(sweep, url, say=lambda line: None)
    text, runs = page.read_bytes(), sorted(p.name for p in page.parent.glob("runs/*"))
    assert runs == sorted(m.name for m in ladder.members(sweep))
    assert not list(page.parent.glob("runs/*/checkpoints"))  # "none" are kept
    shutil.rmtree(page.parent)  # another machine
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is left to do
    said = []
    assert api.sweep(sweep, url, say=said.append) == page and page.read_bytes() == text
    assert [record.read(page.parent / "runs" / n).status for n in runs] == ["finished"] * 2


# --------------------------------------------------------------------------------- interruptions


def children(pid):
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parts = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(parts[1]) == pid and parts[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(true, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def gone(pids):
    return not [p for p in pids if Path(f"/proc/{p}").exists()]


def training(folder):
    """The runs that are amid their steps, with their newest logged step."""
    found = {}
    for run in folder.glob("runs/*"):
        rows = (run / "metrics.jsonl").exists() and read_jsonl(run / "metrics.jsonl")
        if rows and not (run / "record.json").exists():
            found[run.name] = rows[-1]["step"]
    return found


def sittings(folder):
    """Sittings begun, over all runs."""
    events = [e for path in folder.glob("runs/*/events.jsonl") for e in read_jsonl(path)]
    return sum(e["event"] in ("start", "resume") for e in events)


def test_workers_and_parents_that_are_killed_or_stopped_lose_nothing(tmp_path, capsys):
    path, folder = experiment(tmp_path / "mine", LONG), tmp_path / "sweep"
    arguments = ("sweep", f"--config={path}", f"--workdir={folder}")
    sweep = experiments.load(path)

    # A worker is killed: another takes its place and its member. Then the parent is told to stop.
    parent = command(*arguments, cwd=tmp_path)
    wait_until(lambda: len(training(folder)) == 2 and min(training(folder).values()) > 40)
    first = children(parent.pid)
    assert len(first) == 2
    os.kill(first[0], signal.SIGKILL)
    wait_until(lambda: sittings(folder) == 3)
    second = children(parent.pid)
    assert len(second) == 2 and first[1] in second and first[0] not in second
    parent.send_signal(signal.SIGTERM)
    told = time.monotonic()
    _, err = parent.communicate()
    assert time.monotonic() - told < 10 and parent.returncode == 143
    assert err == "jaxlm: stopped, saved; the same command goes on from there\n"
    assert gone(second)
    stopped = [read_jsonl(p)[-1] for p in folder.glob("runs/*/events.jsonl")]
    assert [e["event"] for e in stopped] == ["stop", "stop"]
    for run, event in zip(folder.glob("runs/*"), stopped, strict=True):
        assert (run / "checkpoints" / str(event["step"]) / "MANIFEST.json").exists()

    # The parent is killed: its workers save and leave by themselves.
    parent = command(*arguments, cwd=tmp_path)
    wait_until(lambda: sittings(folder) == 5)
    third = children(parent.pid)
    parent.kill()
    parent.communicate()
    wait_until(lambda: gone(third), seconds=10)

    # The same command at once: it goes on, and every member is whole.
    assert exits(*arguments) == 0
    for member in ladder.members(sweep):
        run = folder / "runs" / member.name
        row, steps = record.read(run), member.config.train.steps
        assert (row.status, row.steps) == ("finished", steps)
        rows = [r["step"] for r in read_jsonl(run / "metrics.jsonl") if "train/loss" in r]
        assert rows == list(range(5, steps + 1, 5))
        resumed = [e["step"] for e in read_jsonl(run / "events.jsonl") if e["event"] == "resume"]
        assert resumed == sorted(resumed) and all(step >= 20 for step in resumed)
    longest = max(ladder.members(sweep), key=lambda m: m.config.train.steps)
    data = dataclasses.replace(sweep.base.data, dir=str(folder / "data"))
    lone = api.train(dataclasses.replace(longest.config, data=data), tmp_path / "alone")
    assert record.read(folder / "runs" / longest.name).loss == pytest.approx(lone.loss, rel=1e-2)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_worker_beside_others_has_one_thread_for_its_operations():
    code = (
        "import os, jax, jax.numpy as jnp\n"
        "jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()\n"
        "task = '/proc/self/task'\n"
        "names = [open(f'{task}/{t}/comm').read() for t in os.listdir(task)]\n"
        "print(sum('XLAEigen' in name for name in names))"
    )
    env = worker_environment(1, [], True)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == "1", run.stderr


@pytest.mark.slow
def test_shares_of_a_sweep_leave_only_the_rest_to_do(tmp_path, capsys):
    path, folder = experiment(tmp_path / "mine", SHORT), tmp_path / "sweep"
    arguments = ("sweep", f"--config={path}", f"--workdir={folder}")
    names = [m.name for m in ladder.members(experiments.load(path))]
    for i in range(2):
        assert exits(*arguments, f"--index={i}/2") == 0
        there = {r.parent.name for r in folder.glob("runs/*/record.json")}
        assert len(there) == i + 1 and there <= set(names)
    made = {r: r.stat().st_mtime_ns for r in folder.glob("runs/*/record.json")}
    assert exits(*arguments) == 0 and (folder / "report.html").exists()
    assert made == {r: r.stat().st_mtime_ns for r in folder.glob("runs/*/record.json")}
    assert exits(*arguments, "--index=2/2") == 2
    assert "expected i/n with 0 ≤ i < n" in capsys.readouterr().err
