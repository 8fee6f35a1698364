"""Gradients are summed in float32, over rows and devices, whatever type is multiplied."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from jaxlm import chips, mesh
from jaxlm.config import MeshConfig
from jaxlm.mesh import spec
from jaxlm.model.parts import declare, lookup, plus, times
from jaxlm.planning import aot, target
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import abstract_state, program

BF16 = jnp.bfloat16


def test_gradients_of_bfloat16_products_are_float32_sums():
    """Each within 1e-6 of float64 sums of the very same bfloat16 factors; their own rounding would
    be 4e-3. The first term is 1, the other 8,191 are 2e-3 or less: bfloat16 sums lose them."""
    rng, b, t, d, f = np.random.default_rng(0), 64, 128, 8, 16
    config = small.config({"d_model": 8}, {"global_batch_size": b}, sizes=(2, 4, 1))
    x, dy = rng.random((2, b, t, d)) * 0.04, rng.random((2, b, t, f))[0] * 0.04
    x, table_ids = x[0], rng.integers(0, 4, (b, t)).astype(np.int32)
    x[0, 0], dy[0, 0] = 1.0, 1.0
    x, dy = (np.asarray(jnp.asarray(a, BF16), np.float64) for a in (x, dy))
    with small.on_mesh(config):
        rngs = nnx.Rngs(params=0)
        w = declare(rngs, (d, f), ("d_model", "d_ff"), "hidden", 1.0)
        bias = declare(rngs, (f,), ("d_ff",), "bias", 0.0)
        table = declare(rngs, (4, f), ("vocab", "d_model"), "embedding", 1.0)
        layout = spec(("batch", "seq", None))

        def gradients(values, x, dy, ids):
            def y(values):
                here = [p.replace(v) for p, v in zip((w, bias, table), values, strict=True)]
                y_btf = plus(times("btd,df->btf", x, here[0], layout), here[1])
                return y_btf + lookup(here[2], ids, layout, BF16)

            return jax.vjp(y, values)[1](dy)[0]

        shapes = (("d_model", "d_ff"), ("d_ff",), ("vocab", "d_model"))
        values = [jax.device_put(p[...], jax.NamedSharding(jax.sharding.get_mesh(), spec(axes)))
                  for p, axes in zip((w, bias, table), shapes, strict=True)]  # fmt: skip
        rows = mesh.put_batch((jnp.asarray(x, BF16), jnp.asarray(dy, BF16), table_ids),
                              jax.sharding.get_mesh())  # fmt: skip
        got = jax.device_get(jax.jit(gradients)(values, *rows))
    each = np.stack([dy[table_ids == i].sum(0) for i in range(4)])
    for a, b in zip(got, (np.einsum("btd,btf->df", x, dy), dy.sum((0, 1)), each), strict=True):
        assert a.dtype == np.float32 and np.abs(a / b - 1).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "fsdp": 2}])
def test_a_tpu_reduces_gradients_in_float32(axes):
    """As its compiler says: weights are gathered in bfloat16, and nothing of it is summed."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'jaxlm[tpu]'")
    model = {"d_model": 256, "n_heads": 2, "vocab_size": 1024, "seq_len": 256, "bias": True,
             "compute_dtype": "bfloat16"}  # fmt: skip
    config = small.config(model, {"global_batch_size": 8})
    config = replace(config, mesh=MeshConfig(**{"data": 1, **axes}))
    on = target.target(config, chips.topology("v5e:2x2")).mesh
    with jax.set_mesh(on):
        lowered = program(config).chunk.lower(
            hyper(config), abstract_state(config, hyper(config)), aot.abstract_batch(config, on)
        )
        text = lowered.compile().as_text()
    sums = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", text)
    assert any("f32[256,1024]" in s for s in sums) and not [s for s in sums if "bf16" in s]
    assert ("fsdp" not in axes) or re.search(r"bf16\[[^=]* all-gather", text)
