"""What layers are made of: declared parameters, norms, activations, dropout.

Every parameter is an `nnx.Param` with its logical axes, role and initial scale as metadata;
`model.transformer.table` reads them back, and sharding, counts, weight decay and learning-rate
multipliers all come from there.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from jaxlm.config import ModelConfig
from jaxlm.mesh import spec
from jaxlm.model.turned import Turned, times_turned


def declare(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    role: str,
    std: float,
    active: float = 1.0,
) -> nnx.Param:
    """A float32 parameter: N(0, std²), or ones for role 'gain', zeros for 'bias' or std 0.

    Roles: embedding, unembedding, hidden (matrices: decay, Muon, 1/width in muP), gain, bias.
    `active` is the share of it that one token is multiplied by (experts), for counting FLOPs.
    """
    if role == "gain":
        value = jnp.ones(shape, jnp.float32)
    elif std == 0.0:
        value = jnp.zeros(shape, jnp.float32)
    else:
        value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes, role=role, std=std, active=active)


def use(param: nnx.Param, like: jax.Array) -> jax.Array:
    """The parameter as a matmul wants it: gathered over fsdp, in the type of `like`."""
    axes = param.get_metadata()["axes"]
    return jax.reshard(param[...].astype(like.dtype), spec(axes, gathered=True))


class Matrix(NamedTuple):
    """How a parameter is kept, and how a product wants it."""

    kept: P
    dtype: Any
    used: P  # gathered over fsdp


def times(formula: str, x: jax.Array, param: nnx.Param, out_spec: P) -> jax.Array:
    """`product` of activations [b, t, …] with a declared parameter, which may be `Turned`."""
    axes, w = param.get_metadata()["axes"], param.get_value()
    if not isinstance(w, Turned):
        return product(formula, x, w, spec(axes, gathered=True), out_spec)
    b, t = x.shape[:2]
    x_bti = x.reshape(b, t, -1, out_sharding=P(*jax.typeof(x).sharding.spec[:3]))
    y_bto = times_turned(x_bti, w, axes, P(*out_spec[:3]))
    return y_bto.reshape(b, t, *w.outputs, out_sharding=out_spec)


def product(
    formula: str,
    x: jax.Array,
    w: jax.Array,
    used: P,
    out_spec: P,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`einsum(formula, x, w)` of activations with a matrix, laid out as `out_spec`, in `dtype` or
    that of `x`; with a gradient of its own, equal to einsum's but for rounding. `w` is multiplied
    in the type of `x` and laid out as `used`; its gradient is summed over rows and devices in its
    own type, float32, and laid out as `w` is.

    A CPU multiplies only what it can read along rows, so the gradient of a matrix needs `x` or the
    output's gradient transposed. Autodiff has it transpose the latter, fused with the backward of
    a non-linearity, which is slow; here it is `x`, or the smaller of the two (docs/performance.md).
    """
    matrix = Matrix(jax.typeof(w).sharding.spec, w.dtype, used)
    return _product(formula, matrix, out_spec, dtype, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _product(
    formula: str, matrix: Matrix, out_spec: P, dtype: Any, x: jax.Array, w: jax.Array
) -> jax.Array:
    return _product_fwd(formula, matrix, out_spec, dtype, x, w)[0]


def _product_fwd(
    formula: str, matrix: Matrix, out_spec: P, dtype: Any, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    w = jax.reshard(w.astype(x.dtype), matrix.used)
    y = jnp.einsum(formula, x, w, preferred_element_type=dtype, out_sharding=out_spec)
    return y, (x, w)


def _product_bwd(
    formula: str,
    matrix: Matrix,
    out_spec: P,
    dtype: Any,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    ins, out = formula.split("->")
    of_x, of_w = ins.split(",")
    dx = jnp.einsum(f"{out},{of_w}->{of_x}", dy, w, out_sharding=jax.typeof(x).sharding)
    (first, of_first), (second, of_second) = (x, of_x), (dy, out)
    if math.prod(x.shape) > math.prod(dy.shape):
        (first, of_first), (second, of_second) = (dy, out), (x, of_x)
    order = sorted(range(w.ndim), key=lambda i: of_w[i] not in of_first)
    dw = jnp.einsum(
        f"{of_first},{of_second}->{''.join(of_w[i] for i in order)}",
        first,
        second,
        preferred_element_type=matrix.dtype,
        out_sharding=P(*[matrix.kept[i] for i in order]),
    )
    if order != sorted(order):  # without the barrier XLA turns the product round again
        dw = jax.lax.optimization_barrier(dw).transpose([order.index(i) for i in range(w.ndim)])
    return dx.astype(x.dtype), dw.astype(matrix.dtype)


_product.defvjp(_product_fwd, _product_bwd)


def lookup(param: nnx.Param, ids: jax.Array, out_spec: P, dtype: Any) -> jax.Array:
    """Rows of a table of parameters, in `dtype`; its gradient is summed in its own type, float32.
    The table is gathered whole: a lookup in a vocab-sharded table has no cheap rule."""
    table = param[...]
    kept = (table.shape, table.dtype, jax.typeof(table).sharding.spec)
    return _lookup(kept, out_spec, dtype, table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _lookup(kept: Any, out_spec: P, dtype: Any, table: jax.Array, ids: jax.Array) -> jax.Array:
    whole = jax.reshard(table.astype(dtype), P(None, None))
    return whole.at[ids].get(out_sharding=out_spec)


def _lookup_fwd(kept: Any, out_spec: P, dtype: Any, table: jax.Array, ids: jax.Array) -> Any:
    return _lookup(kept, out_spec, dtype, table, ids), ids


def _lookup_bwd(kept: Any, out_spec: P, dtype: Any, ids: jax.Array, dy: jax.Array) -> Any:
    shape, of, layout = kept
    _, back = jax.vjp(lambda w: w.at[ids].get(out_sharding=out_spec), jnp.zeros(shape, of))
    return jax.reshard(back(dy.astype(of))[0], layout), None


_lookup.defvjp(_lookup_fwd, _lookup_bwd)


def plus(y: jax.Array, bias: nnx.Param) -> jax.Array:
    """`y` and a bias, added in float32, as is the bias's gradient."""
    y32 = y.astype(jnp.float32)
    return (y32 + use(bias, y32)).astype(y.dtype)


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016), in float32."""

    def __init__(self, width: int, axis: str, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.centred, self.eps = config.norm == "layernorm", config.norm_eps
        self.gain = declare(rngs, (width,), (axis,), "gain", 1.0)
        bias = config.bias and self.centred
        self.bias = declare(rngs, (width,), (axis,), "bias", 0.0) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.centred:
            x32 = x32 - x32.mean(-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        y = y * use(self.gain, y)
        if self.bias is not None:
            y = y + use(self.bias, y)
        return y.astype(x.dtype)


def activated(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """The non-linearity of a feed-forward layer; gated ones (Shazeer 2020) have two inputs."""
    if gate is not None:
        return (jax.nn.silu(gate) if kind == "swiglu" else gelu(gate)) * up
    if kind == "gelu_exact":
        return jax.nn.gelu(up, approximate=False)
    if kind == "gelu":
        return gelu(up)
    y = jax.nn.relu(up)
    return jnp.square(y) if kind == "relu2" else y


def gelu(x: jax.Array) -> jax.Array:
    """GELU's tanh form, written with the logistic function: the same number, fewer operations."""
    return x * jax.nn.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


def dropout(x: jax.Array, rate: float, key: jax.Array | None, place: int) -> jax.Array:
    """`x` with a share `rate` set to 0 and the rest scaled up (Srivastava et al. 2014); `x` itself
    without a key. `place` tells the uses of one key apart."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, place), 1.0 - rate, x.shape)
    return jnp.where(jax.reshard(keep, jax.typeof(x).sharding), x / (1.0 - rate), 0.0)
