"""How positions enter: rotary angles and their stretching, and T5's buckets of distances."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model_config import RopeScaling

Rope = tuple[jax.Array, jax.Array]
"""cos and sin, float32 [b, t, 1, k'/2] for the k' components of a head that rotate."""


def rotary(config: ModelConfig, positions_bt: jax.Array, local: bool = False) -> Rope:
    """The angles of Su et al. 2021 (RoFormer) eq. 15, stretched as `rope_scaling` says; those of
    the local layers if `local`: these have a base of their own and are never stretched."""
    width = config.rotary_dim
    theta = config.local_rope_theta if local else None
    own, theta = theta is not None, config.rope_theta if theta is None else theta
    exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    period = theta**exponent  # of a rotation, over 2π
    scaling, length = config.rope_scaling, 1.0
    if scaling.kind != "none" and not own:
        period = period * jnp.asarray(_stretch(scaling, config.rope_theta, width), jnp.float32)
        length = _length(scaling)
    angles = (positions_bt[..., None].astype(jnp.float32) / period)[:, :, None, :]
    if length == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * length, jnp.sin(angles) * length


def rotate(x_bthk: jax.Array, rope: Rope) -> jax.Array:
    """Rotary positions in the half-split layout (GPT-NeoX, Llama): pairs are (i, i + k'/2) of the
    first k' components; the others pass."""
    cos, sin = rope
    rotary_dim = 2 * cos.shape[-1]
    x32 = x_bthk.astype(jnp.float32)
    a, b = jnp.split(x32[..., :rotary_dim], 2, axis=-1)
    parts = [a * cos - b * sin, b * cos + a * sin]
    if rotary_dim < x_bthk.shape[-1]:
        parts.append(x32[..., rotary_dim:])
    return jnp.concatenate(parts, axis=-1).astype(x_bthk.dtype)


def _length(s: RopeScaling) -> float:
    """What YaRN multiplies queries and keys by (Peng et al. 2023, eq. 22)."""
    if s.kind != "yarn":
        return 1.0
    return s.attention_factor if s.attention_factor is not None else 0.1 * math.log(s.factor) + 1.0


def _stretch(s: RopeScaling, theta: float, width: int) -> np.ndarray:
    """By how much each period grows, float64 [width/2].

    linear: position interpolation (Chen et al. 2023). ntk: a larger base, so that the slowest
    rotation grows by the factor and the fastest hardly. yarn: Peng et al. 2023, §3.2, between the
    rotations `beta_fast` and `beta_slow`, whose components are rounded outwards as its code does.
    llama3: the blend of Llama 3.1's reference code, between high_freq_factor and low_freq_factor.
    """
    i = np.arange(0, width, 2) / width
    if s.kind == "linear":
        return np.full(len(i), s.factor)
    if s.kind == "ntk":
        return s.factor ** (i * width / (width - 2))
    turns = s.original_seq_len / (2 * math.pi * theta**i)  # in the original length
    if s.kind == "llama3":
        kept = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    else:
        first, last = (
            width * math.log(s.original_seq_len / (beta * 2 * math.pi)) / (2 * math.log(theta))
            for beta in (s.beta_fast, s.beta_slow)
        )
        low, high = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        kept = 1 - (np.arange(len(i)) - low) / max(high - low, 0.001)
    kept = np.clip(kept, 0.0, 1.0)
    return 1 / (kept + (1 - kept) / s.factor)


def relative_bucket(distance: jax.Array, buckets: int, furthest: int, both_ways: bool) -> jax.Array:
    """T5's bucket, int32, of key slot minus query slot (Raffel et al. 2020, §2.1).

    Half of the buckets are single distances, half grow as logarithms up to `furthest`; with
    `both_ways` (an encoder) the later keys have a half of their own.
    """
    start = jnp.zeros_like(distance)
    if both_ways:
        buckets //= 2
        start = jnp.where(distance > 0, buckets, 0)
        back = jnp.abs(distance)
    else:
        back = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(back, 1).astype(jnp.float32) / exact) / math.log(furthest / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return start + jnp.where(back < exact, back, jnp.minimum(far, buckets - 1))
