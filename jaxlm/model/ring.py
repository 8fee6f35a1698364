"""Attention over sequences that are cut up along the mesh axis `context` (Liu et al. 2023).

Queries stay where they are; keys and values go round the devices, and each query keeps a running
softmax. The backward pass goes round once more and recomputes the scores, so that no device ever
holds more than its own part of anything. Scores and sums are float32.

A causal stack is balanced as in Llama 3 (2024, §3.3.2): of 2n pieces device i has pieces i and
2n - 1 - i ("zig-zag"), and in every step computes two of the four products of pieces, all of which
some query sees. `model.stacks` brings a stack's input into this order and its output back.
Shape suffixes besides those of `attention`: p pieces of a device (1, or 2 where balanced).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import mesh
from jaxlm.mesh import CONTEXT, spec

NEGATIVE = -1e30  # as in `attention`

# ------------------------------------------------------------------------------- order of a stack


def balanced(causal: bool, prefix_bs: jax.Array | None) -> bool:
    """Whether a stack runs in zig-zag order: where all that a query sees is before it."""
    return causal and prefix_bs is None and mesh.size(CONTEXT) > 1


def order(t: int) -> np.ndarray:
    """Which slot of a sequence stands where in zig-zag order, int [t]."""
    n = mesh.size(CONTEXT)
    pieces = np.arange(t).reshape(2 * n, -1)
    return np.concatenate([pieces[[i, 2 * n - 1 - i]].reshape(-1) for i in range(n)])


def to_zigzag(x: jax.Array) -> jax.Array:
    """An array [b, t, …] into zig-zag order."""
    return _exchanged(x, back=False)


def from_zigzag(x: jax.Array) -> jax.Array:
    return _exchanged(x, back=True)


def _exchanged(x: jax.Array, back: bool) -> jax.Array:
    """Each device has one even and one odd piece in both orders, so two permutations do."""
    n = mesh.size(CONTEXT)
    layout = spec(("batch", "seq", *[None] * (x.ndim - 2)))

    def zigzag(piece: int) -> int:
        return min(piece, 2 * n - 1 - piece)

    def exchange(x: jax.Array) -> jax.Array:
        i = jax.lax.axis_index(CONTEXT)
        here = x.reshape(x.shape[0], 2, -1, *x.shape[2:])
        first = jnp.where(i % 2, 1, 0) if back else jnp.zeros_like(i)  # the even piece's place
        moved = []
        for parity in (0, 1):
            ways = [(j, zigzag(2 * j + parity)) for j in range(n)]
            ways = [(b, a) for a, b in ways] if back else ways
            mine = jax.lax.dynamic_index_in_dim(here, first ^ parity, 1, keepdims=False)
            moved.append(jax.lax.ppermute(mine, CONTEXT, ways))
        swap = jnp.zeros_like(i) if back else i % 2
        even, odd = moved
        pieces = [jnp.where(swap == k, even, odd) for k in (0, 1)]
        return jnp.concatenate(pieces, axis=1)

    return mesh.local(exchange, (layout,), layout)(x)


# -------------------------------------------------------------------------------------- attention


class Rule(NamedTuple):
    """What is static of an attention."""

    causal: bool
    soft_cap: float | None
    zigzag: bool
    n: int  # devices in the ring


class Keys(NamedTuple):
    """What goes round: the keys of one device."""

    k_pbgsk: jax.Array
    v_pbgsk: jax.Array
    segments_pbs: jax.Array
    slots_ps: jax.Array
    prefix_pbs: jax.Array  # bool


class Queries(NamedTuple):
    """What stays."""

    q_pbgrtk: jax.Array
    segments_pbt: jax.Array
    slots_pt: jax.Array
    window: jax.Array  # int32
    bias_pgrts: jax.Array | None  # of this device's queries and all keys


def attend(
    q_bgrtk: jax.Array,
    k_bgsk: jax.Array,
    v_bgsk: jax.Array,
    segments_bt: jax.Array,
    segments_bs: jax.Array,
    causal: bool,
    window: Any = None,
    soft_cap: float | None = None,
    bias_hts: jax.Array | None = None,
    prefix_bs: jax.Array | None = None,
) -> jax.Array:
    """Attention [b, g, r, t, k] of scaled queries, t and s cut by context; see `attention.attend`.

    Where `balanced`, everything is in zig-zag order, the bias [h, t, s] in both.
    """
    zigzag, n = balanced(causal, prefix_bs), mesh.size(CONTEXT)
    rule = Rule(causal, soft_cap, zigzag, n)
    t, s, pieces = q_bgrtk.shape[3], k_bgsk.shape[2], 2 if zigzag else 1
    slots_t, slots_s = (
        jnp.asarray(order(m) if zigzag else np.arange(m), jnp.int32) for m in (t, s)
    )
    window = jnp.asarray(jnp.iinfo(jnp.int32).max if window is None else window, jnp.int32)
    if prefix_bs is None:
        prefix_bs = jnp.zeros_like(segments_bs, bool)
    if bias_hts is not None:
        by_group = spec(("kv_heads", None, "seq", None))
        shape = (*q_bgrtk.shape[1:3], t, s)
        bias_hts = bias_hts.reshape(shape, out_sharding=by_group)
    by_query, by_key = ("batch", "kv_heads", None, "seq", None), ("batch", "kv_heads", "seq", None)
    rows = ("batch", "seq")
    layouts = [by_query, by_key, by_key, rows, rows, rows, ("seq",), ("seq",), ()]
    given = [q_bgrtk, k_bgsk, v_bgsk, segments_bt, segments_bs, prefix_bs, slots_t, slots_s, window]
    if bias_hts is not None:
        given, layouts = [*given, bias_hts], [*layouts, ("kv_heads", None, "seq", None)]

    def of_device(q, k, v, seg_t, seg_s, prefix, slots_t, slots_s, window, *bias):
        cut = functools.partial(_cut, pieces=pieces)
        keys = Keys(cut(k, 2), cut(v, 2), cut(seg_s, 1), cut(slots_s, 0), cut(prefix, 1))
        queries = Queries(
            cut(q, 3), cut(seg_t, 1), cut(slots_t, 0), window, cut(bias[0], 2) if bias else None
        )
        # All that is differentiated varies over the same axes: its gradients are then summed
        # outside of the rule below, where they must be.
        axes = jax.typeof(q).mat.varying
        queries, keys = jax.tree.map(lambda x: _varying(x, axes), (queries, keys))
        y = _ring(rule, queries, keys)
        return jnp.concatenate([y[p] for p in range(pieces)], axis=3)

    specs = tuple(spec(layout) for layout in layouts)
    return mesh.local(of_device, specs, specs[0])(*given)


def _cut(x: jax.Array, axis: int, pieces: int) -> jax.Array:
    """[…, t, …] → [p, …, t / p, …]."""
    return jnp.stack(jnp.split(x, pieces, axis=axis))


def _varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(axes - jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(rule: Rule, queries: Queries, keys: Keys) -> jax.Array:
    """[p, b, g, r, t, k]."""
    return _ring_fwd(rule, queries, keys)[0]


def _pairs(rule: Rule, source: Any) -> list[tuple[Any, Any]]:
    """(piece of the queries, piece of the keys) that meet where the keys are device `source`'s
    (None: one's own)."""
    if not rule.zigzag:
        return [(0, 0)]
    if source is None:
        return [(0, 0), (1, 0), (1, 1)]
    # A device before this one has its first piece before both of ours, its second one behind them;
    # one behind has both of its pieces between ours.
    late = jnp.where(source < jax.lax.axis_index(CONTEXT), 0, 1)
    return [(1, 0), (late, late)]


def _scores(
    rule: Rule, queries: Queries, keys: Keys, source: Any, pair: tuple[Any, Any]
) -> tuple[Callable[..., jax.Array], tuple[Any, ...], jax.Array]:
    """Of one pair of pieces: a function of (q, k, bias) to scores [b, g, r, t, s] before the mask,
    its arguments, and the mask."""
    i, j = pair
    back = queries.slots_pt[i][:, None] - keys.slots_ps[j][None, :]
    seen = queries.segments_pbt[i][:, :, None] == keys.segments_pbs[j][:, None, :]
    if rule.causal:
        seen = seen & ((back >= 0) | keys.prefix_pbs[j][:, None, :])
    seen = seen & (back < queries.window)
    bias = None
    if queries.bias_pgrts is not None:
        start = _column(rule, queries, keys, source, j)
        width = keys.slots_ps.shape[1]
        bias = jax.lax.dynamic_slice_in_dim(queries.bias_pgrts[i], start, width, axis=-1)

    def of(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
        scores = jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=jnp.float32)
        if rule.soft_cap is not None:
            scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
        return scores if bias is None else scores + bias

    return of, (queries.q_pbgrtk[i], keys.k_pbgsk[j], bias), seen[:, None, None]


def _column(rule: Rule, queries: Queries, keys: Keys, source: Any, piece: Any) -> Any:
    """Where the bias of a piece of keys begins."""
    pieces, width = keys.slots_ps.shape
    source = jax.lax.axis_index(CONTEXT) if source is None else source
    return (source * pieces + piece) * width


def _around(rule: Rule, step: Any, tree: Any) -> tuple[Any, Any]:
    """The tree of the device before, and whose keys one has after so many such steps."""
    ways = [(i, (i + 1) % rule.n) for i in range(rule.n)]
    moved = jax.tree.map(lambda x: jax.lax.ppermute(x, CONTEXT, ways), tree)
    return moved, (jax.lax.axis_index(CONTEXT) - step) % rule.n


def _ring_fwd(rule: Rule, queries: Queries, keys: Keys) -> tuple[jax.Array, Any]:
    def meet(sums: Any, keys: Keys, source: Any) -> Any:
        for pair in _pairs(rule, source):
            of, arguments, seen = _scores(rule, queries, keys, source, pair)
            scores = jnp.where(seen, of(*arguments), NEGATIVE)
            most, total, y = (x[pair[0]] for x in sums)
            new = jnp.maximum(most, scores.max(-1))
            weights, old = jnp.exp(scores - new[..., None]), jnp.exp(most - new)
            value = keys.v_pbgsk[pair[1]]
            part = jnp.einsum(
                "bgrts,bgsk->bgrtk", weights.astype(value.dtype), value,
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            total, y = total * old + weights.sum(-1), y * old[..., None] + part
            sums = tuple(x.at[pair[0]].set(a) for x, a in zip(sums, (new, total, y), strict=True))
        return sums

    def step(carry: Any, number: jax.Array) -> Any:
        sums, keys = carry
        keys, source = _around(rule, number, keys)
        return (meet(sums, keys, source), keys), None

    like = queries.q_pbgrtk.astype(jnp.float32)
    zero = jnp.zeros_like(like[..., 0])
    start = (zero + NEGATIVE, zero, jnp.zeros_like(like))
    start = jax.tree.map(lambda x: _varying(x, jax.typeof(like).mat.varying), start)
    sums = meet(start, keys, None)
    (most, total, y), _ = jax.lax.scan(step, (sums, keys), jnp.arange(1, rule.n))[0]
    y = y / total[..., None]
    log_z = most + jnp.log(total)
    return y.astype(queries.q_pbgrtk.dtype), (queries, keys, y, log_z)


def _ring_bwd(rule: Rule, saved: Any, dy: jax.Array) -> tuple[Any, Any]:
    queries, keys, y, log_z = saved
    dy32 = dy.astype(jnp.float32)
    drop = jnp.sum(dy32 * y, axis=-1)  # Σ weights · their gradient

    def meet(grads: Any, dkeys: Any, keys: Keys, source: Any) -> Any:
        (dq, dbias), (dk, dv) = grads, dkeys
        for i, j in _pairs(rule, source):
            of, arguments, seen = _scores(rule, queries, keys, source, (i, j))
            scores, pull = jax.vjp(of, *arguments)
            weights = jnp.exp(jnp.where(seen, scores, NEGATIVE) - log_z[i][..., None])
            value = keys.v_pbgsk[j]
            ours = dy[i].astype(value.dtype)
            dw = jnp.einsum("bgrtk,bgsk->bgrts", ours, value, preferred_element_type=jnp.float32)
            dv = dv.at[j].add(
                jnp.einsum(
                    "bgrts,bgrtk->bgsk", weights.astype(value.dtype), ours,
                    preferred_element_type=jnp.float32,
                )
            )  # fmt: skip
            ds = jnp.where(seen, weights * (dw - drop[i][..., None]), 0.0)
            more_q, more_k, more_bias = pull(ds)
            dq = dq.at[i].add(more_q.astype(jnp.float32))
            dk = dk.at[j].add(more_k.astype(jnp.float32))
            if dbias is not None:
                at = (i, 0, 0, 0, _column(rule, queries, keys, source, j))
                was = jax.lax.dynamic_slice(dbias, at, (1, *more_bias.shape))
                dbias = jax.lax.dynamic_update_slice(dbias, was + more_bias[None], at)
        return (dq, dbias), (dk, dv)

    def step(carry: Any, number: jax.Array) -> Any:
        grads, dkeys, keys = carry
        (keys, dkeys), source = _around(rule, number, (keys, dkeys))
        return (*meet(grads, dkeys, keys, source), keys), None

    def zeros(x: jax.Array | None) -> Any:
        if x is None:
            return None
        return _varying(jnp.zeros(x.shape, jnp.float32), jax.typeof(x).mat.varying)

    grads = (zeros(queries.q_pbgrtk), zeros(queries.bias_pgrts))
    grads, dkeys = meet(grads, (zeros(keys.k_pbgsk), zeros(keys.v_pbgsk)), keys, None)
    carry = jax.lax.scan(step, (grads, dkeys, keys), jnp.arange(1, rule.n))[0]
    (dq, dbias), dkeys, _ = carry
    (dk, dv), _ = _around(rule, 0, dkeys)  # home
    dq = dq.astype(queries.q_pbgrtk.dtype)
    dk, dv = dk.astype(keys.k_pbgsk.dtype), dv.astype(keys.v_pbgsk.dtype)
    dqueries = jax.tree.map(_nothing, queries._replace(q_pbgrtk=None, bias_pgrts=None))
    dothers = jax.tree.map(_nothing, keys._replace(k_pbgsk=None, v_pbgsk=None))
    return (
        dqueries._replace(q_pbgrtk=dq, bias_pgrts=dbias),
        dothers._replace(k_pbgsk=dk, v_pbgsk=dv),
    )


def _nothing(x: jax.Array) -> Any:
    """The gradient of integers."""
    return np.zeros(x.shape, jax.dtypes.float0)


_ring.defvjp(_ring_fwd, _ring_bwd)
