"""The published families shrunk: on every mesh alike, experts as a dense computation, attention in
its implementations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small
from flax import nnx

from jaxlm import mesh
from jaxlm.config import ModelConfig
from jaxlm.model import presets, scale, transformer
from jaxlm.model.attention import attend
from jaxlm.model.moe import Experts, router_sums
from jaxlm.model_config import MoE
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import program

OBJECTIVE = {"decoder": "next_token", "encoder": "masked_lm", "encoder_decoder": "span_corruption"}
FAMILIES = {name.rsplit("-", 1)[0]: name for name in presets.names()} | {
    "qwen3 moe": "qwen3-30b-a3b",
    "gemma3 long": "gemma3-27b",
}
FAST = ("t5",)  # mixtures of experts on eight devices: tests/test_parallel.py


def shrunk(model: ModelConfig) -> ModelConfig:
    """A model of the same kind whose dimensions all divide by 2."""
    moe = model.moe
    if moe.n_experts:
        moe = dataclasses.replace(moe, n_experts=4, experts_per_token=2, d_expert=8)
    both = model.architecture == "encoder_decoder"
    return dataclasses.replace(
        model, d_model=8, n_layers=2, n_heads=4, d_head=4, d_ff=8, vocab_size=32, seq_len=12,
        n_kv_heads=2 if model.kv_heads < model.n_heads else None, moe=moe,
        target_len=8 if both else None, rope_fraction=max(model.rope_fraction, 0.5),
        sliding_window=4 if model.sliding_window else None, relative_distance=20,
        global_every=min(model.global_every, 2), dropout=0.1,
    )  # fmt: skip


def trained(model, sizes, steps=1):
    """The loss, the norm of its gradient and what experts report, on this mesh."""
    train = {"global_batch_size": 8, "steps": steps, "objective": OBJECTIVE[model.architecture]}
    config = small.config(vars(model), train, {"eps": 1e-6}, sizes)
    with small.on_mesh(config):
        state = small.state(config, small.params(config))
        batches = mesh.put_batch(small.batch(config, steps=steps), jax.sharding.get_mesh(), 1)
        _, metrics = program(config).chunk(hyper(config), state, batches)
        return {name: np.asarray(x) for name, x in metrics.items()}


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in FAMILIES],
)
def test_a_family_trains_on_eight_devices_as_on_one(family):
    model = shrunk(presets.preset(FAMILIES[family]))
    one, eight = trained(model, (1, 1, 1)), trained(model, (2, 2, 2))
    assert one.keys() == eight.keys() and np.isfinite(one["train/loss"]).all()
    for name, values in one.items():
        np.testing.assert_allclose(eight[name], values, rtol=3e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("normalize", [True, False])
def test_experts_are_a_dense_computation_of_those_chosen(normalize):
    """Every expert on every token in float64, then the chosen ones with the router's weights."""
    moe = MoE(n_experts=4, experts_per_token=2, d_expert=6, normalize_weights=normalize)
    config = small.config({"moe": moe, "activation": "swiglu", "n_layers": 1})
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 12, 8)).astype(np.float32)
    segments = (rng.random((4, 12)) < 0.8).astype(np.int32)
    with small.on_mesh(config):
        weights = small.params(config)["layers"]["experts"]
        weights = {name: w[0] for name, w in weights.items()}
        layer = nnx.eval_shape(lambda: Experts(config.model, rngs=nnx.Rngs(params=0)))
        run = jax.jit(lambda w, x: nnx.merge(nnx.split(layer)[0], w)(x, segments))
        y, counts = run(weights, mesh.put_batch(x, jax.sharding.get_mesh()))
    sums = router_sums(counts)
    p = {name: w.astype(np.float64) for name, w in weights.items()}
    logits = x @ p["router"]
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    gate = np.einsum("btd,edf->btef", x, p["gate"])
    hidden = gate / (1 + np.exp(-gate)) * np.einsum("btd,edf->btef", x, p["up"])
    every = np.einsum("btef,efd->bted", hidden, p["down"])
    chosen = share >= np.sort(share, axis=-1)[..., -2:-1]
    weight = share * chosen
    if normalize:
        weight = weight / weight.sum(-1, keepdims=True)
    want = np.einsum("bte,bted->btd", weight, every)
    assert np.abs(np.asarray(y) - want).max() < 1e-5 * np.abs(want).max()
    # Fedus et al. 2022, eq. 4, and Zoph et al. 2022, eq. 5, over what is no padding.
    real = segments != 0
    load, mean = chosen[real].mean(0) / 2, share[real].mean(0)
    assert float(sums["moe/balance"]) == pytest.approx(4 * (load * mean).sum(), rel=1e-5)
    assert float(sums["moe/max_load"]) == pytest.approx(4 * load.max(), rel=1e-5)
    z = np.log(np.exp(logits[real]).sum(-1)) ** 2
    assert float(sums["moe/router_z"]) == pytest.approx(z.mean(), rel=1e-5)


def dense_through(self, x_btd, weight_btc, expert_btc):
    weight_bte = (jax.nn.one_hot(expert_btc, 4) * weight_btc[..., None]).sum(-2)
    gate = jax.nn.gelu(jnp.einsum("btd,edf->btef", x_btd, self.gate[...]), approximate=True)
    hidden = gate * jnp.einsum("btd,edf->btef", x_btd, self.up[...])
    each = jnp.einsum("bte,btef->btef", weight_bte, hidden)
    layout = mesh.spec(("batch", None, None))
    return jnp.einsum("btef,efd->btd", each, self.down[...], out_sharding=layout)


def test_the_gradient_of_experts_is_the_dense_one(monkeypatch):
    """`ragged_dot`'s against the same computation with one-hot weights, differentiated by jax."""
    moe = MoE(n_experts=4, experts_per_token=2, d_expert=6)
    config = small.config({"moe": moe, "n_layers": 1, "activation": "geglu"})
    batch, found = small.batch(config), []
    with small.on_mesh(config):
        params = small.sharded(config, small.params(config))
        for through in (Experts._through, dense_through):
            monkeypatch.setattr(Experts, "_through", through)

            def loss(params):
                x, _ = transformer.hidden_and_sums(
                    config.model, params, batch.tokens, batch.positions, batch.segment_ids
                )
                return jnp.square(transformer.logits(config.model, params, x)).sum()

            found.append(jax.device_get(jax.jit(jax.grad(loss))(params)))
    small.assert_near(found[0], found[1])


@pytest.mark.parametrize(
    "implementation, asked",
    [
        ("splash", {"window": 20, "soft_cap": 3.0}), ("splash", {"causal": False}),
        ("dot_product", {"window": 20}), ("dot_product", {"causal": False}),
    ],
)  # fmt: skip
def test_every_implementation_of_attention_is_attention(implementation, asked):
    """Values and gradients; splash interpreted."""
    rng, (b, t, h, g, k) = np.random.default_rng(0), (2, 128, 4, 2, 8)
    q, key, value, dy = (
        rng.normal(size=(b, t, heads, k)).astype(np.float32) for heads in (h, g, g, h)
    )
    segments = np.cumsum(rng.random((b, t)) < 0.03, axis=-1).astype(np.int32)
    sizes = (2, 1, 2)
    with small.on_mesh(small.config({"n_heads": 2}, sizes=sizes)):
        heads = jax.NamedSharding(
            jax.sharding.get_mesh(), mesh.spec(("batch", None, "heads", None))
        )
        q, key, value, dy = (jax.device_put(x, heads) for x in (q, key, value, dy))
        segments = mesh.put_batch(segments, jax.sharding.get_mesh())

        def run(implementation):
            def f(q, key, value):
                return attend(
                    q, key, value, segments, segments, implementation=implementation, **asked
                )

            y, back = jax.jit(lambda *x: jax.vjp(f, *x))(q, key, value)
            return [y, *jax.jit(lambda back, dy: back(dy))(back, dy)]

        for mine, want in zip(run(implementation), run("blocks"), strict=True):
            assert np.abs(np.asarray(mine) - np.asarray(want)).max() < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_one_table_says_all_of_every_parameter(family):
    """Shapes as `init` makes them, a spec and a role for each."""
    model = shrunk(presets.preset(FAMILIES[family]))
    rows = reference.flat(transformer.table(model))
    with small.on_mesh(small.config()):
        made = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    assert {k: r.shape for k, r in rows.items()} == {
        k: x.shape for k, x in reference.flat(made).items()
    }
    for row in rows.values():
        assert len(row.axes) == len(row.shape) == len(row.spec)
        assert row.role in ("embedding", "unembedding", "hidden", "gain", "bias")
    assert scale.size(model).flops_per_token > 0
