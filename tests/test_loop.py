"""The loop: an interrupted run is the uninterrupted one, a diverged run stops where it was good."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small

from jaxlm import config as configs
from jaxlm import job, mesh
from jaxlm.data import shards
from jaxlm.files import read_jsonl
from jaxlm.schema import JaxlmError, UserError, override
from jaxlm.train import loop
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.optimizer import hyper
from jaxlm.train.run import Run, read_config
from jaxlm.train.step import abstract_state

STEPS = 12


class StopAfter:
    """A stop flag that rises at the n-th time it is looked at, that is after n dispatches."""

    exit_code = 143

    def __init__(self, n):
        self.left = n

    def __bool__(self):
        self.left -= 1
        return self.left < 0


def watch(config, params, step):
    """A cheap evaluation that depends on every bit of the parameters."""
    total = sum(float(np.abs(x).sum(dtype=np.float64)) for x in jax.tree.leaves(params))
    return [{"step": step, "eval/loss": total, "eval/bpb": total / 2}]


def fit(configs_, folder, stop=False, rows=None):
    """`loop.fit` of these configs, each in its own folder below `folder`."""
    runs = [Run(c, folder / c.name, "data") for c in configs_]
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        run.claim()
    keep = rows.append if rows is not None else lambda row: None
    return loop.fit(
        runs, small.dataset(configs_[0]), [watch], stop, lambda run, row: keep((run.folder, row))
    )


def fit_in_sittings(configs_, folder, sittings):
    """Stopped after each number of dispatches, then carried to the end."""
    for n in sittings:
        with pytest.raises(loop.Stopped, match="the same command goes on") as e:
            fit(configs_, folder, StopAfter(n))
        assert e.value.exit_code == 143
    return fit(configs_, folder)


def metrics(folder):
    """The rows of metrics.jsonl as written, but for what a clock decides."""
    rows = read_jsonl(folder / "metrics.jsonl")
    return [json.dumps({k: v for k, v in r.items() if not k.startswith("perf/")}) for r in rows]


def final(config, folder):
    """(step, flat state) of the newest checkpoint."""
    step, state, _ = Checkpoints(folder / "checkpoints").load(abstract_state(config, hyper(config)))
    return step, jax.tree.leaves(jax.device_get(state))


def assert_same_run(config, a, b):
    assert metrics(a) == metrics(b)
    (step, state), (other_step, other) = final(config, a), final(config, b)
    assert step == other_step == STEPS
    assert all(x.tobytes() == y.tobytes() for x, y in zip(state, other, strict=True))
    x, y = (json.loads((f / "record.json").read_text()) for f in (a, b))
    assert {**x, "wall_time_s": 0} == {**y, "wall_time_s": 0}


def tiny(name="run", optimizer=None, train=None, **rest):
    train = {
        "steps": STEPS, "steps_per_dispatch": 2, "log_every": 3, "eval_every": 4,
        "checkpoint_every": 6, "global_batch_size": 4, **(train or {}),
    }  # fmt: skip
    return small.config({"n_layers": 1}, train, optimizer, name=name, **rest)


# ------------------------------------------------------------------------------- exact resume


def test_a_run_stopped_anywhere_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path):
    config, seen = tiny(), []
    with small.on_mesh(config, quick=False):  # bitwise, so compiled as users compile
        (done,) = fit([config], tmp_path / "whole", rows=seen)
        whole = tmp_path / "whole" / "run"
        rows = read_jsonl(whole / "metrics.jsonl")
        assert [row for _, row in seen] == rows
        assert [r["step"] for r in rows if "train/loss" in r] == [3, 6, 9, 12]
        assert [r["step"] for r in rows if "eval/loss" in r] == [4, 8, 12]
        assert [r["tokens"] for r in rows if "tokens" in r] == [144, 288, 432, 576]
        assert (done.status, done.steps, done.tokens) == ("finished", 12, 576)
        assert done.loss == rows[-1]["eval/loss"]
        assert done.train_loss == rows[-2]["train/loss"]
        # After each number of dispatches, and several times in one run.
        series = [*((n,) for n in range(6)), (0, 0, 0, 0), (2, 1)]
        for i, sittings in enumerate(series):
            fit_in_sittings([config], tmp_path / str(i), sittings)
            assert_same_run(config, tmp_path / str(i) / "run", whole)
        # Ended without a word: rows and leftovers after the last checkpoint are taken back.
        killed = tmp_path / "killed" / "run"
        with pytest.raises(loop.Stopped):
            fit([config], tmp_path / "killed", StopAfter(3))
        with open(killed / "metrics.jsonl", "a") as f:
            f.write('{"step": 9, "train/loss": 1.0}\n{"step": 12, "trai')
        (killed / "checkpoints" / "10.tmp").mkdir()
        fit([config], tmp_path / "killed")
        assert_same_run(config, killed, whole)
        assert not list((killed / "checkpoints").glob("*.tmp"))
        # A finished run: nothing is trained, nothing changes.
        before = metrics(whole)
        (again,) = fit([config], tmp_path / "whole")
        assert dataclasses.replace(again, wall_time_s=done.wall_time_s) == done
        assert metrics(whole) == before and final(config, whole)[0] == STEPS
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["12", "6"]


def test_a_population_is_its_members_and_resumes_bitwise(tmp_path):
    sizes = (2, 1, 2)
    members = [
        tiny("a", sizes=sizes),
        tiny("b", {"learning_rate": 1e-3, "weight_decay": 0.3}, seed=1, sizes=sizes),
        tiny("c", {"warmup_fraction": 0.5, "final_fraction": 0.2}, seed=2, sizes=sizes),
    ]
    with small.on_mesh(members[0]):
        done = fit(members, tmp_path / "whole")
        fit_in_sittings(members, tmp_path / "stopped", [1, 3])
        for config, row in zip(members, done, strict=True):
            whole, alone = (tmp_path / x / config.name for x in ("whole", "alone"))
            assert_same_run(config, tmp_path / "stopped" / config.name, whole)
            assert (row.name, row.seed, row.status) == (config.name, config.seed, "finished")
            fit([config], tmp_path / "alone")
            for mine, lone in zip(metrics(whole), metrics(alone), strict=True):
                assert json.loads(mine) == pytest.approx(json.loads(lone), rel=1e-4)
    losses = [row.train_loss for row in done]
    assert len(set(losses)) == 3


# ---------------------------------------------------------------------------------- divergence

BREAKS = """
import jax.numpy as jnp

def breaks(done, h):  # an infinite step after the share of steps that final_fraction says
    return jnp.where(done >= h.final_fraction, jnp.inf, 1.0)
"""


def test_a_run_that_is_no_longer_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(BREAKS)

    def breaking_in_step(step, name, checkpoint_every=4):
        share = (step - 1) / STEPS
        chosen = {"schedule": f"{own}:breaks", "final_fraction": share, "warmup_fraction": 0.0}
        return tiny(name, chosen, {"checkpoint_every": checkpoint_every})

    cases = [  # the step whose update is infinite → where that is noticed
        (breaking_in_step(8, "a", checkpoint_every=6), 9, 6),  # in the loss of the next step
        (breaking_in_step(8, "b"), 8, 4),  # in the parameters, when they would be saved
        (breaking_in_step(12, "c"), 12, 8),
        (breaking_in_step(1, "d"), 2, None),
    ]
    with small.on_mesh(cases[0][0]):
        for config, at, good in cases:
            kept = f"step {good}" if good else "no checkpoint"
            with pytest.raises(loop.Diverged, match=f"not finite at step {at}; .*{kept}") as e:
                fit([config], tmp_path)
            assert e.value.exit_code == 1 and "\n" not in str(e.value)
            folder = tmp_path / config.name
            if good:
                step, state = final(config, folder)
                assert step == good and all(np.isfinite(x).all() for x in state)
            rows = read_jsonl(folder / "metrics.jsonl") if at > 3 else []
            assert all(np.isfinite(r.get("train/loss", 0.0)) for r in rows)
            row = Run(config, folder, "data").record()
            assert (row.status, row.steps) == ("diverged", at)
            events = [r["event"] for r in read_jsonl(folder / "events.jsonl")]
            assert events == ["start", "diverged", "finish"]
        # In a population the others go on to their end.
        members = [breaking_in_step(8, "x"), breaking_in_step(13, "y"), breaking_in_step(6, "z")]
        done = fit(members, tmp_path / "population")
        assert [(r.status, r.steps) for r in done] == [
            ("diverged", 8), ("finished", 12), ("diverged", 7),
        ]  # fmt: skip
        alone = tmp_path / "alone"
        fit(members[1:2], alone)
        for mine, lone in zip(
            metrics(tmp_path / "population" / "y"), metrics(alone / "y"), strict=True
        ):
            assert json.loads(mine) == pytest.approx(json.loads(lone), rel=1e-4)


# ---------------------------------------------------------------- a folder is one run's; own parts

OWN = """
import jax.numpy as jnp, optax
from flax import nnx
from jaxlm.data.documents import Document
from jaxlm.model.layers import Block, declare
from jaxlm.model.parts import use
from jaxlm.train.losses import next_token

class Doubtful(Block):  # the shipped block, each output scaled by a learned gate
    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.gate = declare(rngs, (config.d_model,), ("d_model",), "gain", 1.0)

    def __call__(self, x_btd, context, cache=None):
        y_btd, cache, sums = super().__call__(x_btd, context, cache)
        return x_btd + use(self.gate, x_btd) * (y_btd - x_btd), cache, sums

def smoothed(config, params, batch, key):
    loss, _ = next_token(config, params, batch, key)
    return loss, {"train/own": jnp.sum(batch.weights)}

def momentum(config):
    return optax.trace(0.9)

def halving(done, h):
    return 0.5 ** jnp.floor(4 * done)

def texts():
    for i in range(40):
        yield Document(f"text {i}: " + "abcdefgh" * (20 + i), path=f"{i}", text_licence="CC0-1.0")
"""


def test_an_experiment_brings_its_own_layer_objective_optimizer_schedule_and_data(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(job, "cache_compilations", lambda: None)  # not into this user's cache
    own = tmp_path / "own.py"
    own.write_text(OWN)
    config = small.config(
        {"layer": f"{own}:Doubtful", "vocab_size": 257, "seq_len": 16, "n_layers": 1},
        {
            "objective": f"{own}:smoothed",
            "steps": 8,
            "log_every": 1,
            "steps_per_dispatch": 4,
            "global_batch_size": 8,
        },
        {"name": f"{own}:momentum", "schedule": f"{own}:halving", "warmup_fraction": 0.0},
        sizes=(-1, 1, 1),
        data=configs.DataConfig(sources=(f"{own}:texts",), eval_sequences=8, eval_fraction=0.2),
    )
    task = job.Task(config, tmp_path / "run")
    manifest = shards.build(config.data, 257, tmp_path / "data")
    assert [o.text_licence for o in manifest.origins] == ["CC0-1.0"]
    with small.compiled_quickly():
        (done,) = job.train([task], tmp_path / "data")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    train = [r for r in rows if "train/own" in r]
    assert [r["train/own"] for r in train] == [1.0] * 8  # sums are reported per token
    rates = [r["learning_rate"] / config.optimizer.learning_rate for r in train]
    assert rates == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125])
    assert train[-1]["train/loss"] < train[0]["train/loss"]
    with jax.set_mesh(mesh.make(config)):
        params = jax.device_get(job.load_params(config, task.folder))
    assert params["layers"]["gate"].shape == (1, 8)
    assert not np.array_equal(params["layers"]["gate"], np.ones((1, 8)))

    # The same again: the record as it is, nothing written. Then what must be refused.
    files = {p: p.read_bytes() for p in task.folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert job.train([task], tmp_path / "data") == [done]
    assert files == {p: p.read_bytes() for p in files}
    changes = [
        (override(config, "train.steps", 9), "train.steps was 8, is 9"),
        (
            override(override(config, "train.log_every", 2), "optimizer.weight_decay", 0.2),
            "optimizer.weight_decay was 0.1, is 0.2",
        ),
        (override(config, "seed", 1), "seed was 0, is 1"),
    ]
    for changed, said in changes:
        with pytest.raises(UserError, match=said) as e:
            job.train([job.Task(changed, task.folder)], tmp_path / "data")
        assert "holds another run" in str(e.value) and "\n" not in str(e.value)
    watched = override(config, "train.log_every", 2)
    assert job.train([job.Task(watched, task.folder)], tmp_path / "data") == [done]

    # Its code is kept with it, and another text of the same file is another run.
    kept = read_config(task.folder)
    assert kept.model.layer == f"{task.folder}/code/own.py:Doubtful"
    own.write_text(OWN + "\n# another text\n")
    with pytest.raises(UserError, match="its own code changed"):
        job.train([task], tmp_path / "data")
    own.write_text(OWN)

    # Other data in the same place.
    other = tmp_path / "other"
    other.mkdir()
    for i in range(40):
        (other / f"{i}.txt").write_text(f"another text {i} " * 20)
    shards.build(configs.DataConfig(sources=(str(other),)), 257, tmp_path / "other_data")
    with pytest.raises(UserError, match=f"saw data {manifest.fingerprint}, the shards hold"):
        job.train([task], tmp_path / "other_data")
    assert files == {p: p.read_bytes() for p in files}


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    config = tiny()
    with small.on_mesh(config):
        with pytest.raises(loop.Stopped):
            fit([config], tmp_path, StopAfter(1))
        usage = type("usage", (), {"free": 1000})
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(JaxlmError, match="disk full") as e:
            fit([config], tmp_path)
        assert e.value.exit_code == 1 and "\n" not in str(e.value)
        monkeypatch.undo()
        assert final(config, tmp_path / "run")[0] == 4
        assert [r.steps for r in fit([config], tmp_path)] == [STEPS]
