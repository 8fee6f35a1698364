"""The layers, defined with Flax NNX and declared once.

Shape suffixes: b batch, t query time, s key time, d d_model, h heads, g kv heads, r heads per kv
head, k head dim, f d_ff, v vocab, l layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.mesh import spec
from jaxlm.model.attention import attend
from jaxlm.model.moe import Experts, Sums
from jaxlm.model.parts import Norm, activated, declare, dropout, plus, times
from jaxlm.model.positions import Rope, rotate
from jaxlm.model.turned import Turned
from jaxlm.model_config import GATED

Cache = tuple[jax.Array, jax.Array]
"""Keys [b, g, k, s] and values [b, g, s, k] of one layer: as the two products of attention read
them, or else each step turns all of them round. Of a single row they may be without its axis, as
XLA's products are: a loop of steps then writes them in place, and else copies them three times a
step (docs/performance.md)."""


class Memory(NamedTuple):
    """What an encoder left to a decoder's cross-attention; of one layer, or of all: [l, …], or a
    tuple of them."""

    keys: Any  # [b, s, g, k]
    values: Any  # [b, s, g, k]
    segments_bs: jax.Array  # int32, never stacked


class Context(NamedTuple):
    """What every block sees besides its input."""

    positions_bt: jax.Array  # int32, restarting at each document
    segments_bt: jax.Array  # int32, the document of each query; 0 is padding
    segments_bs: jax.Array  # int32, the document of each key
    offset: jax.Array | int  # slot of the first query among the keys, int32 [] or [b]
    rope: Rope | None
    window: jax.Array | int | None = None  # slots that this layer sees, the query's own included
    causal: bool = True
    prefix_bs: jax.Array | None = None  # bool, keys that earlier queries see too
    bias_hts: jax.Array | None = None  # added to the scores
    rows: jax.Array | None = None  # of the cache, int32 [b]; None: all of them
    memory: Memory | None = None  # what this layer's cross-attention looks at
    key: jax.Array | None = None  # of this layer's dropout; None: nothing is dropped
    maps: list[jax.Array] | None = None  # each attention adds its weights [b, h, t, s] to the list


class Attention(nnx.Module):
    """Multi-head or grouped-query attention within documents."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        d, h, g, k = config.d_model, config.n_heads, config.kv_heads, config.head_dim
        out_std = (h * k) ** -0.5 * config.branch_std
        self.soft_cap, self.scale = config.attention_soft_cap, config.attention_scale
        # Where scores are not scaled by 1/√k (T5), the queries are smaller by as much at first.
        std = d**-0.5 if self.scale is None else d**-0.5 * k**-0.5 / self.scale
        self.query = declare(rngs, (d, h, k), ("d_model", "heads", "d_head"), "hidden", std)
        self.key = declare(rngs, (d, g, k), ("d_model", "kv_heads", "d_head"), "hidden", d**-0.5)
        self.value = declare(rngs, (d, g, k), ("d_model", "kv_heads", "d_head"), "hidden", d**-0.5)
        self.out = declare(rngs, (h, k, d), ("heads", "d_head", "d_model"), "hidden", out_std)
        if config.bias:
            self.query_bias = declare(rngs, (h, k), ("heads", "d_head"), "bias", 0.0)
            self.key_bias = declare(rngs, (g, k), ("kv_heads", "d_head"), "bias", 0.0)
            self.value_bias = declare(rngs, (g, k), ("kv_heads", "d_head"), "bias", 0.0)
            self.out_bias = declare(rngs, (d,), ("d_model",), "bias", 0.0)
        self.has_bias, self.n_heads = config.bias, h
        self.over_all = config.qk_norm_over == "projection"

        def norm(heads: int, axis: str) -> Norm | None:
            if not config.qk_norm:
                return None
            width, axis = (heads * k, axis) if self.over_all else (k, "d_head")
            return Norm(width, axis, config, rngs=rngs)

        self.query_norm, self.key_norm = norm(h, "heads"), norm(g, "kv_heads")

    def __call__(
        self, x_btd: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        q_bthk, k_bsgk, v_bsgk = self.projected(x_btd)
        if context.rope is not None:
            q_bthk, k_bsgk = rotate(q_bthk, context.rope), rotate(k_bsgk, context.rope)
        if cache is not None:
            cache = put(cache, k_bsgk, v_bsgk, context)
            k_bsgk, v_bsgk = held(cache, context)

        def see(v_bsgk: jax.Array) -> jax.Array:
            return attend(
                q_bthk, k_bsgk, v_bsgk, context.segments_bt, context.segments_bs, context.offset,
                causal=context.causal, window=context.window, soft_cap=self.soft_cap,
                scale=self.scale, bias_hts=context.bias_hts, prefix_bs=context.prefix_bs,
            )  # fmt: skip

        if context.maps is not None:
            context.maps.append(weights_of(see, v_bsgk))
        return self.outputs(see(v_bsgk)), cache

    def across(self, x_btd: jax.Array, segments_bt: jax.Array, memory: Memory) -> jax.Array:
        """Attention to an encoder's tokens of the same segment; positions play no part."""
        y_bthk = attend(
            self.queries(x_btd), memory.keys, memory.values, segments_bt, memory.segments_bs,
            causal=False, soft_cap=self.soft_cap, scale=self.scale,
        )  # fmt: skip
        return self.outputs(y_bthk)

    def projected(self, x_btd: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [b, t, h, k], keys and values [b, t, g, k], before rotation: of one product where
        `query` has the heads of all three (`generate.layout`)."""
        w = self.query.get_value()
        if not (isinstance(w, Turned) and w.outputs[0] > self.n_heads):
            return self.queries(x_btd), *self.keys_values(x_btd)
        by_head = spec(("batch", "seq", "heads", None))
        all_btnk, h = times("btd,dhk->bthk", x_btd, self.query, by_head), self.n_heads
        g = (all_btnk.shape[2] - h) // 2
        q_bthk, k_btgk, v_btgk = jnp.split(all_btnk, (h, h + g), axis=2)
        return self._queries(q_bthk), *self._keys_values(k_btgk, v_btgk)

    def queries(self, x_btd: jax.Array) -> jax.Array:
        """[b, t, h, k], before rotation."""
        by_head = spec(("batch", "seq", "heads", None))
        return self._queries(times("btd,dhk->bthk", x_btd, self.query, by_head))

    def keys_values(self, x_bsd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[b, s, g, k] each, before rotation."""
        by_head = spec(("batch", "seq", "kv_heads", None))
        k_bsgk = times("bsd,dgk->bsgk", x_bsd, self.key, by_head)
        v_bsgk = times("bsd,dgk->bsgk", x_bsd, self.value, by_head)
        return self._keys_values(k_bsgk, v_bsgk)

    def _queries(self, q_bthk: jax.Array) -> jax.Array:
        q_bthk = plus(q_bthk, self.query_bias) if self.has_bias else q_bthk
        return self._normed(self.query_norm, q_bthk)

    def _keys_values(self, k_bsgk: jax.Array, v_bsgk: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.has_bias:
            k_bsgk = plus(k_bsgk, self.key_bias)
            v_bsgk = plus(v_bsgk, self.value_bias)
        return self._normed(self.key_norm, k_bsgk), v_bsgk

    def _normed(self, norm: Norm | None, x_bthk: jax.Array) -> jax.Array:
        if norm is None:
            return x_bthk
        if not self.over_all:
            return norm(x_bthk)
        b, t, h, k = x_bthk.shape
        flat = norm(x_bthk.reshape(b, t, h * k, out_sharding=spec(("batch", "seq", "heads"))))
        return flat.reshape(b, t, h, k, out_sharding=spec(("batch", "seq", "heads", None)))

    def outputs(self, y_bthk: jax.Array) -> jax.Array:
        out_spec = spec(("batch", "seq", None))
        y_btd = times("bthk,hkd->btd", y_bthk, self.out, out_spec)
        return plus(y_btd, self.out_bias) if self.has_bias else y_btd


def put(cache: Cache, k_btgk: jax.Array, v_btgk: jax.Array, context: Context) -> Cache:
    """The cache with new keys and values in slots offset … offset + t, of all rows or of
    `context.rows`."""
    keys_cgks, values_cgsk = cache
    k_btgk, v_btgk = k_btgk.astype(keys_cgks.dtype), v_btgk.astype(values_cgsk.dtype)
    if context.rows is None:
        k_bgkt, v_bgtk = k_btgk.transpose(0, 2, 3, 1), v_btgk.transpose(0, 2, 1, 3)
        if keys_cgks.ndim == 3:
            k_bgkt, v_bgtk = k_bgkt[0], v_bgtk[0]
        first = (0,) * (keys_cgks.ndim - 2)
        return (
            jax.lax.dynamic_update_slice(keys_cgks, k_bgkt, (*first, 0, context.offset)),
            jax.lax.dynamic_update_slice(values_cgsk, v_bgtk, (*first, context.offset, 0)),
        )
    rows_b1 = context.rows[:, None]
    at_bt = jnp.reshape(context.offset, (-1, 1)) + jnp.arange(k_btgk.shape[1])
    return (
        keys_cgks.at[rows_b1, :, :, at_bt].set(k_btgk),
        values_cgsk.at[rows_b1, :, at_bt].set(v_btgk),
    )


def held(cache: Cache, context: Context) -> tuple[jax.Array, jax.Array]:
    """Keys and values [b, s, g, k] that the cache's rows hold, in as many slots as there are
    segments."""
    keys_bgks, values_bgsk = cache
    if keys_bgks.ndim == 3:
        keys_bgks, values_bgsk = keys_bgks[None], values_bgsk[None]
    if context.rows is not None:
        s = context.segments_bs.shape[1]
        layout = spec(("batch", "kv_heads", None, None))
        keys_bgks = keys_bgks[..., :s].at[context.rows].get(out_sharding=layout)
        values_bgsk = values_bgsk[:, :, :s].at[context.rows].get(out_sharding=layout)
    return keys_bgks.transpose(0, 3, 1, 2), values_bgsk.transpose(0, 2, 1, 3)


def weights_of(see: Callable[[jax.Array], jax.Array], like_bsgk: jax.Array) -> jax.Array:
    """The weights [b, h, t, s] of an attention `see(values [b, s, g, k]) -> [b, t, h, k]`: what it
    makes of the identity's rows as values, as many of its columns at a time as a head is wide."""
    b, s, g, k = like_bsgk.shape
    eye_ss = jnp.eye(s, -(-s // k) * k, dtype=like_bsgk.dtype)
    layout, parts = jax.typeof(like_bsgk).sharding.spec, []
    for start in range(0, eye_ss.shape[1], k):
        columns = jnp.broadcast_to(eye_ss[None, :, None, start : start + k], (b, s, g, k))
        parts.append(see(jax.reshard(columns, layout)))
    return jnp.concatenate(parts, axis=-1)[..., :s].transpose(0, 2, 1, 3)


class FeedForward(nnx.Module):
    """Two matrices around a non-linearity, or the three of a gated one (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, width: int | None = None, *, rngs: nnx.Rngs) -> None:
        d, f = config.d_model, config.ff_dim if width is None else width
        out_std = f**-0.5 * config.branch_std
        self.kind, gated = config.activation, config.activation in GATED
        self.up = declare(rngs, (d, f), ("d_model", "d_ff"), "hidden", d**-0.5)
        self.gate = declare(rngs, (d, f), ("d_model", "d_ff"), "hidden", d**-0.5) if gated else None
        self.down = declare(rngs, (f, d), ("d_ff", "d_model"), "hidden", out_std)
        self.up_bias = declare(rngs, (f,), ("d_ff",), "bias", 0.0) if config.bias else None
        self.down_bias = declare(rngs, (d,), ("d_model",), "bias", 0.0) if config.bias else None

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        wide = spec(("batch", "seq", "d_ff"))
        y_btf = times("btd,df->btf", x_btd, self.up, wide)
        if self.up_bias is not None:
            y_btf = plus(y_btf, self.up_bias)
        gate_btf = None
        if self.gate is not None:
            gate_btf = times("btd,df->btf", x_btd, self.gate, wide)
        y_btf = activated(self.kind, y_btf, gate_btf)
        out_spec = spec(("batch", "seq", None))
        y_btd = times("btf,fd->btd", y_btf, self.down, out_spec)
        return y_btd if self.down_bias is None else plus(y_btd, self.down_bias)


class Block(nnx.Module):
    """Transformer block: attention, attention to an encoder if `cross`, then a feed-forward layer
    or experts, each added to its input and normalised where `norm_placement` says.

    `model.layer = 'file.py:Class'` puts another class with the same two signatures in its place;
    its third output may be left out.
    """

    def __init__(self, config: ModelConfig, cross: bool = False, *, rngs: nnx.Rngs) -> None:
        def norm(here: bool) -> Norm | None:
            return Norm(config.d_model, "d_model", config, rngs=rngs) if here else None

        before, after = (config.norm_placement in w for w in ("pre both", "post output both"))
        moe = config.moe
        self.config = config
        self.attention_norm = norm(before)
        self.attention = Attention(config, rngs=rngs)
        self.attention_out_norm = norm(after)
        self.cross_attention_norm = norm(before and cross)
        self.cross_attention = Attention(config, rngs=rngs) if cross else None
        self.cross_attention_out_norm = norm(after and cross)
        self.feed_forward_norm = norm(before)
        self.feed_forward = None if moe.n_experts else FeedForward(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs) if moe.n_experts else None
        shared = moe.n_shared_experts * config.expert_dim if moe.n_experts else 0
        self.shared_experts = FeedForward(config, shared, rngs=rngs) if shared else None
        self.feed_forward_out_norm = norm(after)

    def __call__(
        self, x_btd: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None, Sums]:
        y_btd, cache = self.attention(_maybe(self.attention_norm, x_btd), context, cache)
        y_btd = dropout(y_btd, self.config.dropout, context.key, 0)
        if self.config.parallel_residual:
            f_btd, sums = self._fed(x_btd, context)
            return x_btd + y_btd + f_btd, cache, sums
        x_btd = self._added(x_btd, y_btd, self.attention_out_norm)
        if self.cross_attention is not None:
            y_btd = _maybe(self.cross_attention_norm, x_btd)
            assert context.memory is not None
            y_btd = self.cross_attention.across(y_btd, context.segments_bt, context.memory)
            y_btd = dropout(y_btd, self.config.dropout, context.key, 2)
            x_btd = self._added(x_btd, y_btd, self.cross_attention_out_norm)
        y_btd, sums = self._fed(x_btd, context)
        return self._added(x_btd, y_btd, self.feed_forward_out_norm), cache, sums

    def _fed(self, x_btd: jax.Array, context: Context) -> tuple[jax.Array, Sums]:
        x_btd, sums = _maybe(self.feed_forward_norm, x_btd), Sums()
        if self.experts is not None:
            y_btd, sums = self.experts(x_btd, context.segments_bt)
            if self.shared_experts is not None:
                y_btd = y_btd + self.shared_experts(x_btd)
        else:
            assert self.feed_forward is not None
            y_btd = self.feed_forward(x_btd)
        return dropout(y_btd, self.config.dropout, context.key, 1), sums

    def _added(self, x_btd: jax.Array, y_btd: jax.Array, norm: Norm | None) -> jax.Array:
        if norm is None:
            return x_btd + y_btd
        return norm(x_btd + y_btd) if self.config.norm_placement == "post" else x_btd + norm(y_btd)


def _maybe(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
