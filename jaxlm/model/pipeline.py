"""Layers cut up along the mesh axis `stage`: a pipeline of micro-batches.

Every stage works on another micro-batch at the same time and hands its output to the next one
(`shard_map` over `stage` alone; what is inside a stage is laid out on the other axes as always).
With one repeat it is GPipe (Huang et al. 2019). With r repeats layers go round the stages r times
("circular", as the interleaved schedule of Narayanan et al. 2021, §2.2): of S stages and M
micro-batches idle a share (S - 1) / (r M + S - 1). The layers lie in the state in their order,
whatever the schedule; a circular one exchanges them between stages once per pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from jaxlm import mesh
from jaxlm.mesh import STAGE

Through = Callable[[jax.Array, Any, Any, Any, jax.Array], tuple[jax.Array, Any]]
"""(x [b, t, d], rows, layers, memory, number of the micro-batch) → x, sums [l, …] of the layers.
What all of them share comes first."""


def run(
    through: Any,
    shared: Any,
    x_btd: jax.Array,
    rows: Any,
    layers: Any,
    memory: Any,
    repeats: int,
    microbatches: int,
) -> tuple[jax.Array, Any]:
    """x through all layers, and the means over micro-batches of what each layer sums up.

    `through(shared, …)` is as `Through`. `rows` are arrays [b, …], `layers` [l, …], `memory`
    [l, b, …]. `microbatches`: 0 for four per stage; fewer are taken where the rows of a device do
    not divide into as many.
    """
    stages = mesh.size(STAGE)
    wanted = min(microbatches or 4 * stages, x_btd.shape[0] // mesh.parts("batch"))
    m = max(n for n in range(1, wanted + 1) if x_btd.shape[0] // mesh.parts("batch") % n == 0)
    split = jax.tree.map(lambda x: _split(x, m, 0), (x_btd, rows))
    by_layer = (layers, jax.tree.map(lambda x: _split(x, m, 1), memory))

    def of_stage(shared: Any, split: Any, by_layer: Any) -> tuple[jax.Array, Any]:
        x_mbtd, rows = split
        layers, memory = _circulated(by_layer, stages, repeats)
        with_shared = functools.partial(through, shared)
        return _stage(with_shared, x_mbtd, rows, layers, memory, stages, m)

    in_specs, out_specs = (P(), P(), P(STAGE)), (P(), P(None, STAGE))
    y_mbtd, sums = _over_stages(of_stage, in_specs, out_specs)(shared, split, by_layer)
    # Of a repeat each stage has some layers: in the order of all, no stage's lie together.
    sums = jax.tree.map(lambda x: jax.reshard(x, P()).reshape(-1, *x.shape[2:]), sums)
    return _joined(y_mbtd), sums


def by_stage(f: Callable[..., Any], layers: Any, x: jax.Array) -> Any:
    """`f(layers, x)` on each stage's own layers; both lead with the layer axis, also the result."""
    return _over_stages(f, (P(STAGE), P()), P(STAGE))(layers, x)


def _over_stages(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    return jax.shard_map(
        f, in_specs=in_specs, out_specs=out_specs, axis_names={STAGE}, check_vma=False
    )  # as in `mesh.local`, which may be inside


def _split(x: jax.Array, m: int, axis: int) -> jax.Array:
    """The batch axis [b] → [m, b / m]; rows stay on their device."""
    before, (rows, *after) = x.shape[:axis], x.shape[axis:]
    layout = list(jax.typeof(x).sharding.spec)
    layout.insert(axis + 1, None)
    shape = (*before, rows // m, m, *after)
    return x.reshape(shape, out_sharding=P(*layout)).swapaxes(axis, axis + 1)


def _joined(x: jax.Array) -> jax.Array:
    layout = jax.typeof(x).sharding.spec
    x = x.swapaxes(0, 1)
    return x.reshape(-1, *x.shape[2:], out_sharding=P(layout[1], *layout[2:]))


def _stage(
    through: Through, x_mbtd: jax.Array, rows: Any, layers: Any, memory: Any, stages: int, m: int
) -> tuple[jax.Array, Any]:
    """What one stage does: in tick k it has item k - its number, where items are the micro-batches
    of the first repeat, then of the second …; a period between them leaves room to come back."""
    here = jax.lax.axis_index(STAGE)
    repeats = len(jax.tree.leaves(layers)[0])
    period = max(m, stages)
    ticks = (repeats - 1) * period + m + stages - 1
    ways = [(i, (i + 1) % stages) for i in range(stages)]

    def store(kept_mbtd: jax.Array, arrived: jax.Array, tick: Any) -> jax.Array:
        """The first stage keeps what the last one has finished, to send it round again."""
        item = tick - stages
        at = jnp.clip(item, 0) % period
        ok = (here == 0) & (item >= 0) & (at < m)
        at = jnp.minimum(at, m - 1)
        return kept_mbtd.at[at].set(jnp.where(ok, arrived, kept_mbtd[at]))

    def step(carry: Any, tick: jax.Array) -> Any:
        kept_mbtd, arrived, sums = carry
        kept_mbtd = store(kept_mbtd, arrived, tick)
        item = tick - here
        repeat, number = jnp.clip(item // period, 0, repeats - 1), item % period
        ok = (item >= 0) & (item // period < repeats) & (number < m)
        number = jnp.minimum(number, m - 1)
        first = kept_mbtd[jnp.minimum(tick % period, m - 1)]
        x_btd = jnp.where(here == 0, first, arrived)
        x_btd, more = through(
            x_btd,
            jax.tree.map(lambda x: x[number], rows),
            jax.tree.map(lambda x: x[repeat], layers),
            jax.tree.map(lambda x: x[repeat][:, number], memory),
            number,
        )
        sums = jax.tree.map(lambda s, x: s.at[repeat].add(jnp.where(ok, x, 0.0) / m), sums, more)
        return (kept_mbtd, jax.lax.ppermute(x_btd, STAGE, ways), sums), None

    no_sums = _no_sums(through, x_mbtd, rows, layers, memory, repeats)
    start = (x_mbtd, jnp.zeros_like(x_mbtd[0]), no_sums)
    carry, _ = jax.lax.scan(step, start, jnp.arange(ticks))
    kept_mbtd, arrived, sums = carry
    kept_mbtd = store(kept_mbtd, arrived, ticks)
    return jax.lax.psum(jnp.where(here == 0, kept_mbtd, 0.0), STAGE), sums


def _no_sums(
    through: Through, x_mbtd: jax.Array, rows: Any, layers: Any, memory: Any, repeats: int
) -> Any:
    """Zeros in the shape of every layer's sums, [repeat, l, …]."""
    x_btd, rows, layers = jax.tree.map(lambda x: x[0], (x_mbtd, rows, layers))
    memory = jax.tree.map(lambda x: x[0][:, 0], memory)
    _, sums = jax.eval_shape(through, x_btd, rows, layers, memory, jnp.int32(0))
    return jax.tree.map(lambda x: jnp.zeros((repeats, *x.shape), x.dtype), sums)


def _circulated(layers: Any, stages: int, repeats: int) -> Any:
    """A stage's layers [l, …] as [repeat, l / repeats, …]. Of the r S pieces of all layers, stage
    d owns d r … d r + r - 1 and works on those that are d modulo S.

    In round q every stage sends one piece; the rotation by d g / S makes the r rounds permutations
    (g: what r and S have in common).
    """
    pieces = jax.tree.map(lambda x: x.reshape(repeats, -1, *x.shape[1:]), layers)
    if repeats == 1:
        return pieces
    here = jax.lax.axis_index(STAGE)
    group = stages // math.gcd(repeats, stages)

    def piece(d: Any, q: int) -> Any:
        """The piece, of all, that stage d sends in round q."""
        return d * repeats + (q + d // group) % repeats

    out = jax.tree.map(jnp.zeros_like, pieces)
    for q in range(repeats):
        ways = [(d, piece(d, q) % stages) for d in range(stages)]
        sender = jnp.array([a for a, _ in sorted(ways, key=lambda way: way[1])])[here]
        at = piece(sender, q) // stages
        for_q = jax.tree.map(lambda x, q=q: x[piece(here, q) % repeats], pieces)
        moved = jax.tree.map(lambda x, w=ways: jax.lax.ppermute(x, STAGE, w), for_q)
        out = jax.tree.map(lambda o, x, at=at: o.at[at].set(x), out, moved)
    return out
