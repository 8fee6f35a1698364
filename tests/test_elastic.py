"""A run goes on on any other mesh: its state bitwise what was saved, its losses those it would have
had."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from test_loop import StopAfter, fit, tiny

from jaxlm.config import MeshConfig
from jaxlm.files import read_jsonl
from jaxlm.train import loop
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import abstract_state

MESHES = [
    MeshConfig(1),
    MeshConfig(2, 2),
    MeshConfig(1, tensor=2),
    MeshConfig(1, fsdp=2, context=2, stage=2),
]


def on(axes):
    return dataclasses.replace(tiny(train={"log_every": 2}), mesh=axes, model=small.config(
        {"n_layers": 2, "n_heads": 2, "seq_len": 16}).model)  # fmt: skip


def saved(config, folder):
    """The newest state, read onto the config's mesh."""
    with small.on_mesh(config):
        step, state, meta = Checkpoints(folder / "checkpoints").load(
            abstract_state(config, hyper(config))
        )
        assert meta["position"] == step * config.train.global_batch_size
        return step, jax.tree.leaves(jax.device_get(state))


def train_losses(folder):
    rows = read_jsonl(folder / "metrics.jsonl")
    return [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]


@pytest.mark.slow
def test_a_run_goes_on_from_one_to_four_to_two_to_eight_devices(tmp_path):
    alone = on(MESHES[0])
    with small.on_mesh(alone):
        fit([alone], tmp_path / "whole")
    folder = tmp_path / "moved"
    for i, axes in enumerate(MESHES):
        config = on(axes)
        with small.on_mesh(config):
            if axes is MESHES[-1]:
                (done,) = fit([config], folder)
            else:
                with pytest.raises(loop.Stopped):
                    fit([config], folder, StopAfter(0))
        step, state = saved(config, folder / "run")
        assert step == (2 * (i + 1) if i < len(MESHES) - 1 else config.train.steps)
        for other in MESHES:  # every mesh reads the same bits
            _, found = saved(on(other), folder / "run")
            assert all(x.tobytes() == y.tobytes() for x, y in zip(state, found, strict=True))
    assert done.status == "finished"
    whole, moved = (train_losses(f / "run") for f in (tmp_path / "whole", folder))
    assert [s for s, _ in whole] == [s for s, _ in moved]
    assert np.abs(np.array(whole) - np.array(moved)).max() < 1e-5
