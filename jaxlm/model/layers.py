"""The layers, defined with Flax NNX and declared once.

Every parameter is an `nnx.Param` with its logical axes, role and initial scale as metadata;
`model.transformer.table` reads them back, and sharding, counts, weight decay and learning-rate
multipliers all come from there. Shape suffixes: b batch, t query time, s key time, d d_model,
h heads, g kv heads, r heads per kv head, k head dim, f d_ff, v vocab, l layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.mesh import spec
from jaxlm.model.attention import attend, rotate

Cache = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, [b, s, g, k] each."""


class Context(NamedTuple):
    """What every block sees besides its input."""

    positions_bt: jax.Array  # int32, restarting at each document
    segments_bt: jax.Array  # int32, the document of each query; 0 is padding
    segments_bs: jax.Array  # int32, the document of each key
    offset: jax.Array | int  # slot of the first query among the keys (0 but in cached decoding)
    rope: tuple[jax.Array, jax.Array] | None  # cos, sin [b, t, 1, k/2]


def declare(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], role: str, std: float
) -> nnx.Param:
    """A float32 parameter: N(0, std²), or ones for role 'gain', zeros for 'bias' or std 0.

    Roles: embedding, unembedding, hidden (matrices: decay, Muon, 1/width in muP), gain, bias.
    """
    if role == "gain":
        value = jnp.ones(shape, jnp.float32)
    elif std == 0.0:
        value = jnp.zeros(shape, jnp.float32)
    else:
        value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes, role=role, std=std)


def use(param: nnx.Param, like: jax.Array) -> jax.Array:
    """The parameter as a matmul wants it: gathered over fsdp, in the type of `like`."""
    axes = param.get_metadata()["axes"]
    return jax.reshard(param[...].astype(like.dtype), spec(axes, gathered=True))


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016), in float32."""

    def __init__(self, width: int, axis: str, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.centred = config.norm == "layernorm"
        self.gain = declare(rngs, (width,), (axis,), "gain", 1.0)
        bias = config.bias and self.centred
        self.bias = declare(rngs, (width,), (axis,), "bias", 0.0) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.centred:
            x32 = x32 - x32.mean(-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-5)
        y = y * use(self.gain, y)
        if self.bias is not None:
            y = y + use(self.bias, y)
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head or grouped-query causal attention within documents."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        d, h, g, k = config.d_model, config.n_heads, config.kv_heads, config.head_dim
        out_std = (h * k) ** -0.5 / (2 * config.n_layers) ** 0.5  # GPT-2's residual scaling
        self.query = declare(rngs, (d, h, k), ("d_model", "heads", "d_head"), "hidden", d**-0.5)
        self.key = declare(rngs, (d, g, k), ("d_model", "kv_heads", "d_head"), "hidden", d**-0.5)
        self.value = declare(rngs, (d, g, k), ("d_model", "kv_heads", "d_head"), "hidden", d**-0.5)
        self.out = declare(rngs, (h, k, d), ("heads", "d_head", "d_model"), "hidden", out_std)
        if config.bias:
            self.query_bias = declare(rngs, (h, k), ("heads", "d_head"), "bias", 0.0)
            self.key_bias = declare(rngs, (g, k), ("kv_heads", "d_head"), "bias", 0.0)
            self.value_bias = declare(rngs, (g, k), ("kv_heads", "d_head"), "bias", 0.0)
            self.out_bias = declare(rngs, (d,), ("d_model",), "bias", 0.0)
        self.has_bias = config.bias
        self.query_norm = Norm(k, "d_head", config, rngs=rngs) if config.qk_norm else None
        self.key_norm = Norm(k, "d_head", config, rngs=rngs) if config.qk_norm else None

    def __call__(
        self, x_btd: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        q_bthk = jnp.einsum("btd,dhk->bthk", x_btd, use(self.query, x_btd))
        k_bsgk = jnp.einsum("btd,dgk->btgk", x_btd, use(self.key, x_btd))
        v_bsgk = jnp.einsum("btd,dgk->btgk", x_btd, use(self.value, x_btd))
        if self.has_bias:
            q_bthk = q_bthk + use(self.query_bias, x_btd)
            k_bsgk = k_bsgk + use(self.key_bias, x_btd)
            v_bsgk = v_bsgk + use(self.value_bias, x_btd)
        if self.query_norm is not None and self.key_norm is not None:
            q_bthk, k_bsgk = self.query_norm(q_bthk), self.key_norm(k_bsgk)
        if context.rope is not None:
            q_bthk, k_bsgk = rotate(q_bthk, context.rope), rotate(k_bsgk, context.rope)
        if cache is not None:
            at = (0, context.offset, 0, 0)
            k_bsgk = jax.lax.dynamic_update_slice(cache[0], k_bsgk.astype(cache[0].dtype), at)
            v_bsgk = jax.lax.dynamic_update_slice(cache[1], v_bsgk.astype(cache[1].dtype), at)
            cache = (k_bsgk, v_bsgk)
        y_bthk = attend(
            q_bthk, k_bsgk, v_bsgk, context.segments_bt, context.segments_bs, context.offset
        )
        out_spec = spec(("batch", "seq", None))
        y_btd = jnp.einsum("bthk,hkd->btd", y_bthk, use(self.out, x_btd), out_sharding=out_spec)
        return (y_btd + use(self.out_bias, x_btd) if self.has_bias else y_btd), cache


class FeedForward(nnx.Module):
    """Two matrices around GELU, or SwiGLU's three (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        d, f = config.d_model, config.ff_dim
        out_std = f**-0.5 / (2 * config.n_layers) ** 0.5
        gated = config.activation == "swiglu"
        self.up = declare(rngs, (d, f), ("d_model", "d_ff"), "hidden", d**-0.5)
        self.gate = declare(rngs, (d, f), ("d_model", "d_ff"), "hidden", d**-0.5) if gated else None
        self.down = declare(rngs, (f, d), ("d_ff", "d_model"), "hidden", out_std)
        self.up_bias = declare(rngs, (f,), ("d_ff",), "bias", 0.0) if config.bias else None
        self.down_bias = declare(rngs, (d,), ("d_model",), "bias", 0.0) if config.bias else None

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        y_btf = jnp.einsum("btd,df->btf", x_btd, use(self.up, x_btd))
        if self.up_bias is not None:
            y_btf = y_btf + use(self.up_bias, x_btd)
        if self.gate is not None:
            gate_btf = jnp.einsum("btd,df->btf", x_btd, use(self.gate, x_btd))
            y_btf = jax.nn.silu(gate_btf) * y_btf
        else:
            y_btf = gelu(y_btf)
        out_spec = spec(("batch", "seq", None))
        y_btd = jnp.einsum("btf,fd->btd", y_btf, use(self.down, x_btd), out_sharding=out_spec)
        return y_btd if self.down_bias is None else y_btd + use(self.down_bias, x_btd)


def gelu(x: jax.Array) -> jax.Array:
    """GELU's tanh form, written with the logistic function: the same number, fewer operations."""
    return x * jax.nn.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


class Block(nnx.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + feed_forward(norm(x)).

    `model.layer = 'file.py:Class'` puts another class with the same two signatures in its place.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = Norm(config.d_model, "d_model", config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = Norm(config.d_model, "d_model", config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(
        self, x_btd: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        y_btd, cache = self.attention(self.attention_norm(x_btd), context, cache)
        x_btd = x_btd + y_btd
        return x_btd + self.feed_forward(self.feed_forward_norm(x_btd)), cache


class Decoder(nnx.Module):
    """All parameters of a decoder; the blocks are stacked on a leading layer axis."""

    def __init__(self, config: ModelConfig, block: Any, *, rngs: nnx.Rngs) -> None:
        v, d = config.vocab_size, config.d_model
        untied_mup = config.parametrization == "mup" and not config.tie_embeddings
        std = 1.0 if untied_mup else 0.02
        self.embedding = declare(rngs, (v, d), ("vocab", "d_model"), "embedding", std)
        if config.positions == "learned":
            shape, axes = (config.seq_len, d), ("seq", "d_model")
            self.positions = declare(rngs, shape, axes, "embedding", 0.02)
        keys = jax.random.split(rngs.params(), config.n_layers)
        self.layers = jax.vmap(lambda key: block(config, rngs=nnx.Rngs(params=key)))(keys)
        self.norm = Norm(d, "d_model", config, rngs=rngs)
        if not config.tie_embeddings:
            std = 0.0 if untied_mup else 0.02
            self.unembedding = declare(rngs, (v, d), ("vocab", "d_model"), "unembedding", std)
