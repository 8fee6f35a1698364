"""Own layers, objectives, optimizers, schedules and data, from any working directory."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import api, pyfile
from jaxlm import experiment as experiments
from jaxlm.config import Config, DataConfig, OptimizerConfig
from jaxlm.data.documents import read
from jaxlm.files import read_json, read_jsonl
from jaxlm.schema import JaxlmError, UserError
from jaxlm.train.run import Run, read_config

SHIPPED = Path(__file__).parents[1] / "experiments" / "own_parts.py"
SMALL = (
    ("model.d_model", "16"),
    ("model.n_layers", "1"),
    ("model.seq_len", "16"),
    ("data.eval_sequences", "8"),
    ("train.steps", "20"),
    ("train.log_every", "1"),
    ("train.eval_every", "0"),
    ("train.checkpoint_every", "10"),
)


@pytest.fixture(autouse=True)
def quick():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class StopAtOnce:
    """Looked at once before the loop, then after each dispatch."""

    exit_code, looks = 143, 0

    def __bool__(self):
        self.looks += 1
        return self.looks > 1


def test_the_shipped_example_trains_resumes_elsewhere_and_is_read_without_its_file(
    tmp_path, monkeypatch
):
    mine, here, there = (tmp_path / name for name in ("mine", "here", "there"))
    for folder in (mine, here, there):
        folder.mkdir()
    experiment, run = Path(shutil.copy(SHIPPED, mine)), tmp_path / "run"

    monkeypatch.chdir(here)
    small = experiments.load("../mine/own_parts.py", SMALL)
    assert small.model.layer == f"{experiment}:ParallelBlock"
    with pytest.raises(JaxlmError, match="stopped at step 10"):
        api.train(small, run, stop=StopAtOnce())
    monkeypatch.chdir(there)
    done = api.train(experiments.load(experiment, SMALL), run)

    rows = [r for r in read_jsonl(run / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in rows] == list(range(1, 21))
    # The objective: (1 - p)·nll is below nll, and the evaluation's is the plain loss.
    assert all(r["train/loss"] < r["train/nll"] for r in rows)
    assert rows[-1]["train/nll"] < rows[0]["train/nll"] < 6
    assert done.loss == pytest.approx(rows[-1]["train/nll"], rel=0.2)
    # The schedule: warm-up of one step of 20, then 1 - √done.
    rates = [r["learning_rate"] / small.optimizer.learning_rate for r in rows]
    assert rates == pytest.approx([1, *(1 - np.sqrt(np.arange(19) / 19))], abs=1e-6)
    # The layer has one norm, the optimizer one moment.
    checkpoint = read_json(run / "checkpoints" / "20" / "MANIFEST.json", "checkpoint")
    assert sum(checkpoint["meta"]["data"]["licences"].values()) > 0
    assert "Licences of the text" in (run / "DATA_CARD.md").read_text()
    arrays = checkpoint["arrays"]
    params = [a for a in arrays if a.startswith("params/layers/")]
    assert sum("norm" in a for a in params) == 1
    moments = [a for a in arrays if a.startswith("opt_state/") and "/mu/" in a]
    assert len(moments) == sum(a.startswith("params/") for a in arrays)
    assert not any("/nu/" in a for a in arrays)
    [origin] = read_json(run / "data_manifest.json", "data")["origins"]
    assert origin["text_licence"] == "CC0-1.0"

    assert (run / "code" / "own_parts.py").read_bytes() == SHIPPED.read_bytes()
    shutil.rmtree(mine)
    shutil.rmtree(run / "data")
    [text] = api.generate(run, ["12 + 34 = "], max_new_tokens=4, temperature=0.0)
    assert len(text) <= 4
    assert sorted(p.name for p in (run / "code").iterdir()) == ["own_parts.py"]
    with pytest.raises(UserError, match=r"config.model.layer: no such file: .*own_parts.py"):
        api.train(small, run)


def test_the_shipped_data_are_sums():
    documents = list(read([f"{SHIPPED}:sums"]))
    assert len({d.text for d in documents}) == len(documents) == 4000
    for line in documents[7].text.splitlines():
        a, b, c = (int(n) for n in line.replace("+", "=").split("="))
        assert a + b == c


# ------------------------------------------------------------------------------- where a file is

EXPERIMENT = """
from jaxlm.config import *

def get_config():
    return Config(optimizer=OptimizerConfig(schedule="parts.py:flat"))
"""
FLAT = "def flat(done, hyper):\n    return {}\n"


def test_a_file_is_looked_for_beside_the_experiment_then_in_the_working_directory(
    tmp_path, monkeypatch
):
    mine, here = tmp_path / "mine", tmp_path / "here"
    mine.mkdir(), here.mkdir()
    experiment = mine / "experiment.py"
    experiment.write_text(EXPERIMENT)
    monkeypatch.chdir(here)
    with pytest.raises(UserError) as e:
        experiments.load(experiment)
    for said in ("config.optimizer.schedule", str(mine / "parts.py"), str(here / "parts.py")):
        assert said in str(e.value)
    assert "\n" not in str(e.value)

    (here / "parts.py").write_text(FLAT.format(1.0))
    assert experiments.load(experiment).optimizer.schedule == f"{here / 'parts.py'}:flat"
    (mine / "parts.py").write_text(FLAT.format(0.5))
    found = experiments.load(experiment)
    assert found.optimizer.schedule == f"{mine / 'parts.py'}:flat"
    from_python = experiments.located(Config(optimizer=OptimizerConfig(schedule="parts.py:flat")))
    assert from_python.optimizer.schedule == f"{here / 'parts.py'}:flat"

    # What a file says is part of a run's identity, and where it lies is not.
    assert experiments.fingerprint(found) != experiments.fingerprint(from_python)
    (here / "parts.py").write_text(FLAT.format(0.5))
    assert experiments.fingerprint(found) == experiments.fingerprint(from_python)


def test_a_file_that_changes_while_it_is_used_is_refused(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("f = 1\n")
    assert pyfile.resolve(f"{own}:f", "config.x") == 1
    own.write_text("f = 2\n")  # as long, in the same second: no cache of bytecode may hide it
    with pytest.raises(UserError, match="has changed while in use"):
        pyfile.resolve(f"{own}:f", "config.x")
    own.write_text("f = 1\n")
    assert pyfile.resolve(f"{own}:f", "config.x") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["own.py"]  # nothing is left beside it


def test_an_edited_experiment_is_read_anew(tmp_path):
    experiment = tmp_path / "experiment.py"
    for steps in (7, 8):
        body = f"    return Config(train=TrainConfig(steps={steps}))\n"
        experiment.write_text("from jaxlm.config import *\ndef get_config():\n" + body)
        assert experiments.load(experiment).train.steps == steps


def test_two_files_of_one_name_are_both_kept(tmp_path):
    for name, factor in (("a", 1.0), ("b", 0.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(
            f"def schedule(done, hyper):\n    return {factor}\n"
            f"def texts():\n    for i in range(40):\n        yield f'{name} {{i}} ' * 20\n"
        )
    tiny = Config(
        data=DataConfig(sources=(f"{tmp_path}/a/own.py:texts",)),
        optimizer=OptimizerConfig(schedule=f"{tmp_path}/b/own.py:schedule"),
    )
    Run(tiny, tmp_path / "run", "data").claim()
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    kept = read_config(tmp_path / "run")
    assert pyfile.resolve(kept.optimizer.schedule, "x")(0, None) == 0.5
    assert next(pyfile.resolve(kept.data.sources[0], "x")()).startswith("a 0")
    assert dataclasses.replace(kept, data=tiny.data, optimizer=tiny.optimizer) == tiny
