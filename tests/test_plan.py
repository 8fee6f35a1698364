"""A plan against what can be counted by hand, measured on this machine, or told by a compiler."""

import json
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from aot_rows import ROWS
from faults import start
from jax import P

from jaxlm import api, chips, main, mesh, xla
from jaxlm.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxlm.experiment import load
from jaxlm.model import kernels
from jaxlm.model.presets import preset
from jaxlm.model.scale import size
from jaxlm.planning import analysis, aot, hlo, roofline, search, steps, target, wall
from jaxlm.planning.hlo import Collective
from jaxlm.scaling import lint
from jaxlm.schema import UserError

AOT = Path(__file__).parents[1] / "docs" / "results"
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


SLICES = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %room = f32[32]{0} broadcast(%zero)
  %send = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = f32[32]{0} ragged-all-to-all(%x, %room, %a, %b, %c, %d), channel_id=4, replica_groups=[4,2]<=[8]
  %host = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=5, is_host_transfer=true
}
"""  # noqa: E501


def test_what_goes_between_slices_and_to_experts_is_counted():
    found = hlo.collectives(SLICES, {"data": 2, "fsdp": 2, "tensor": 2})
    assert found == (
        Collective("all-reduce", ("slices",), 1, 32),
        Collective("all-to-all", ("tensor",), 1, 32),
    )


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


def test_a_price_list_is_read_and_named_with_the_plan(tmp_path):
    path = tmp_path / "prices.json"
    listed = {"format": "jaxlm.prices/1", "date": "2026-11-01", "source": "a contract",
              "usd_per_chip_hour": {"h100": 3.5, "a100": -1}}  # fmt: skip
    path.write_text(json.dumps(listed))
    found = api.plan(TINY, topology="h100:4", prices=path)
    told = {"prices": {"date": "2026-11-01", "source": "a contract"}}
    assert found["stated"] == {"mfu": 0.4, "price_per_chip_hour": 3.5, **told}
    [step] = found["steps"]
    assert step["price"] == pytest.approx(3.5 * 4 * step["hours"])
    for topology, more, said in (
        ("h200:4", {}, "no 'h200'; did you mean 'h100'"),
        ("a100:4", {}, "a100: expected USD, got -1"),
        ("h100:4", {"price": 2.0}, "--prices: .* no --price"),
        ("", {}, "--prices: expected a --topology"),
    ):
        with pytest.raises(UserError, match=said):
            api.plan(TINY, topology=topology, prices=path, **more)
    path.write_text(json.dumps({**listed, "usd_per_chip_hour": 3.5}))
    with pytest.raises(UserError, match=r"usd_per_chip_hour: expected \{chip: USD\}, got 3.5"):
        api.plan(TINY, topology="h100:4", prices=path)
    path.write_text(json.dumps({**listed, "date": ""}))
    with pytest.raises(UserError, match="expected 'date'"):
        api.plan(TINY, topology="h100:4", prices=path)


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


def test_where_only_the_state_is_too_much_it_is_advised_to_offload():
    config = ROWS["llama8b-8"][0]
    config = replace(config, model=replace(config.model, seq_len=1024))
    topology = chips.topology("v5e:2x4")
    [line] = search.advice(config, topology)
    assert line.startswith("config.optimizer.offload=True: about ")
    config = replace(config, optimizer=replace(config.optimizer, offload=True))
    assert search.memory_gib(config, topology) < topology.chip.hbm_gib


@pytest.mark.parametrize("name", ROWS)
def test_what_is_reckoned_is_near_what_a_compiler_found(name):
    """The rows of docs/results/aot.md: state to 1 %, what lives within a step to 35 %."""
    rows = json.loads((AOT / "aot.json").read_text())["rows"]
    if name not in rows:
        pytest.skip("not in the table")
    [step], config = rows[name]["steps"], ROWS[name][0]
    shape, memory = {**dict.fromkeys(mesh.AXES, 1), **step["mesh"]}, step["memory_gib"]
    if memory is None:
        gib = analysis.state_bytes(config, shape) / 2**30 + analysis.temporaries_gib(config, shape)
        assert gib > step["hbm_limit_gib"]
        return
    host = analysis.host_bytes(config, shape) / 2**30
    assert host == pytest.approx(memory.get("host", 0.0), rel=0.01)
    state = analysis.state_bytes(config, shape) / 2**30
    assert state - host == pytest.approx(memory["arguments"], rel=0.01)
    reckoned = analysis.temporaries_gib(config, shape)
    assert reckoned == pytest.approx(memory["temporaries"], rel=0.35)


def test_wires_and_groups():
    on = target.target(replace(TINY, mesh=MeshConfig(2, 4, 2)), chips.topology("h100:8", slices=2))
    assert on.crossed(("data",)) == (1, 2, 0)  # across the two nodes
    assert on.crossed(("fsdp",))[:2] == (4, 1)
    assert on.crossed(("data", "tensor"))[:2] == (2, 2)
    gather = Collective("all-gather", ("fsdp",), 1, 8e9)
    assert gather.moved(4) == 6e9 and replace(gather, kind="all-reduce").moved(4) == 12e9
    assert gather.moved(1) == 0


def test_wires_bind_where_the_scaling_book_says():
    """Austin et al. 2025, part 5: fsdp over all axes of a torus binds below C / W / axes tokens per
    chip. Here gradients are float32 (8 bytes a parameter, not 6) and remat repeats a third of 6
    FLOPs (8, not 6), which leaves the threshold where it was."""
    chip = chips.CHIPS["v5p"]
    threshold = chip.flops_per_s / (2 * chip.link_bytes_per_s) / 3
    model = replace(preset("gpt3-175b"), vocab_size=50304, remat="full")
    config = Config(
        model=model, train=TrainConfig(global_batch_size=2048), mesh=MeshConfig(1, -1, 1)
    )
    on = target.reckoned(config, chips.topology("v5p:8x16x16"))
    moved = analysis.collectives(config, on.shape)
    found = roofline.roofline(config, on, moved, 0.0)
    ratio = found.network_s["fsdp"] / found.compute_s
    assert ratio == pytest.approx(threshold / model.seq_len, rel=0.05)


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
    text = """
from jaxlm.config import *

def get_config():
    model = ModelConfig(d_model=8, n_layers=2, n_heads=2, vocab_size=16, seq_len=12)
    return Config(model=model, train=TrainConfig(global_batch_size=8, steps=100))
"""
    (tmp_path / "x.py").write_text(text)
    config = load(tmp_path / "x.py")
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


def test_a_search_takes_what_fits_and_moves_least():
    topology = chips.topology("h100:8")
    busy = replace(TINY.train, global_batch_size=4096)  # so that activations outweigh weights
    best = search.ranked(replace(TINY, train=busy), topology)[0].config
    assert best.mesh.tensor == best.train.accumulation_steps == 1
    large = replace(preset("llama2-13b"), remat="none")  # 156 GB of state: no copy of it fits
    config = Config(model=large, train=TrainConfig(global_batch_size=32), mesh=MeshConfig(-1, 1, 1))
    found = search.ranked(config, topology)
    assert found and all(c.config.mesh.data < 8 and c.gib <= 80 for c in found)
    serial = [c.roofline.serial_s for c in found]
    assert serial == sorted(serial, key=lambda s: float(f"{s:.3g}"))


def test_a_sweeps_time_is_a_schedule_of_its_runs():
    assert wall._makespan([3.0, 5.0, 3.0], 2) == 6.0 and wall._makespan([2.0] * 4, 4) == 2.0
    train = TrainConfig(global_batch_size=8, steps=10)
    one, two, four = (
        small.config({"d_model": 16 * n, "n_heads": 2}, {"global_batch_size": 8}) for n in (1, 2, 4)
    )
    ends = [wall.Speed(wall.flops_per_step(c), s, b) for c, s, b in ((one, 1, 2.0), (four, 9, 4.0))]
    between = wall._seconds(two, 10, ends)
    share = (ends[0].flops - wall.flops_per_step(two)) / (ends[0].flops - ends[1].flops)
    assert between == pytest.approx(10 * (1 + 8 * share) + 2 + 2 * share)
    often = replace(one, train=replace(train, eval_every=5))
    assert wall._seconds(often, 10, ends) == 10 * 1 + 2 * 2.0
    assert [c.model.d_model for c in wall._spread([four, one, two, one])] == [16, 32, 64]


def test_the_ladder_for_a_pod_slice_lints_and_has_a_bill():
    """Every run's time is its FLOPs, as N and D give them, over what 256 GPUs do at 40 %; reckoned,
    since no compiler is needed to see that it would run."""
    sweep = load(Path(__file__).parents[1] / "experiments" / "scaling_tpu.py")
    found = lint.lint(sweep)
    assert [w for w in found.warnings if "a far bet" not in w] == []
    assert sweep.holdout_flops / max(r.flops for r in found.rows if r.role != "holdout") >= 10
    plan = api.plan(sweep, topology="h100:8", slices=32, price=2.0)
    assert all(step["fits"] for step in plan["steps"])
    flops = sum(6 * r.params_effective * r.tokens for r in found.rows)
    chips_hours = sum(step["hours"] for step in plan["steps"]) * 256
    expected = flops / (0.4 * chips.topology("h100:8").chip.flops_per_s) / 3600
    assert chips_hours == pytest.approx(expected, rel=1e-6)
    assert sum(step["price"] for step in plan["steps"]) == pytest.approx(2 * expected, rel=1e-6)


def test_the_presets_of_chips_are_options_of_their_compiler():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'jaxlm[tpu]'")
    for name, options in xla.PRESETS.items():
        shape = {2: "2x2", 3: "2x2x1"}[chips.CHIPS[name].axes]
        on = target.target(
            replace(TINY, mesh=MeshConfig(-1, 1, 1)), chips.topology(f"{name}:{shape}")
        )
        one = jax.sharding.SingleDeviceSharding(on.mesh.devices.flat[0])
        lowered = jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=one))
        assert xla.options("chip", on.mesh.devices.flat[0].device_kind) == options
        lowered.compile(compiler_options=options)
        with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
            lowered.compile(compiler_options={"xla_tpu_no_such_option": "true"})
    assert xla.options("chip", "cpu") == xla.options("none", "TPU v4") == {}


def test_tiles_of_attention_divide_what_they_tile():
    for chip in chips.CHIPS.values():
        for t in range(kernels.BLOCK, 8193, kernels.BLOCK):
            tile = kernels.tile(t, chip.kind)
            assert t % tile == 0 and tile % kernels.BLOCK == 0 and tile <= 1024


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", xla.PRESETS)
def test_a_step_compiles_with_its_chips_options_and_tiles(name, stage):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'jaxlm[tpu]'")
    shape = {2: "2x2", 3: "2x2x1"}[chips.CHIPS[name].axes]
    config = replace(
        TINY,
        model=replace(TINY.model, seq_len=2048),  # two tiles of v6e, four of v5e
        train=replace(TINY.train, xla_preset="chip"),
        mesh=MeshConfig(-1, 2, 1, stage=stage),
    )
    on = target.target(config, chips.topology(f"{name}:{shape}"))
    made = aot.compiled(config, on.mesh)
    assert made.fits and "tpu_custom_call" in made.run.as_text()  # splash


PEAK = """
    import json, resource, sys
    import jax, numpy as np
    from jaxlm import mesh
    from jaxlm.config import *
    from jaxlm.planning import aot
    from jaxlm.train.optimizer import hyper
    from jaxlm.train.step import program

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

    config = Config(
        model=ModelConfig(d_model=512, n_layers=6, n_heads=8, vocab_size=8192, seq_len=256),
        train=TrainConfig(global_batch_size=16, steps=4), mesh=MeshConfig(1, 1, 1),
    )
    on = mesh.make(config)
    planned = aot.compiled(config, on).memory
    with jax.set_mesh(on):
        run, numbers = program(config), hyper(config)
        shapes = aot.abstract_batch(config, on)
        batch = jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)
        run.chunk.lower(numbers, jax.eval_shape(run.init, numbers), shapes).compile()
        before = resident()
        state = run.init(numbers)
        for _ in range(3):
            state, _ = jax.block_until_ready(run.chunk(numbers, state, batch))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"planned": (planned.arguments + planned.temporaries) * 2**30,
                      "real": peak - before}))
"""


@pytest.mark.slow
def test_planned_memory_is_what_a_process_takes():
    """Within a quarter: the allocator and the threads' scratch are not planned."""
    child = start(PEAK, env={"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"})
    out, err = child.communicate()
    assert child.returncode == 0, err
    found = json.loads(out)
    assert found["real"] == pytest.approx(found["planned"], rel=0.25), found


@pytest.mark.slow
def test_the_quickstart_takes_as_long_as_planned(tmp_path):
    """Needs a machine that does nothing else."""
    sweep = load("experiments/quickstart.py")
    told = api.plan(sweep, tmp_path / "sweep")["wall"]["seconds"]
    began = time.monotonic()
    api.sweep(sweep, tmp_path / "sweep", say=lambda line: None)
    assert told == pytest.approx(time.monotonic() - began, rel=0.25)
