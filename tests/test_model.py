"""The decoder against a float64 reference, and what must not flow: the future, other documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from jaxlm.model import transformer
from jaxlm.model.attention import attend
from jaxlm.train import losses

VARIANTS = {
    "plain": {},
    "gpt2": {"norm": "layernorm", "positions": "learned", "bias": True, "scan_layers": False},
    "llama": {"activation": "swiglu", "n_heads": 4, "n_kv_heads": 2, "tie_embeddings": False},
    "qwen3": {"activation": "swiglu", "n_kv_heads": 1, "d_head": 6, "qk_norm": True},
    "no positions": {"norm": "layernorm", "positions": "none", "d_ff": 12, "remat": "dots"},
    "layernorm on queries": {
        "norm": "layernorm", "bias": True, "qk_norm": True, "activation": "swiglu",
        "positions": "learned", "tie_embeddings": False, "remat": "full", "scan_layers": False,
    },
    "mup tied": {"parametrization": "mup", "base_d_model": 2, "rope_theta": 100.0},
    "mup untied": {"parametrization": "mup", "tie_embeddings": False, "bias": True},
    "gpt-neox": {
        "norm": "layernorm", "bias": True, "parallel_residual": True, "rope_fraction": 0.5,
        "activation": "gelu_exact", "tie_embeddings": False,
    },
    "gemma 2": {
        "norm_placement": "both", "activation": "geglu", "scale_embeddings": True, "n_layers": 3,
        "sliding_window": 4, "global_every": 2, "attention_soft_cap": 2.0, "final_soft_cap": 5.0,
        "attention_scale": 0.3,
    },
    "gemma 3, unrolled": {
        "norm_placement": "both", "qk_norm": True, "n_layers": 3, "sliding_window": 4,
        "global_every": 3, "local_rope_theta": 10.0, "scan_layers": False, "activation": "relu2",
    },
    "olmo 2": {
        "norm_placement": "output", "qk_norm": True, "qk_norm_over": "projection", "n_heads": 4,
        "n_kv_heads": 2, "activation": "relu", "sliding_window": 3,
    },
    "several blocks of queries": {"seq_len": 150, "d_model": 4, "n_layers": 1, "d_ff": 4},
}  # fmt: skip


def loss_and_gradients(config, params, batch):
    """jaxlm's loss, logits and gradients on the current mesh, as the train step takes them."""

    def loss(params):
        total = jnp.maximum(batch.weights.sum(), 1.0)
        summed, _ = losses.next_token(config, params, batch, jax.random.key(0))
        x_btd = transformer.hidden(
            config.model, params, batch.tokens, batch.positions, batch.segment_ids
        )
        return summed / total, transformer.logits(config.model, params, x_btd)

    batch = jax.tree.map(jnp.asarray, batch)
    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, logits, grads


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_logits_and_gradients_are_those_of_the_float64_reference(name):
    config = small.config(VARIANTS[name], {"z_loss": 0.01 if name == "qwen3" else 0.0})
    batch = small.batch(config)
    with small.on_mesh(config):
        params = small.params(config)
        loss, logits, grads = loss_and_gradients(config, small.sharded(config, params), batch)
    want = reference.loss_and_gradients(config.model, params, batch, config.train.z_loss)
    assert float(loss) == pytest.approx(want[0], rel=1e-6)
    small.assert_near({"logits": logits}, {"logits": want[1]}, rel=5e-6)
    small.assert_near(grads, want[2])


@pytest.mark.parametrize(
    "name",
    ["gpt2", "llama", "qwen3", "layernorm on queries", "mup tied", "gpt-neox", "gemma 2", "olmo 2"],
)
def test_the_reference_has_the_gradients_of_its_own_loss(name):
    """Central differences of the reference's loss along random directions."""
    config = small.config(VARIANTS[name])
    batch, rng = small.batch(config), np.random.default_rng(1)
    with small.on_mesh(config):
        params = reference.flat(reference.to_float64(small.params(config)))

    def loss_and_gradients(params):
        return reference.loss_and_gradients(config.model, reference.unflat(params), batch, 0.01)

    grads = reference.flat(loss_and_gradients(params)[2])
    for path, x in params.items():
        step = 1e-5 * rng.normal(size=x.shape)
        up, down = (loss_and_gradients({**params, path: x + s})[0] for s in (step, -step))
        along = (grads[path] * step).sum()
        assert (up - down) / 2 == pytest.approx(along, rel=1e-6, abs=1e-13), path


def test_unrolling_and_recomputing_change_nothing():
    config = small.config(VARIANTS["llama"])
    batch, results = small.batch(config), []
    with small.on_mesh(config):
        params = small.sharded(config, small.params(config))
        for scan_layers, remat in [(True, "none"), (False, "full")]:
            model = dataclasses.replace(config.model, scan_layers=scan_layers, remat=remat)
            results.append(
                loss_and_gradients(dataclasses.replace(config, model=model), params, batch)
            )
    (loss, _, grads), (loss_unrolled, _, grads_unrolled) = results
    assert float(loss_unrolled) == pytest.approx(float(loss), rel=1e-6)
    small.assert_near(grads_unrolled, grads, rel=5e-6)


def test_bfloat16_computes_the_same_function_roughly_and_returns_float32():
    config = small.config({"compute_dtype": "bfloat16"})
    batch = small.batch(config)
    with small.on_mesh(config):
        params = small.params(config)
        apply = jax.jit(lambda *x: transformer.apply(config.model, *x))
        logits = apply(
            small.sharded(config, params), batch.tokens, batch.positions, batch.segment_ids
        )
    _, want, _ = reference.loss_and_gradients(config.model, params, batch)
    assert logits.dtype == jnp.float32
    error = np.sqrt(np.mean((logits - want) ** 2)) / np.abs(want).max()
    assert 1e-4 < error < 0.005  # bfloat16 has 8 bits; the largest error alone is a lottery


# --------------------------------------------------------------------------- what must not flow


@pytest.mark.parametrize("name", ["plain", "layernorm on queries"])
def test_no_gradient_from_the_future_or_another_document_or_row(name):
    """d logits / d input embedding, exactly zero where there is nothing to see and nowhere else.

    All tokens differ and the output is untied, so a row of the table is one input embedding.
    """
    config = small.config({**VARIANTS[name], "tie_embeddings": False, "vocab_size": 48})
    batch = small.batch(config)
    b, t = batch.tokens.shape
    tokens = np.random.default_rng(0).permutation(b * t).reshape(b, t).astype(np.int32)
    with small.on_mesh(config):
        params = small.sharded(config, small.params(config))
        probe = jnp.asarray(np.random.default_rng(1).normal(size=(b, t, 48)), jnp.float32)

        def outputs(table):
            logits = transformer.apply(
                config.model, {**params, "embedding": table}, jnp.asarray(tokens),
                jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids),
            )  # fmt: skip
            return (logits * probe).sum(-1)

        jacobian = np.asarray(jax.jit(jax.jacrev(outputs))(params["embedding"]))
    flows = (jacobian[:, :, tokens] != 0).any(-1)  # [b, t] of the output, [b, t] of the input
    row, time = np.arange(b), np.arange(t)
    segment = batch.segment_ids
    allowed = (
        (row[:, None, None, None] == row[:, None])
        & (time[:, None, None] >= time)
        & (segment[:, :, None, None] == segment)
    )
    assert np.array_equal(flows, allowed)
    assert 0.1 < allowed[0, :, 0].mean() < 0.9  # several documents in a row


def test_attention_in_blocks_is_attention(t=7, block=3):
    """Values and gradients, grouped queries and packed documents, against the reference."""
    config, rng = small.config(), np.random.default_rng(t)
    shapes = [(2, t, 4, 6), (2, t, 2, 6), (2, t, 2, 6), (2, t, 4, 6)]
    q, k, v, dy = (rng.normal(size=s).astype(np.float32) for s in shapes)
    segments = np.cumsum(rng.random((2, t)) < 0.3, axis=-1).astype(np.int32)

    def in_blocks(q, k, v):
        return attend(q, k, v, jnp.asarray(segments), jnp.asarray(segments), block=block)

    with small.on_mesh(config):
        y, back = jax.jit(lambda *x: jax.vjp(in_blocks, *x))(q, k, v)
        got = [y, *back(dy)]
    want, back = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), segments)
    for mine, theirs in zip(got, [want, *back(dy.astype(np.float64))], strict=True):
        assert np.abs(np.asarray(mine) - theirs).max() < 3e-6


# ------------------------------------------------------------------------------- parameters


def test_init_draws_what_the_table_declares():
    config = small.config({"d_model": 32, "d_ff": 64, "bias": True, "norm": "layernorm"})
    with small.on_mesh(config):
        make = jax.jit(lambda seed: transformer.init(config.model, jax.random.key(seed)))
        params, other = reference.flat(make(0)), reference.flat(make(1))
    table = reference.flat(transformer.table(config.model))
    assert params.keys() == table.keys()
    for path, x in params.items():
        assert x.shape == table[path].shape and x.dtype == jnp.float32
        role = table[path].role
        if role in ("gain", "bias"):
            assert np.array_equal(x, np.full(x.shape, float(role == "gain")))
        else:
            assert np.std(x) == pytest.approx(table[path].std, rel=0.1)
            assert abs(np.mean(x)) < 0.1 * table[path].std
            assert not np.array_equal(x, other[path])
    query = params["layers", "attention", "query"]
    assert np.std(query) == pytest.approx(32**-0.5, rel=0.1)
    assert not np.array_equal(query[0], query[1])
    # GPT-2 (Radford et al. 2019, §2.3): residual outputs shrink by 1/√(residual layers).
    down = params["layers", "feed_forward", "down"]
    assert np.std(down) == pytest.approx(64**-0.5 / 4**0.5, rel=0.1)
