"""Causal attention within documents, and rotary positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.mesh import spec

NEGATIVE = -1e30  # finite: a row without any allowed key must not become NaN


def rotary_angles(
    positions_bt: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [b, t, 1, k/2], of Su et al. 2021 (RoFormer) eq. 15."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions_bt[..., None].astype(jnp.float32) / theta**exponent
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(x_bthk: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary positions in the half-split layout (GPT-NeoX, Llama): pairs are (i, i + k/2)."""
    cos, sin = rope
    a, b = jnp.split(x_bthk.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_bthk.dtype)


def attend(
    q_bthk: jax.Array,
    k_bsgk: jax.Array,
    v_bsgk: jax.Array,
    segments_bt: jax.Array,
    segments_bs: jax.Array,
    offset: jax.Array | int = 0,
    block: int = 128,
) -> jax.Array:
    """Softmax attention [b, t, h, k]; query t sees keys s ≤ t + offset of its own document.

    Queries go in blocks, each against the keys up to its end only, so that the upper triangle is
    never computed. Scores and softmax are float32.
    """
    b, t, h, k = q_bthk.shape
    s, g = k_bsgk.shape[1], k_bsgk.shape[2]
    by_group = spec(("batch", "seq", "kv_heads", None, None))
    q_btgrk = (q_bthk * k**-0.5).reshape(b, t, g, h // g, k, out_sharding=by_group)
    self_attention = isinstance(offset, int) and offset == 0 and s == t
    outs = []
    for start in range(0, t, block if self_attention else t):
        stop = min(start + block, t) if self_attention else t
        end = stop if self_attention else s
        q, key, value = q_btgrk[:, start:stop], k_bsgk[:, :end], v_bsgk[:, :end]
        scores = jnp.einsum("btgrk,bsgk->bgrts", q, key, preferred_element_type=jnp.float32)
        slots = offset + start + jnp.arange(stop - start)
        causal = slots[:, None] >= jnp.arange(end)[None, :]
        same = segments_bt[:, start:stop, None] == segments_bs[:, None, :end]
        allowed = (causal & same)[:, None, None]
        weights = jax.nn.softmax(jnp.where(allowed, scores, NEGATIVE), axis=-1)
        outs.append(jnp.einsum("bgrts,bsgk->btgrk", weights.astype(value.dtype), value))
    y_btgrk = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
    return y_btgrk.reshape(b, t, h, k, out_sharding=spec(("batch", "seq", "heads", None)))
