"""Sums that do not depend on how many devices there are: `train.deterministic_reduce`.

The rows of a batch fall into a fixed number of virtual shards. Each is computed for itself, in the
same shapes wherever it lies, and what the shards give is added up pairwise, in one tree. Devices
have whole branches of it: they add those up alone, and the trunk among themselves.

A device has at least two shards (`mesh.check_divides`), so that a shard is always the body of a
loop: no compiler can then fuse what is computed of it with what becomes of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from jaxlm import mesh
from jaxlm.mesh import DATA, spec

OfShard = Callable[[Any, Any, jax.Array], Any]
"""(what all shards share, the rows of one, its number) → a tree of arrays."""


def summed(f: OfShard, shards: int, same: Any, batch: Any) -> Any:
    """Σ of `f(same, part, number)` over the virtual shards of `batch` [b, …]; 0: it is one part."""
    if not shards:
        return f(same, batch, jnp.int32(0))

    def of_device(same: Any, rows: Any) -> Any:
        parts, n = _parts(rows, shards)
        found = _pairwise(lambda part: f(same, *part), parts, n)
        return jax.tree.map(_among_devices, found)

    return _on_devices(of_device, P())(same, batch)


def each(f: OfShard, shards: int, same: Any, batch: Any) -> Any:
    """`f(same, part, number)` of every virtual shard, leaves [b / shards, …] back as [b, …]."""
    if not shards:
        return f(same, batch, jnp.int32(0))

    def of_device(same: Any, rows: Any) -> Any:
        parts, _ = _parts(rows, shards)
        found = jax.lax.map(lambda part: f(same, *part), parts)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    return _on_devices(of_device, spec(("batch",)))(same, batch)


def alone(f: Callable[..., Any], holds: jax.Array) -> Callable[..., Any]:
    """`f` of what is the same everywhere, by each device for itself, compiled alike whatever it
    follows: as a branch, of which the compiler cannot know that it is always taken (`holds`: true),
    with arguments that have only one layout."""

    def of_device(holds: jax.Array, *args: Any) -> Any:
        def taken(flat: Any) -> Any:
            return f(*jax.tree.map(lambda x, like: x.reshape(like.shape), flat, args))

        def other(flat: Any) -> Any:
            made = jax.eval_shape(taken, flat)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)

        return jax.lax.cond(holds, taken, other, jax.tree.map(jnp.ravel, args))

    everywhere = jax.shard_map(of_device, in_specs=P(), out_specs=P(), check_vma=False)
    return functools.partial(everywhere, holds)


def _on_devices(of_device: Callable[[Any, Any], Any], out: P) -> Callable[[Any, Any], Any]:
    # Unchecked: the gradient of what is the same everywhere is to stay each device's own.
    return jax.shard_map(
        of_device, in_specs=(P(), spec(("batch",))), out_specs=out, axis_names={DATA},
        check_vma=False,
    )  # fmt: skip


def _parts(rows: Any, shards: int) -> tuple[Any, int]:
    """The device's own shards with their numbers, leaves [n, …], and how many they are."""
    n = shards // mesh.size(DATA)
    numbers = jax.lax.axis_index(DATA) * n + jnp.arange(n)
    return (jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), rows), numbers), n


def _pairwise(f: Callable[[Any], Any], parts: Any, n: int) -> Any:
    """Σ of `f(part)`: that of the first half plus that of the second, each added up so."""
    if n == 1:
        return f(jax.tree.map(lambda x: x[0], parts))
    halves = jax.tree.map(lambda x: x.reshape(2, n // 2, *x.shape[1:]), parts)
    both = jax.lax.map(lambda half: _pairwise(f, half, n // 2), halves)
    return jax.tree.map(lambda x: x[0] + x[1], both)


def _among_devices(x: jax.Array) -> jax.Array:
    """The tree's trunk: with its neighbour, then with the pair beside, …, each adds what it has.
    a + b is b + a to the bit, so all have the same."""
    n, k = mesh.size(DATA), 1
    while k < n:
        x = x + jax.lax.ppermute(x, DATA, [(i, i ^ k) for i in range(n)])
        k *= 2
    return x
