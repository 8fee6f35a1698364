"""Remote workdirs, trackers, traces and the doctor, through the functions that people call."""

import json
import shutil
import sys
import types

import fsspec
import jax
import pytest
from faults import words

from jaxlm import api, doctor, main
from jaxlm.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxlm.files import Mirror, read_jsonl
from jaxlm.schema import JaxlmError, UserError


@pytest.fixture(autouse=True)
def quick():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return words(tmp_path_factory.mktemp("api") / "text", files=20)


def tiny(text, **train):
    return Config(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, seq_len=16),
        data=DataConfig(sources=(str(text),), eval_sequences=8, eval_fraction=0.2),
        train=TrainConfig(
            **{"steps": 24, "global_batch_size": 8, "steps_per_dispatch": 4, "log_every": 4}
            | {"checkpoint_every": 8}
            | train
        ),
    )


class StopAfter:
    """Looked at once before the loop, then after each dispatch."""

    exit_code = 143

    def __init__(self, dispatches):
        self.left = dispatches

    def __bool__(self):
        self.left -= 1
        return self.left < -1


def timeless(folder):
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def exits(*arguments):
    with pytest.raises(SystemExit) as e:
        main.main(list(map(str, arguments)))
    return e.value.code


# ----------------------------------------------------------------------------------------- remote


@pytest.mark.slow
def test_a_run_at_a_url_goes_on_from_there_alone(text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url, config = "memory://test_api/run", tiny(text)
    remote, local = fsspec.filesystem("memory"), Mirror(url).local
    whole = tmp_path / "whole"
    api.train(config, whole)

    with pytest.raises(JaxlmError, match="stopped at step 12"):
        api.train(config, url, stop=StopAfter(2))
    kept = {p.split("/")[-2] for p in remote.glob("/test_api/run/checkpoints/*/MANIFEST.json")}
    assert kept == {"8", "12"}
    shutil.rmtree(local)  # another machine
    said = []
    row = api.train(config, url, say=said.append)
    assert row.status == "finished" and "16 parameters" not in said
    events = [(e["event"], e["step"]) for e in read_jsonl(local / "events.jsonl")]
    assert events == [("start", 0), ("stop", 12), ("resume", 12), ("finish", 24)]
    assert timeless(local) == timeless(whole)

    shutil.rmtree(local)
    assert api.train(config, url, say=said.append) == row
    assert "nothing is left to do" in said[-1]
    shutil.rmtree(local)
    texts = [api.generate(f, ["the sea"], max_new_tokens=8, temperature=0) for f in (url, whole)]
    assert texts[0] == texts[1]
    beams = "generate", f"--workdir={whole}", "--prompt=a", "--num_beams=2"
    assert exits(*beams, "--top_k=3") == 2  # beams are not drawn
    page = api.report(url)
    assert page.read_bytes() and remote.exists("/test_api/run/report.html")
    assert not remote.glob("/test_api/run/**/*.tmp") and not remote.exists("/test_api/run/.lock")
    with pytest.raises(UserError, match="holds another run"):
        api.train(tiny(text, steps=32), url)


def test_each_checkpoint_is_sent_when_it_is_made(text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote, seen = fsspec.filesystem("memory"), []

    def look(run, row):
        there = remote.glob("/test_api/often/checkpoints/*/MANIFEST.json")
        seen.append((row["step"], max((int(p.split("/")[-2]) for p in there), default=0)))

    api.train(tiny(text), "memory://test_api/often", progress=look)
    assert (16, 8) in seen and (24, 16) in seen


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(UserError, match="nothing://x"):
        api.train(Config(), "nothing://x")


# ------------------------------------------------------------------------------- traces, trackers


def test_a_trace_holds_the_steps_that_were_asked_for(text, tmp_path, monkeypatch):
    began, ended = [], []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    steps = []
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda *a: (began.append(len(steps)), start(*a))
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (ended.append(len(steps)), stop()))
    config = tiny(text, profile="9:14")  # inside the chunks 8 … 12 and 12 … 16
    api.train(config, tmp_path / "run", progress=lambda run, row: steps.append(row["step"]))
    assert len(began) == len(ended) == 1
    [trace] = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_a_service_gets_numbers_by_step(text, tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(
        init=lambda **k: calls.append(("init", k["name"])),
        log=lambda numbers, step: calls.append((step, sorted(numbers))),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(JaxlmError, match="stopped"):
        api.train(tiny(text, track=("wandb",)), tmp_path / "run", stop=StopAfter(1))
    assert calls[0] == ("init", "run") and calls[-1] == ("finish",)
    steps = [c[0] for c in calls[1:-1]]
    assert steps == [4, 8] and "train/loss" in calls[1][1] and "step" not in calls[1][1]


def test_a_missing_tracker_says_what_to_install_before_anything_is_done(
    text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "trackio", None)
    experiment = tmp_path / "tiny.py"
    experiment.write_text("from jaxlm.config import *\nget_config = Config\n")
    workdir = tmp_path / "run"
    assert exits("train", f"--config={experiment}", f"--workdir={workdir}", "--track=trackio") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "trackio is not installed" in line and "pip install 'jaxlm[trackio]'" in line
    assert not workdir.exists()


# ----------------------------------------------------------------------------------------- doctor


def test_the_doctor_sees_this_machine(capsys):
    assert exits("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "jaxlm.doctor/1" and found["problems"] == []
    assert len(found["devices"]) == 8 and found["versions"]["jax"] == jax.__version__
    assert exits("doctor") == 0
    out = capsys.readouterr().out
    assert jax.__version__ in out and "no problems found" in out


def test_the_doctor_tells_problems(monkeypatch, capsys):
    def none():
        raise RuntimeError("Unable to initialize backend 'tpu'\nmore")

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=1 << 20))
    assert exits("doctor") == 1
    out = capsys.readouterr().out
    assert "problem: no devices: Unable to initialize backend 'tpu'\n" in out
    assert "2 GiB" in out
