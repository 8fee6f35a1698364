"""The same losses on every mesh, and one clear line for a mesh that cannot be."""

import functools

import jax
import numpy as np
import pytest
import reference
import small

from jaxlm import mesh
from jaxlm.config import MeshConfig
from jaxlm.schema import UserError
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import program

# Together: both optimizers, accumulation, every norm, positions and activation, every parameter.
VARIANTS = {
    "adamw": ({"n_heads": 8, "d_head": 2}, {}, {}),
    "muon": (
        {"norm": "layernorm", "positions": "learned", "bias": True, "tie_embeddings": False},
        {},
        {"name": "muon"},
    ),
    "accumulation": (
        {"n_heads": 4, "n_kv_heads": 2, "positions": "none", "activation": "swiglu",
         "qk_norm": True, "remat": "full"},
        {"accumulation_steps": 2, "global_batch_size": 8, "z_loss": 1e-3},
        {"schedule": "cosine"},
    ),
}  # fmt: skip
STEPS = 10


def variant(name, sizes):
    model, train, optimizer = VARIANTS[name]
    train = {"global_batch_size": 8, "steps": STEPS, **train}
    return small.config(model, train, {"eps": 1e-6, **optimizer}, sizes)


@functools.cache
def losses(name, sizes):
    """Of 10 steps on this mesh."""
    config = variant(name, sizes)
    with small.on_mesh(config):
        state = small.state(config, small.params(config))
        batches = mesh.put_batch(small.batch(config, steps=STEPS), jax.sharding.get_mesh(), 1)
        _, metrics = program(config).chunk(hyper(config), state, batches)
        return np.asarray(metrics["train/loss"])


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("adamw", (2, 2, 2)), ("adamw", (8, 1, 1)), ("adamw", (1, 8, 1)), ("adamw", (1, 1, 8)),
        ("muon", (2, 2, 2)), ("accumulation", (2, 2, 2)),
    ],
)  # fmt: skip
def test_every_mesh_trains_as_one_device_does(name, sizes):
    alone = losses(name, (1, 1, 1))
    assert len(set(alone)) == STEPS
    assert np.abs(losses(name, sizes) - alone).max() < 1e-5


def test_every_mesh_begins_with_the_same_parameters():
    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        config = variant("adamw", sizes)
        with small.on_mesh(config):
            state = program(config).init(hyper(config))
            found.append(reference.flat(jax.device_get(state.params)))
    for path, x in found[0].items():
        assert np.array_equal(found[1][path], x), path


def test_parameters_lie_where_the_rules_say():
    config = small.config({"n_heads": 2}, sizes=(2, 2, 2))
    with small.on_mesh(config):
        state = jax.eval_shape(program(config).init, hyper(config))
    expected = {
        ("embedding",): ("tensor", "fsdp"),
        ("layers", "attention", "query"): (None, "fsdp", "tensor", None),
        ("layers", "attention", "key"): (None, "fsdp", "tensor", None),
        ("layers", "attention", "out"): (None, "tensor", None, "fsdp"),
        ("layers", "feed_forward", "up"): (None, "fsdp", "tensor"),
        ("layers", "feed_forward", "down"): (None, "tensor", "fsdp"),
        ("norm", "gain"): ("fsdp",),
    }
    adam = next(x for x in state.opt_state[1] if hasattr(x, "mu"))
    for tree in (state.params, adam.mu, adam.nu):
        leaves = reference.flat(tree)
        for path, spec in expected.items():
            assert tuple(leaves[path].sharding.spec) == spec, path


# -------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "config, devices, expected",
    [
        (MeshConfig(), 1, (1, 1, 1)),
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(2, 2, 2), 8, (2, 2, 2)),
        (MeshConfig(1, -1, 2), 8, (1, 4, 2)),
        (MeshConfig(2, 1, -1), 6, (2, 1, 3)),
    ],
)
def test_sizes_fill_in_what_is_left(config, devices, expected):
    assert mesh.sizes(config, devices) == expected


@pytest.mark.parametrize(
    "config, said",
    [
        (MeshConfig(3, 1, 1), ["data=3", "8 devices", "1, 2, 4, 8"]),
        (MeshConfig(-1, 3, 1), ["fsdp=3", "8 devices", "1, 2, 4, 8"]),
        (MeshConfig(4, 4, 1), ["data=4", "fsdp=4", "8 devices"]),
        (MeshConfig(2, 2, 1), ["data=2", "8 devices"]),
        (MeshConfig(-1, -1, 1), ["at most one -1"]),
        (MeshConfig(0, 1, 1), ["sizes ≥ 1", "data=0"]),
        (MeshConfig(-2, 1, 1), ["sizes ≥ 1", "data=-2"]),
    ],
)
def test_an_impossible_mesh_is_one_clear_line(config, said):
    with pytest.raises(UserError) as e:
        mesh.sizes(config, 8)
    line = str(e.value)
    assert line.startswith("config.mesh") and "\n" not in line
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    "sizes, model, train, said",
    [
        ((8, 1, 1), {}, {"global_batch_size": 12}, ["global_batch_size", "12", "data", "8 or 16"]),
        (
            (4, 2, 1), {}, {"global_batch_size": 8, "accumulation_steps": 2},
            ["accumulation_steps", "4", "data × fsdp=8", "8"],
        ),
        ((1, 8, 1), {"d_model": 12}, {"global_batch_size": 8}, ["d_model", "fsdp=8", "8 or 16"]),
        ((1, 1, 8), {"n_heads": 4}, {}, ["n_heads", "4", "tensor=8", "8"]),
        ((4, 1, 2), {"n_kv_heads": 1}, {}, ["n_kv_heads", "1", "tensor=2"]),
        ((4, 1, 2), {"d_ff": 15}, {}, ["d_ff", "15", "14 or 16"]),
        ((4, 1, 2), {"vocab_size": 257}, {}, ["vocab_size", "257", "256 or 258"]),
    ],
)  # fmt: skip
def test_a_shape_that_does_not_divide_names_the_nearest_that_does(sizes, model, train, said):
    with pytest.raises(UserError) as e:
        mesh.make(small.config(model, train, sizes=sizes))
    line = str(e.value)
    assert line.startswith("config.") and "\n" not in line
    assert all(part in line for part in said), line


def test_a_batch_is_cut_by_rows():
    config = small.config(train={"global_batch_size": 8}, sizes=(4, 2, 1))
    batch = small.batch(config, steps=3)
    with small.on_mesh(config):
        on_mesh = mesh.put_batch(batch, jax.sharding.get_mesh(), leading=1)
    for array, host in zip(on_mesh, batch, strict=True):
        assert array.dtype == host.dtype and np.array_equal(array, host)
        assert {shard.data.shape for shard in array.addressable_shards} == {(3, 1, 12)}
