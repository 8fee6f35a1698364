"""A plan against what can be counted by hand, measured on this machine, or told by a compiler."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax import P

from jaxlm import api, chips, main
from jaxlm.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxlm.model.scale import size
from jaxlm.planning import analysis, hlo, steps, target
from jaxlm.planning.hlo import Collective
from jaxlm.schema import UserError

TINY = Config(
    name="tiny",
    model=ModelConfig(d_model=256, n_layers=2, n_heads=2, vocab_size=256, seq_len=64),
    train=TrainConfig(global_batch_size=8, steps=1000),
    mesh=MeshConfig(data=1, fsdp=2, tensor=2),
)


def test_collectives_are_counted_as_often_as_loops_turn():
    devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
    grid = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))

    def local(x):  # [4, 16] of float32 on each device: 256 bytes
        def turn(x, _):
            gathered = jax.lax.all_gather(x, "fsdp")  # 512 bytes
            around = jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])  # 256 bytes
            return jax.lax.psum(x, ("data", "tensor")) + gathered.sum(0) + around, None

        x, _ = jax.lax.scan(turn, x, length=5)
        return jax.lax.psum_scatter(x, "data", tiled=True)

    spec = P(("data", "fsdp", "tensor"))
    f = jax.jit(jax.shard_map(local, mesh=grid, in_specs=spec, out_specs=spec, check_vma=False))
    text = f.lower(jax.ShapeDtypeStruct((32, 16), jnp.float32)).compile().as_text()
    found = hlo.collectives(text, {"data": 2, "fsdp": 2, "tensor": 2})
    assert {(c.kind, c.axes): (c.count, c.bytes) for c in found} == {
        ("all-reduce", ("data", "tensor")): (5, 5 * 256),
        ("all-gather", ("fsdp",)): (5, 5 * 512),
        ("collective-permute", ("tensor",)): (5, 5 * 256),
        ("reduce-scatter", ("data",)): (1, 256),
    }


def test_groups_are_read_in_each_of_their_forms():
    def axes(text):
        line = hlo._Line("x", "all-reduce", "f32[4]", text)
        return hlo._axes(hlo._group(line, 8), {"data": 2, "fsdp": 2, "tensor": 2})

    assert axes("replica_groups={{0,4},{1,5}}") == ("data",)
    assert axes("replica_groups=[4,2]<=[8]") == ("tensor",)
    assert axes("replica_groups=[4,2]<=[2,2,2]T(0,2,1)") == ("fsdp",)
    assert axes("replica_groups=mesh['a'=2,'b'=4] {'b'}") == ("fsdp", "tensor")
    permuted = "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}"
    assert axes(permuted) == ("data",)
    assert axes("source_target_pairs={{0,2},{2,0}}") == ("fsdp",)


def test_a_tpus_compiler_is_asked():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'jaxlm[tpu]'")
    found = api.plan(TINY, topology="v5e:2x2", price=1.2)
    [step] = found["steps"]
    assert step["fits"] and step["told_by"] == "compiler"
    state = 12 * size(TINY.model).params / 4  # float32, two moments; norms are cut in two only
    assert step["memory_gib"]["arguments"] * 2**30 == pytest.approx(state, rel=0.03)
    kinds = {(c["kind"], tuple(c["axes"])): c for c in step["collectives"]}
    gathered = kinds["all-gather", ("fsdp",)]["bytes"]
    on = target.target(TINY, chips.topology("v5e:2x2"))
    expected = {(c.kind, c.axes): c for c in analysis.collectives(TINY, on.shape)}
    assert gathered == pytest.approx(expected["all-gather", ("fsdp",)].bytes, rel=0.25)
    assert ("all-reduce", ("tensor",)) in kinds
    chip_s = step["flops_per_step"] * TINY.train.steps / (197e12 * step["mfu"])
    assert step["hours"] == pytest.approx(chip_s / 4 / 3600)
    assert step["price"] == pytest.approx(1.2 * chip_s / 3600)


def test_what_does_not_fit_says_what_to_change():
    large = replace(
        TINY,
        model=replace(TINY.model, vocab_size=32768, seq_len=4096),
        train=replace(TINY.train, global_batch_size=256),
    )
    topology = chips.topology("h100:4")
    step = steps.plan_step([large], topology, 0.4, None)
    assert not step.fits and "of 80 GiB" in step.refused
    assert any("accumulation_steps=" in line for line in step.advice)
    parts = next(int(x.split("=")[-1].split(":")[0]) for x in step.advice if "accumulation" in x)
    smaller = replace(large, train=replace(large.train, accumulation_steps=parts))
    assert steps.plan_step([smaller], topology, 0.4, None).fits
    with pytest.raises(UserError, match=r"n_heads: 2 does not divide by mesh tensor=4"):
        steps.plan_step([replace(TINY, mesh=MeshConfig(1, 1, 4))], topology, 0.4, None)
    huge = replace(large, model=replace(large.model, n_layers=30_000))
    assert "more chips" in steps.plan_step([huge], topology, 0.4, None).advice[0]


def test_wires_and_groups():
    on = target.target(replace(TINY, mesh=MeshConfig(2, 4, 2)), chips.topology("h100:8", slices=2))
    assert on.crossed(("data",)) == (1, 2, 0)  # across the two nodes
    assert on.crossed(("fsdp",))[:2] == (4, 1)
    assert on.crossed(("data", "tensor"))[:2] == (2, 2)
    gather = Collective("all-gather", ("fsdp",), 1, 8e9)
    assert gather.moved(4) == 6e9 and replace(gather, kind="all-reduce").moved(4) == 12e9
    assert gather.moved(1) == 0


@pytest.mark.parametrize(
    "text, slices, message",
    [
        ("v7:2x2", 1, "no chip 'v7'"),
        ("v5p:8x8", 1, "3 axes, as in v5p:4x4x4"),
        ("v5p-512", 1, "no chip 'v5p-512'; did you mean 'v5p'"),
        ("h100:32", 1, "h100:8 with --slices=4"),
    ],
)
def test_topologies_that_are_none(text, slices, message):
    with pytest.raises(UserError, match=message):
        chips.topology(text, slices)


def test_the_plan_of_a_run_here(tmp_path, capsys):
    """The compiler's memory is the state's and the batch's; time is measured."""
    config = small.config(sizes=(8, 1, 1), train={"global_batch_size": 8, "steps": 100})
    (tmp_path / "x.py").write_text(
        "from jaxlm.config import *\nfrom jaxlm.model_config import *\n"
        f"def get_config():\n    return {config!r}\n"
    )
    with small.compiled_quickly():
        code = main.run(["plan", f"--config={tmp_path / 'x.py'}", "--json",
                         f"--workdir={tmp_path / 'out'}"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and json.loads((tmp_path / "out" / "plan.json").read_text()) == found
    [step] = found["steps"]
    batch = 5 * 4 * config.model.seq_len  # of one of the 8 rows
    state = 12 * size(config.model).params
    assert step["memory_gib"]["arguments"] * 2**30 == pytest.approx(state + batch, rel=0.05)
    for name in ("params", "flops_per_step", "hbm_limit_gib", "collectives", "compile_s",
                 "mfu_bound", "hours", "price", "fits"):  # fmt: skip
        assert name in step
    assert 0 < step["hours"] < 1 and found["epochs"] is None


def test_muon_and_experts_are_reckoned_too():
    config = replace(
        TINY,
        optimizer=OptimizerConfig(name="muon"),
        model=replace(TINY.model, moe=replace(TINY.model.moe, n_experts=4)),
    )
    step = steps.plan_step([config], chips.topology("a100:4"), 0.3, 2.0)
    assert step.fits and step.mfu_bound <= 1 and step.price > 0
