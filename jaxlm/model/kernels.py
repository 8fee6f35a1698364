"""Attention by others' kernels, each device on its own rows and heads; `attention.attend` chooses.

Splash (jax's Pallas kernel for TPU) and `jax.nn.dot_product_attention` (cuDNN on GPU where it can).
Queries are [b, g, r, t, k] and already scaled, keys and values [b, g, s, k].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.chips import chip_of
from jaxlm.mesh import device_kind, spec

BLOCK = 128  # what splash's lanes ask of a length


def _by_device(f: Any, *arrays: jax.Array) -> jax.Array:
    """`f` on each device's rows and key/value heads."""
    heads = {5: ("batch", "kv_heads", None, None, None), 4: ("batch", "kv_heads", None, None)}
    layouts = tuple(spec(heads.get(x.ndim, ("batch", *[None] * (x.ndim - 1)))) for x in arrays)
    return jax.shard_map(f, in_specs=layouts, out_specs=layouts[0], check_vma=False)(*arrays)


def tile(t: int, device_kind: str) -> int:
    """Queries and keys at a time in splash: the largest power of two that divides t, up to 512, or
    1024 on chips with twice as large matrix units (v6e, TPU7x)."""
    chip = chip_of(device_kind)
    most = 1024 if chip and chip.name in ("v6e", "tpu7x") else 512
    return min(t & -t, most)


def splash(
    q_bgrtk: jax.Array,
    k_bgsk: jax.Array,
    v_bgsk: jax.Array,
    segments_bt: jax.Array,
    causal: bool,
    window: Any,  # an int or None
    soft_cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Self-attention [b, g, r, t, k] of t tokens, a multiple of BLOCK."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    r, t = q_bgrtk.shape[2:4]
    mask: Any = masks.CausalMask((t, t)) if causal else masks.FullMask((t, t))
    if window is not None:
        mask = masks.LocalMask((t, t), window_size=(window - 1, 0 if causal else None), offset=0)
    b = tile(t, device_kind())
    tiles = kernel.BlockSizes(
        block_q=b, block_kv=b, block_q_dkv=b, block_kv_dkv=b, block_q_dq=b, block_kv_dq=b
    )
    attend = kernel.make_splash_mqa(
        masks.MultiHeadMask([mask] * r), block_sizes=tiles, head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=soft_cap, interpret=interpret,
    )  # fmt: skip

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments_bt: jax.Array) -> jax.Array:
        ids = kernel.SegmentIds(q=segments_bt, kv=segments_bt)
        by_head = jax.vmap(attend, in_axes=(0, 0, 0, None))
        return jax.vmap(by_head)(q, k, v, ids)

    return _by_device(local, q_bgrtk, k_bgsk, v_bgsk, segments_bt)


def dot_product(
    q_bgrtk: jax.Array, k_bgsk: jax.Array, v_bgsk: jax.Array, mask_b11ts: jax.Array
) -> jax.Array:
    """Attention [b, g, r, t, k] by `jax.nn.dot_product_attention`."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        b, g, r, t, width = q.shape
        q_bthk = q.transpose(0, 3, 1, 2, 4).reshape(b, t, g * r, width)
        k_bsgk, v_bsgk = (x.transpose(0, 2, 1, 3) for x in (k, v))
        y = jax.nn.dot_product_attention(q_bthk, k_bsgk, v_bsgk, mask=mask[:, None], scale=1.0)
        return y.reshape(b, t, g, r, width).transpose(0, 2, 3, 1, 4)

    return _by_device(local, q_bgrtk, k_bgsk, v_bgsk, jnp.squeeze(mask_b11ts, (1, 2)))
