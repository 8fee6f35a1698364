"""Permutations of 0 … n - 1 of which each entry is computed alone.

Seeking costs nothing, and no permutation is ever held in memory.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 8  # of the cipher


def indices(windows: int, seed: int, samples: np.ndarray, stream: int = 0) -> np.ndarray:
    """Which window each sample of a run is: int64, the shape of `samples`.

    Args:
      windows: windows in an epoch; each epoch is a fresh permutation of them.
      seed: of the order.
      samples: int, any shape: sample numbers from 0 (the first sequence of the run) without end.
      stream: another order for the same seed.
    """
    samples = np.asarray(samples, np.int64)
    epochs, within = np.divmod(samples, windows)
    out = np.empty_like(samples)
    for epoch in np.unique(epochs).tolist():
        # Not seed + epoch: then epoch 1 of seed 0 would be epoch 0 of seed 1.
        entropy = [seed % 2**64, epoch, *([stream] if stream else [])]
        keys = np.random.SeedSequence(entropy).generate_state(ROUNDS, np.uint64)
        now = epochs == epoch
        out[now] = _permuted(within[now], windows, keys)
    return out


def _permuted(numbers: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The images of `numbers` (int64 [k], below n) under the permutation of 0 … n - 1 that `keys`
    (uint64 [ROUNDS]) select.

    A Feistel cipher on pairs (left < a, right < b), with a·b just above n, applied again to the
    few that it takes beyond n (Black and Rogaway 2002: generalized Feistel, cycle walking).
    grain's `index_shuffle` is the same idea, but takes 3 µs per number, and 500 where n is 100.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    out = numbers.astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        left, right = np.divmod(out[outside], np.uint64(b))
        for even, odd in keys.reshape(-1, 2):
            left = (left + _mixed(right ^ even) % np.uint64(a)) % np.uint64(a)
            right = (right + _mixed(left ^ odd) % np.uint64(b)) % np.uint64(b)
        out[outside] = left * np.uint64(b) + right
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014, figure 16)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
