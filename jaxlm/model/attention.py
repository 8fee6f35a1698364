"""Attention within documents."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.mesh import CONTEXT, platform, size, spec
from jaxlm.model import kernels, ring

NEGATIVE = -1e30  # finite: a row without any allowed key must not become NaN


def attend(
    q_bthk: jax.Array,
    k_bsgk: jax.Array,
    v_bsgk: jax.Array,
    segments_bt: jax.Array,
    segments_bs: jax.Array,
    offset: jax.Array | int = 0,
    *,
    causal: bool = True,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    bias_hts: jax.Array | None = None,
    prefix_bs: jax.Array | None = None,
    block: int = 128,
    implementation: Literal["auto", "blocks", "dot_product", "splash"] = "auto",
) -> jax.Array:
    """Softmax attention [b, t, h, k] within documents: `segments` of query and key are equal.

    Query t is in slot t + offset, which may be int32 [b], of each row its own. `causal`: it sees no
    later slot. `window`: it sees slots less than so far back. `soft_cap` c: scores become
    c·tanh(score / c) (Gemma 2). `scale`: of the scores, 1/√k unless given. `bias_hts` is added to
    them. `prefix_bs` (bool): keys that earlier queries see too. Scores and softmax are float32.

    `implementation`: "blocks", whose causal queries go in blocks, each against the keys up to its
    end, so that most of the upper triangle is never computed; or one of `kernels`. "auto" takes
    splash on a TPU and dot_product on a GPU where they can do what is asked, else blocks. Where
    the mesh cuts sequences up, it is `ring` in any case.
    """
    b, t, h, k = q_bthk.shape
    s, g = k_bsgk.shape[1], k_bsgk.shape[2]
    # Batch and heads first: both products, and the four of the gradient, then need no transpose.
    by_group = spec(("batch", "seq", "kv_heads", None, None))
    q_btgrk = q_bthk * (k**-0.5 if scale is None else scale)
    q_btgrk = q_btgrk.reshape(b, t, g, h // g, k, out_sharding=by_group)
    q_bgrtk = q_btgrk.transpose(0, 2, 3, 1, 4)
    k_bgsk, v_bgsk = k_bsgk.transpose(0, 2, 1, 3), v_bsgk.transpose(0, 2, 1, 3)
    if size(CONTEXT) > 1:
        y_bgrtk = ring.attend(
            q_bgrtk, k_bgsk, v_bgsk, segments_bt, segments_bs, causal, window, soft_cap, bias_hts,
            prefix_bs,
        )  # fmt: skip
        return _by_time(y_bgrtk)
    itself = isinstance(offset, int) and offset == 0 and s == t  # every query sees its own key
    if implementation == "auto":
        plain = bias_hts is None and prefix_bs is None
        tiles = plain and itself and t % kernels.BLOCK == 0 and not isinstance(window, jax.Array)
        implementation = _suited(tiles, plain and soft_cap is None)
    if implementation == "splash":
        y_bgrtk = kernels.splash(
            q_bgrtk, k_bgsk, v_bgsk, segments_bt, causal, window, soft_cap,
            interpret=platform() == "cpu",
        )  # fmt: skip
        return _by_time(y_bgrtk)
    in_blocks = implementation == "blocks" and causal and itself and prefix_bs is None
    # Short sequences in two blocks of 64 or more, so that they skip a quarter of the triangle, too.
    blocks = _blocks(t, s, min(block, max(64, -(-t // 2))) if in_blocks else max(t, s))
    masks = [
        _seen(offset, segments_bt, segments_bs, part, causal, window, prefix_bs) for part in blocks
    ]
    if implementation == "dot_product":
        y_bgrtk = kernels.dot_product(q_bgrtk, k_bgsk, v_bgsk, masks[0])
    elif itself and soft_cap is None and bias_hts is None:
        y_bgrtk = _self_attention(q_bgrtk, k_bgsk, v_bgsk, masks)
    else:
        y_bgrtk = _attention(q_bgrtk, k_bgsk, v_bgsk, masks, soft_cap, bias_hts)
    return _by_time(y_bgrtk)


def _seen(
    offset: jax.Array | int,
    segments_bt: jax.Array,
    segments_bs: jax.Array,
    block: tuple[int, int, int],
    causal: bool,
    window: jax.Array | int | None,
    prefix_bs: jax.Array | None,
) -> jax.Array:
    """Bool [b, 1, 1, block of t, first of s]: which keys each query of a block sees."""
    start, stop, end = block
    back = jnp.reshape(offset, (-1, 1, 1)) + jnp.arange(start, stop)[:, None] - jnp.arange(end)
    seen = segments_bt[:, start:stop, None] == segments_bs[:, None, :end]
    before = back >= 0 if prefix_bs is None else (back >= 0) | prefix_bs[:, None, :end]
    seen = seen & before if causal else seen
    seen = seen & (back < window) if window is not None else seen
    return seen[:, None, None]


def _suited(tiles: bool, plain: bool) -> Literal["blocks", "dot_product", "splash"]:
    """The platform's kernel, if it can do what is asked."""
    if platform() == "tpu" and tiles:
        return "splash"
    return "dot_product" if platform() == "gpu" and plain else "blocks"


def _by_time(y_bgrtk: jax.Array) -> jax.Array:
    """As [b, t, h, k]."""
    b, g, r, t, k = y_bgrtk.shape
    y_btgrk = y_bgrtk.transpose(0, 3, 1, 2, 4)
    return y_btgrk.reshape(b, t, g * r, k, out_sharding=spec(("batch", "seq", "heads", None)))


def _blocks(t: int, s: int, block: int) -> list[tuple[int, int, int]]:
    """(first query, end of queries, end of keys) of each block."""
    stops = [min(start + block, t) for start in range(0, t, block)]
    return [(i * block, stop, stop if stop < t else s) for i, stop in enumerate(stops)]


def _attention(
    q_bgrtk: jax.Array,
    k_bgsk: jax.Array,
    v_bgsk: jax.Array,
    masks: list[jax.Array],
    soft_cap: float | None = None,
    bias_hts: jax.Array | None = None,
) -> jax.Array:
    """[b, g, r, t, k]; masks [b, 1, 1, block of t, first of s] say what each query sees."""
    outs, start = [], 0
    for mask in masks:
        stop, end = start + mask.shape[-2], mask.shape[-1]
        scores = _f32("bgrtk,bgsk->bgrts", q_bgrtk[..., start:stop, :], k_bgsk[:, :, :end])
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if bias_hts is not None:
            bias = bias_hts[:, start:stop, :end]
            shape = (*q_bgrtk.shape[1:3], *bias.shape[1:])
            scores = scores + bias.reshape(shape, out_sharding=spec(("kv_heads", *[None] * 3)))
        weights = jax.nn.softmax(jnp.where(mask, scores, NEGATIVE), axis=-1)
        value = v_bgsk[:, :, :end]
        outs.append(jnp.einsum("bgrts,bgsk->bgrtk", weights.astype(value.dtype), value))
        start = stop
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=-2)


def _f32(formula: str, *arrays: jax.Array) -> jax.Array:
    """The product summed, and left, in float32."""
    return jnp.einsum(formula, *arrays, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _self_attention(
    q_bgrtk: jax.Array, k_bgsk: jax.Array, v_bgsk: jax.Array, masks: list[jax.Array]
) -> jax.Array:
    """`_attention` with its own gradient, which keeps the powers of the softmax undivided and no
    scores, and never sums over a product of [t, s]: a third less time per step for the models of
    the quickstart (docs/performance.md). Needs a key for every query, so that a masked power is
    exactly 0."""
    return _self_attention_fwd(q_bgrtk, k_bgsk, v_bgsk, masks)[0]


def _self_attention_fwd(
    q_bgrtk: jax.Array, k_bgsk: jax.Array, v_bgsk: jax.Array, masks: list[jax.Array]
) -> tuple[jax.Array, Any]:
    outs, kept, start = [], [], 0
    for mask in masks:
        stop, end = start + mask.shape[-2], mask.shape[-1]
        scores = _f32("bgrtk,bgsk->bgrts", q_bgrtk[..., start:stop, :], k_bgsk[:, :, :end])
        scores = jnp.where(mask, scores, NEGATIVE)
        powers = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        powers = powers.astype(v_bgsk.dtype)
        share = 1 / jnp.sum(powers, axis=-1, keepdims=True, dtype=jnp.float32)
        y = share * _f32("bgrts,bgsk->bgrtk", powers, v_bgsk[:, :, :end])
        outs.append(y.astype(v_bgsk.dtype))
        kept.append((powers, share))
        start = stop
    y_bgrtk = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=-2)
    return y_bgrtk, (q_bgrtk, k_bgsk, v_bgsk, y_bgrtk, kept)


def _self_attention_bwd(saved: Any, dy_bgrtk: jax.Array) -> tuple[Any, ...]:
    q_bgrtk, k_bgsk, v_bgsk, y_bgrtk, kept = saved
    dq, dk, dv, start = [], [], [], 0
    for powers, share in kept:
        stop, end = start + powers.shape[-2], powers.shape[-1]
        q, y = q_bgrtk[..., start:stop, :], y_bgrtk[..., start:stop, :].astype(jnp.float32)
        # Divided here, [t, k], the powers [t, s] never need to be.
        dy = share * dy_bgrtk[..., start:stop, :].astype(jnp.float32)
        # Σ_s weight · dweight = Σ_k y · dy (Dao et al. 2022, appendix B.2)
        mean = jnp.sum(y * dy, axis=-1, keepdims=True)
        dy = dy.astype(v_bgsk.dtype)
        dw = _f32("bgrtk,bgsk->bgrts", dy, v_bgsk[:, :, :end])
        ds = (powers.astype(jnp.float32) * (dw - mean)).astype(q_bgrtk.dtype)
        dq.append(jnp.einsum("bgrts,bgsk->bgrtk", ds, k_bgsk[:, :, :end]))
        dv.append(jnp.einsum("bgrts,bgrtk->bgsk", powers, dy))
        dk.append(jnp.einsum("bgrts,bgrtk->bgsk", ds, q))
        start = stop
    dq_bgrtk = dq[0] if len(dq) == 1 else jnp.concatenate(dq, axis=-2)
    return dq_bgrtk, _overlaid(dk), _overlaid(dv), None


def _overlaid(parts: list[jax.Array]) -> jax.Array:
    """The sum of parts that are [b, g, first of s, k], the last one whole."""
    total = parts[-1]
    for part in parts[:-1]:
        total = total.at[:, :, : part.shape[2]].add(part)
    return total


_self_attention.defvjp(_self_attention_fwd, _self_attention_bwd)
