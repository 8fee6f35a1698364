"""With `deterministic_reduce` a run is the same to the last bit on any number of devices."""

import functools

import jax
import numpy as np
import pytest
import small
from reference import flat

from jaxlm import mesh
from jaxlm.evaluate import likelihood
from jaxlm.schema import UserError
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import program

SHARDS = 16
KINDS = {
    "adamw": ({}, {}, {}),
    "muon": (
        {"scan_layers": False, "dropout": 0.1, "norm": "layernorm", "positions": "learned",
         "bias": True, "tie_embeddings": False, "activation": "gelu"},
        {}, {"name": "muon"},
    ),
    "bfloat16": ({"compute_dtype": "bfloat16", "remat": "full"}, {"z_loss": 1e-3}, {}),
    "masked": ({"architecture": "encoder"}, {"objective": "masked_lm"}, {}),
}  # fmt: skip


@functools.cache
def trained(kind, devices, steps, shards=SHARDS, quick=True):
    """Metrics of each step, parameters at the end, and the loss on held-out rows."""
    model, train, optimizer = KINDS[kind]
    train = {"global_batch_size": 32, "steps": steps, "deterministic_reduce": shards, **train}
    config = small.config(model, train, optimizer, (devices, 1, 1))
    with small.on_mesh(config, quick):
        state = small.state(config, small.params(config))
        batches = mesh.put_batch(small.batch(config, steps=steps), jax.sharding.get_mesh(), 1)
        state, metrics = program(config).chunk(hyper(config), state, batches)
        held_out = likelihood.total_nats(config, state.params, small.batch(config, seed=1))
        return jax.device_get(metrics), flat(jax.device_get(state.params)), held_out


def assert_same(found, expected):
    (metrics, params, held_out), (metrics_1, params_1, held_out_1) = found, expected
    assert len(set(metrics_1["train/loss"])) > 1
    for name, x in metrics_1.items():
        assert np.array_equal(metrics[name], x), name
    for path, x in params_1.items():
        assert np.array_equal(params[path], x), path
    assert held_out == held_out_1


def test_a_run_is_the_same_to_the_bit_on_one_device_and_on_eight():
    """Compiled as runs are: without XLA's optimizations a shard's last bits do depend on the loops
    around it."""
    alone = trained("adamw", 1, 4, quick=False)
    assert_same(trained("adamw", 8, 4, quick=False), alone)


@pytest.mark.slow
def test_a_run_in_shards_is_the_run_in_one_but_for_rounding():
    alone = trained("adamw", 1, 4, quick=False)
    plain, _, held_out = trained("adamw", 1, 4, shards=0)
    assert np.abs(alone[0]["train/loss"] - plain["train/loss"]).max() < 1e-5
    assert alone[2] == pytest.approx(held_out, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_steps_are_the_same_to_the_bit(kind, devices):
    assert_same(trained(kind, devices, 100, quick=False), trained(kind, 1, 100, quick=False))


@pytest.mark.parametrize(
    "shards, sizes, said",
    [
        (16, (2, 2, 1), "a mesh of data alone, got fsdp=2"),
        (8, (8, 1, 1), "at least two shards on each device of mesh data=8, got 8; nearest: 16"),
        (
            16,
            (3, 1, 1),
            "a power of two for deterministic_reduce, got 3; nearest: 2",
        ),
    ],
)
def test_a_mesh_that_cannot_keep_the_order_is_told(shards, sizes, said):
    train = {"global_batch_size": 48, "deterministic_reduce": shards}
    with pytest.raises(UserError, match=said):
        mesh.make(small.config(train=train, sizes=sizes), jax.devices()[: np.prod(sizes)])


@pytest.mark.parametrize(
    "train, said",
    [
        ({"deterministic_reduce": 12}, r"deterministic_reduce: .* \(largest: 16\), got 12"),
        ({"deterministic_reduce": 32}, r"divides global_batch_size=48 \(largest: 16\), got 32"),
        ({"deterministic_reduce": 8, "accumulation_steps": 2}, "accumulation_steps: expected 1"),
    ],
)
def test_shards_that_cannot_be_are_told(train, said):
    with pytest.raises(UserError, match=said):
        small.config(train={"global_batch_size": 48, **train})
