"""What identifies the values of an array, whatever mesh they are spread over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


def describe(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of numpy or jax arrays: name → shape: [int], dtype: str, digest: 16 hex digits, finite: bool.

    The digest is the sum mod 2^64, over elements, of a mixed (position, bits): one changed element
    always changes it, and shards and hosts add theirs up in any order, so no mesh is part of it.
    Where several processes hold the arrays, all of them call this with the same names.
    """
    sums = np.array([_digest(x) for x in arrays.values()], np.uint64)
    finite = np.array([_finite(x) for x in arrays.values()], bool)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # As pairs of uint32: jax has no uint64 by default.
        halves = np.stack([sums >> np.uint64(32), sums & np.uint64(2**32 - 1)]).astype(np.uint32)
        every = np.asarray(multihost_utils.process_allgather(halves)).astype(np.uint64)
        sums = ((every[:, 0] << np.uint64(32)) + every[:, 1]).sum(axis=0, dtype=np.uint64)
        finite = np.all(multihost_utils.process_allgather(finite), axis=0)
    return {
        name: {
            "shape": list(x.shape),
            "dtype": str(np.dtype(x.dtype)),
            "digest": f"{int(total):016x}",
            "finite": bool(ok),
        }
        for (name, x), total, ok in zip(arrays.items(), sums, finite, strict=True)
    }


def _pieces(array: Any) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """(where, values) of what this process holds of an array, each element once over all."""
    if isinstance(array, np.ndarray):
        yield tuple(slice(0, n) for n in array.shape), array
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, np.asarray(shard.data)


def _finite(array: Any) -> bool:
    if np.issubdtype(array.dtype, np.integer) or array.dtype == bool:
        return True
    return all(bool(np.isfinite(values).all()) for _, values in _pieces(array))


def _digest(array: Any, chunk: int = 1 << 14) -> int:
    total = 0
    for where, values in _pieces(array):
        bits = np.ascontiguousarray(values).reshape(-1)
        bits = bits.view(f"u{bits.itemsize}")
        whole = values.shape == array.shape
        for start in range(0, bits.size, chunk):
            part = bits[start : start + chunk].astype(np.uint64)
            position = np.arange(start, start + part.size, dtype=np.uint64)
            if not whole:
                position = _global_position(position, values.shape, where, array.shape)
            total += int(_mix(part ^ (position * np.uint64(0x9E3779B97F4A7C15))).sum())
    return total % 2**64


def _global_position(
    position: np.ndarray, shape: tuple[int, ...], where: tuple[slice, ...], full: tuple[int, ...]
) -> np.ndarray:
    """Flat positions in a piece, as flat positions in the array that it is cut from."""
    local = np.unravel_index(position.astype(np.int64), shape)
    index = [i + (s.start or 0) for i, s in zip(local, where, strict=True)]
    return np.ravel_multi_index(index, full).astype(np.uint64)


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014), a bijection; changes `z`."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
