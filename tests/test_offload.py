"""Optimizer state in the host's memory: another place, the same bits."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small
from test_loop import StopAfter, fit, tiny

from jaxlm import api, mesh
from jaxlm.config import MeshConfig
from jaxlm.files import read_jsonl
from jaxlm.model.scale import size
from jaxlm.schema import UserError
from jaxlm.train import loop
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import program


def config(name="adamw", offload=True, axes=(1, 2, 1), **train):
    made = tiny(train={"log_every": 1, **train}, optimizer={"name": name})
    made = dataclasses.replace(made, mesh=MeshConfig(*axes))
    return dataclasses.replace(made, optimizer=dataclasses.replace(made.optimizer, offload=offload))


def losses(folder):
    rows = read_jsonl(folder / "metrics.jsonl")
    return [(r["step"], r["train/loss"], r["train/grad_norm"]) for r in rows if "train/loss" in r]


def test_a_run_offloads_and_takes_its_state_back_and_is_the_run_it_was(tmp_path):
    each = {"steps_per_dispatch": 1, "steps": 6, "eval_every": 0, "checkpoint_every": 0}
    there, here = (config(offload=offload, **each) for offload in (True, False))
    with small.on_mesh(there):
        fit([here], tmp_path / "whole")
        for i, sitting in enumerate((here, there, here)):
            with pytest.raises(loop.Stopped):
                fit([sitting], tmp_path / "moved", StopAfter(i))
        fit([there], tmp_path / "moved")
    assert len(losses(tmp_path / "whole" / "run")) == 6
    assert losses(tmp_path / "moved" / "run") == losses(tmp_path / "whole" / "run")


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("how", [
    {}, {"name": "muon"}, {"steps_per_dispatch": 1},
    {"accumulation_steps": 2, "global_batch_size": 8},
])  # fmt: skip
def test_the_state_lies_with_the_host_between_updates(axes, how):
    found = []
    for offload in (True, False):
        asked = config(offload=offload, axes=axes, **how)
        n = asked.train.steps_per_dispatch
        with small.on_mesh(asked, quick=False):
            state, numbers = program(asked).init(hyper(asked)), hyper(asked)
            batches = small.batch(asked, steps=n)
            batches = mesh.put_batch(batches, jax.sharding.get_mesh(), 1)
            state, metrics = program(asked).chunk(numbers, state, batches)
            state, more = program(asked).chunk(numbers, state, batches)
            arrays = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
            kinds = {x.sharding.memory_kind for x in arrays}
            assert kinds == {mesh.HOST_MEMORY if offload else "device"}
            found.append(jax.tree.leaves(jax.device_get((state, metrics, more))))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_device_without_such_a_memory_is_told_before_anything_runs():
    memory = SimpleNamespace(kind="device")
    device = SimpleNamespace(device_kind="Abacus", addressable_memories=lambda: [memory])
    with pytest.raises(
        UserError, match=r"config\.optimizer\.offload: expected False: Abacus has no"
    ):
        mesh.make(config(axes=(1, 1, 1)), [device])


@pytest.mark.slow
def test_a_tpus_compiler_leaves_it_there():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'jaxlm[tpu]'")
    wide = dataclasses.replace(small.MODEL, d_model=512, vocab_size=1024)  # of whole tiles
    asked = (config(offload=offload, axes=(1, 4, 1)) for offload in (False, True))
    plain, there = (
        api.plan(dataclasses.replace(c, model=wide), topology="v5e:2x2")["steps"][0] for c in asked
    )
    moments = 8 * size(wide).params / 4
    memory = there["memory_gib"]
    assert memory["host"] * 2**30 == pytest.approx(moments, rel=0.03)
    spared = plain["memory_gib"]["arguments"] - memory["arguments"]
    assert spared == pytest.approx(memory["host"], rel=0.1)
