"""The same losses on every mesh, and one clear line for a mesh that cannot be."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import reference
import small

from jaxlm import mesh
from jaxlm.config import MeshConfig
from jaxlm.model_config import MoE
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
        pytest.param("muon", (2, 2, 2), marks=pytest.mark.slow), ("accumulation", (2, 2, 2)),
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
        (MeshConfig(), 1, {}),
        (MeshConfig(), 8, {"data": 8}),
        (MeshConfig(2, 2, 2), 8, {"data": 2, "fsdp": 2, "tensor": 2}),
        (MeshConfig(1, -1, 2), 8, {"fsdp": 4, "tensor": 2}),
        (MeshConfig(2, 1, -1), 6, {"data": 2, "tensor": 3}),
        (MeshConfig(1, context=2, expert=-1, stage=2), 8, {"context": 2, "expert": 2, "stage": 2}),
    ],
)
def test_sizes_fill_in_what_is_left(config, devices, expected):
    found = dict(zip(mesh.AXES, mesh.sizes(config, devices), strict=True))
    assert {axis: n for axis, n in found.items() if n > 1} == expected


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
            ["accumulation_steps", "4", "data × fsdp × expert=8", "8"],
        ),
        (
            (1, 8, 1), {"d_model": 12}, {"global_batch_size": 8},
            ["d_model", "fsdp × stage × context=8", "8 or 16"],
        ),
        ((1, 1, 1, 8), {"seq_len": 24}, {}, ["seq_len", "24", "context", "=16", "16 or 32"]),
        ((1, 1, 1, 1, 1, 8), {"n_layers": 6}, {}, ["n_layers", "6", "stage", "=8", "8"]),
        (
            (2, 1, 1, 1, 4), {"moe": MoE(n_experts=6)}, {"global_batch_size": 8},
            ["n_experts", "6", "expert=4", "4 or 8"],
        ),
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
    near = line.partition("nearest: ")[2].split(" or ")
    assert len(set(near)) == len(near), line


def test_a_batch_is_cut_by_rows():
    config = small.config(train={"global_batch_size": 8}, sizes=(4, 2, 1))
    batch = small.batch(config, steps=3)
    with small.on_mesh(config):
        on_mesh = mesh.put_batch(batch, jax.sharding.get_mesh(), leading=1)
    for array, host in zip(on_mesh, batch, strict=True):
        assert array.dtype == host.dtype and np.array_equal(array, host)
        assert {shard.data.shape for shard in array.addressable_shards} == {(3, 1, 12)}


def test_for_reading_the_same_devices_have_neither_stages_nor_pieces_of_sequences():
    config = small.config({"d_model": 8, "seq_len": 16}, sizes=(1, 1, 2, 2, 1, 2))
    training = mesh.make(config, jax.devices())
    reading = mesh.for_reading(training)
    assert {a: n for a, n in reading.shape.items() if n > 1} == {"fsdp": 4, "tensor": 2}
    assert list(reading.devices.flat) == list(training.devices.flat)


def test_data_goes_over_slices_first():
    """What two TPU slices are: devices that know their slice and where they are in it."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        slice_index: int
        process_index: int = 0
        platform: str = "cpu"
        device_kind: str = "cpu"

    devices = [Device(i, i % 2) for i in range(8)]
    config = small.config(train={"global_batch_size": 8}, sizes=(4, 2, 1))
    found = mesh.grid(mesh.sizes(config.mesh, 8), devices)
    assert [[d.slice_index for d in row] for row in found.reshape(4, 2)] == [
        [0, 0], [0, 0], [1, 1], [1, 1]
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"config\.mesh\.data: expected a multiple of 2 slices"):
        mesh.grid((1, 1, 1, 8, 1, 1), devices)
