"""Every product of the mesh's axes trains a decoder, an encoder–decoder and a mixture of experts as
one device does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxlm import mesh
from jaxlm.config import MeshConfig
from jaxlm.model import transformer
from jaxlm.model.presets import preset
from jaxlm.model_config import MoE
from jaxlm.train import losses
from jaxlm.train.objectives import corrupted
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import program

STEPS = 20
SMALL = {
    "d_model": 16, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "d_head": 4, "d_ff": 16,
    "vocab_size": 32, "seq_len": 32, "dropout": 0.0,
}  # fmt: skip
KINDS = {
    # Soft caps, norms on both sides, rotary positions; every other layer sees a window. With the
    # preset's norm_eps rounding is 1.1e-5 of a gradient already between two ways to compile.
    "decoder": (preset("gemma2-2b"), {"sliding_window": 8, "norm_eps": 1e-3}, {}),
    # Relative positions, cross-attention.
    "encoder_decoder": (
        preset("t5-small"), {"n_encoder_layers": 8, "target_len": 16},
        {"objective": "span_corruption"},
    ),
    "moe": (preset("qwen3-30b-a3b"), {"seq_len": 16, "moe": MoE(n_experts=8, d_expert=8)}, {}),
}  # fmt: skip
# Of the noise on the parameters. In the 20 steps of one device no token of "moe" is nearer than
# 1.4e-5 to another expert; with 0 it is 3e-7 at seq_len 32, and rounding sends it there.
SEEDS = {"decoder": 0, "encoder_decoder": 0, "moe": 27}
SINGLE = [{axis: 8} for axis in ("data", "fsdp", "tensor", "context", "expert", "stage")]
PRODUCTS = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "context": 4},
    {"stage": 2, "tensor": 2, "data": 2},
    {"expert": 4, "fsdp": 2},
    {"stage": 2, "context": 2, "fsdp": 2},
    {"context": 2, "tensor": 2, "expert": 2},
    {"stage": 4, "expert": 2},
    {"stage": 2, "expert": 2, "tensor": 2},
    {"data": 2, "context": 2, "tensor": 2},
    {"stage": 2, "context": 4},
    {"fsdp": 4, "tensor": 2},
    {"stage": 2, "fsdp": 2, "expert": 2},
]


def config_of(kind, model=(), **axes):
    """`model`: fields in place of the preset's."""
    preset_, own, train = KINDS[kind]
    shape = dataclasses.replace(preset_, **{**SMALL, **own, **dict(model)})
    # A rate at which Adam does not blow rounding up within the 20 steps.
    train, rate = {"global_batch_size": 8, "steps": STEPS, **train}, {"learning_rate": 3e-4}
    config = small.config(shape.__dict__, train, rate)
    return dataclasses.replace(config, mesh=MeshConfig(**{"data": 1, **axes}))


@functools.cache
def params_of(kind, model=()):
    """As they are at first, and a little of everything, so that gains and biases count too."""
    config, draw = config_of(kind, model), np.random.default_rng(SEEDS[kind])
    with small.on_mesh(config):
        found = jax.device_get(transformer.init(config.model, jax.random.key(0)))
    return jax.tree.map(lambda x: x + 0.02 * draw.normal(size=x.shape).astype(x.dtype), found)


@functools.cache
def losses_of(kind, axes, model=()):
    """Of 20 steps."""
    config = config_of(kind, model, **dict(axes))
    with small.on_mesh(config):
        state = small.state(config, params_of(kind, model))
        batches = small.batch(config, steps=STEPS)
        on_mesh = mesh.put_batch(batches, jax.sharding.get_mesh(), 1)
        return np.asarray(program(config).chunk(hyper(config), state, on_mesh)[1]["train/loss"])


@functools.cache
def gradients_of(kind, axes, model=()):
    """Of the first step."""
    config, key = config_of(kind, model, **dict(axes)), jax.random.key(0)

    def loss(params, batch):
        seen = corrupted(config, batch, key)
        total, _ = losses.cross_entropy(config, params, seen, key)
        return total / jnp.sum(seen.weights)

    with small.on_mesh(config):
        params = small.sharded(config, params_of(kind, model))
        batch = mesh.put_batch(small.batch(config), jax.sharding.get_mesh())
        return jax.device_get(jax.jit(jax.grad(loss))(params, batch))


def assert_losses_of_one_device(kind, axes, both=(), **model):
    """`both`: fields of the model that the run on one device has, too."""
    alone = losses_of(kind, (), both)
    assert len(set(alone)) == STEPS
    found = losses_of(kind, tuple(axes.items()), (*both, *model.items()))
    assert np.abs(found - alone).max() < (5e-5 if kind == "moe" else 1e-5)


def assert_as_one_device(kind, axes, **model):
    assert_losses_of_one_device(kind, axes, **model)
    found = gradients_of(kind, tuple(axes.items()), tuple(model.items()))
    small.assert_near(found, gradients_of(kind, ()), rel=5e-5 if kind == "moe" else 1e-5)


@pytest.mark.parametrize(
    "kind, axes",
    [
        ("decoder", {"context": 2, "fsdp": 2}),
        pytest.param("moe", {"expert": 2, "stage": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_product_of_axes_trains_as_one_device_does(kind, axes):
    assert_losses_of_one_device(kind, axes, both=(("n_layers", 2),))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", SINGLE + PRODUCTS, ids=str)
def test_every_product_of_axes_trains_as_one_device_does(kind, axes):
    assert_as_one_device(kind, axes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "stage, repeats, microbatches", [(2, 2, 4), (2, 4, 2), (4, 2, 8), (4, 2, 2), (2, 1, 1)]
)
def test_every_schedule_of_a_pipeline_computes_the_same(kind, stage, repeats, microbatches):
    schedule = {"pipeline_repeats": repeats, "pipeline_microbatches": microbatches}
    assert_as_one_device(kind, {"stage": stage}, **schedule)
