"""Matrices as decoding reads them: outputs first, in 32, 8 or 4 bits.

In 8 bits an output's weights are whole numbers -127 … 127 times a scale of its own. In 4 bits they
are whole numbers -8 … 7 times a factor -15 … 15 that 32 of them share (which makes whole numbers of
8 bits) times the output's scale: 4.25 bits a weight, as scales of scales in gguf's Q4_K.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from jaxlm import mesh
from jaxlm.mesh import spec

GROUP = 32  # inputs that share a factor
_FEWEST = 8  # rows of a product in 8 bits: XLA's is slow for fewer on a CPU


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "factors"],
    meta_fields=["outputs"],
)
@dataclass(frozen=True)
class Turned:
    """A matrix with its outputs first, so that a product with one vector reads it from beginning to
    end. Axes of one side are one axis."""

    values: jax.Array  # [outputs, inputs]; in 4 bits int8 [outputs, inputs / 2]
    outputs: tuple[int, ...]  # the sizes of their axes
    scale: jax.Array | None = None  # float32 [outputs], in 8 bits and 4
    factors: jax.Array | None = None  # int8 [outputs, inputs / GROUP], in 4 bits


def turned(w: jax.Array, axes: tuple[str, ...], bits: int = 32) -> Turned:
    """A matrix with these logical axes. In 4 bits only where each device's inputs are pairs of
    groups, else in 8."""
    n = _inputs(axes)
    shape = math.prod(w.shape[:n]), math.prod(w.shape[n:])
    w_oi = w.reshape(shape, out_sharding=spec((axes[0], axes[n]))).T
    if bits == 32:
        return Turned(w_oi, w.shape[n:])
    most_o = jnp.maximum(jnp.max(jnp.abs(w_oi), axis=1), 1e-30).astype(jnp.float32)
    if bits == 4 and shape[0] % (2 * GROUP * mesh.parts(axes[0])) == 0:
        scale_o = most_o / 120  # 8 · 15
        values, factors = _grouped(w_oi / scale_o[:, None])
        return Turned(values, w.shape[n:], scale_o, factors)
    scale_o = most_o / 127
    whole_oi = jnp.round(w_oi / scale_o[:, None]).astype(jnp.int8)
    return Turned(whole_oi, w.shape[n:], scale_o)


def joined(each: Sequence[Turned]) -> Turned:
    """Matrices of the same inputs as one, along the first axis of their outputs."""

    def column(parts: list[Any]) -> Any:
        return None if parts[0] is None else jnp.concatenate(parts)

    outputs = (sum(w.outputs[0] for w in each), *each[0].outputs[1:])
    columns = zip(*((w.values, w.scale, w.factors) for w in each), strict=True)
    values, scale, factors = (column(list(parts)) for parts in columns)
    return Turned(values, outputs, scale, factors)


def _inputs(axes: tuple[str, ...]) -> int:
    """How many of a layer's matrix's axes are its input: of those that lead back to d_model, all
    but the last."""
    return 1 if axes[0] == "d_model" else len(axes) - 1


def _grouped(w_oi: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights within ±120 in 4 bits: int8 [o, i / 2], of each two groups the first one's in the low
    bits, and their factors [o, i / GROUP], those of the least squared error."""
    o, i = w_oi.shape
    over_o, over_i = jax.typeof(w_oi).sharding.spec
    w_ogj = w_oi.reshape(o, i // GROUP, GROUP, out_sharding=P(over_o, over_i, None))

    def whole(factor: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(w_ogj / factor), -8, 7)

    def better(best: tuple[jax.Array, jax.Array], factor: jax.Array) -> Any:
        error_og, factor_og = best
        own_og = jnp.square(whole(factor) * factor - w_ogj).sum(-1)
        least = own_og < error_og
        return (jnp.where(least, own_og, error_og), jnp.where(least, factor, factor_og)), None

    begin = jnp.full_like(w_ogj[..., 0], jnp.inf), jnp.ones_like(w_ogj[..., 0])
    (_, factor_og), _ = jax.lax.scan(
        better, begin, jnp.array([*range(-15, 0), *range(1, 16)], w_ogj.dtype)
    )
    q_opkj = (
        whole(factor_og[..., None])
        .astype(jnp.int8)
        .reshape(o, i // (2 * GROUP), 2, GROUP, out_sharding=P(over_o, over_i, None, None))
    )
    both_opj = (q_opkj[:, :, 0] & 15) | (q_opkj[:, :, 1] << 4)
    packed_oi = both_opj.reshape(o, i // 2, out_sharding=P(over_o, over_i))
    return packed_oi, factor_og.astype(jnp.int8)


def times_turned(x_bti: jax.Array, w: Turned, axes: tuple[str, ...], out_spec: P) -> jax.Array:
    """[b, t, o] of activations and a matrix with these logical axes, laid out as `out_spec`, in the
    type of `x`. In 8 and 4 bits the activations, too, are whole numbers with a scale for each
    token, so that products are of whole numbers."""
    two = axes[_inputs(axes)], axes[0]
    w_oi = jax.reshard(w.values, spec(two, gathered=True))
    if w.scale is None:
        return jnp.einsum("bti,oi->bto", x_bti, w_oi.astype(x_bti.dtype), out_sharding=out_spec)
    b, t = x_bti.shape[:2]
    scale_bt1 = jnp.maximum(jnp.max(jnp.abs(x_bti), axis=-1, keepdims=True), 1e-30) / 127
    whole_bti = jnp.round(x_bti / scale_bt1).astype(jnp.int8)
    whole_bti = jnp.pad(whole_bti, [(0, 0), (0, max(0, -(-_FEWEST // b) - t)), (0, 0)])
    if w.factors is None:
        parts = [(whole_bti, w_oi)]
    else:
        # Never true: but so no matrix is unpacked before its product, where XLA would unpack those
        # of all layers before the first one, and keep them.
        never = (jnp.min(scale_bt1) < 0).astype(jnp.int8)
        factors_og = jax.reshard(w.factors, spec(two, gathered=True))
        parts = list(zip(_halves(whole_bti), _unpacked(w_oi + never, factors_og), strict=True))
    products = (
        jnp.einsum("bti,oi->bto", x, w, preferred_element_type=jnp.int32, out_sharding=out_spec)
        for x, w in parts
    )
    y_bto = functools.reduce(jnp.add, products)
    scale_o = jax.reshard(w.scale, spec(two[:1], gathered=True))
    return (y_bto[:, :t].astype(jnp.float32) * scale_bt1 * scale_o).astype(x_bti.dtype)


def _halves(x_bti: jax.Array) -> list[jax.Array]:
    """The inputs of every first group, and those of every second one."""
    b, t, i = x_bti.shape
    where = jax.typeof(x_bti).sharding.spec
    x_btpkj = x_bti.reshape(b, t, i // (2 * GROUP), 2, GROUP, out_sharding=P(*where, None, None))
    return [x_btpkj[..., k, :].reshape(b, t, i // 2, out_sharding=P(*where)) for k in range(2)]


def _unpacked(packed_oi: jax.Array, factors_og: jax.Array) -> list[jax.Array]:
    """Whole numbers of 8 bits, those of every first group, and of every second one."""
    o, i = packed_oi.shape
    where = jax.typeof(packed_oi).sharding.spec
    pairs = o, i // GROUP, GROUP
    factors_opk = factors_og.reshape(o, i // GROUP, 2, out_sharding=P(*where, None))
    out = []
    for k, q_oi in enumerate(((packed_oi << 4) >> 4, packed_oi >> 4)):
        q_opj = q_oi.reshape(pairs, out_sharding=P(*where, None)) * factors_opk[..., k, None]
        out.append(q_opj.reshape(o, i, out_sharding=P(*where)))
    return out
