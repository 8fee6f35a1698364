"""Token shards to batches. The order of samples is a pure function of (seed, sample number).

So the position of a run is one integer, the number of sequences consumed, and hosts, workers,
prefetching, mesh and the way a batch is split cannot change what comes at which position.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data import shards, tokenizer
from jaxlm.schema import UserError

PREFETCHED_CHUNKS = 2
ROUNDS = 8  # of the cipher that shuffles


class Batch(NamedTuple):
    """Sequences for a model, numpy on the host or jax arrays on devices (a pytree either way).

    All leaves are [b, t] (a chunk of steps: [steps, b, t]).
    """

    tokens: Any  # int32
    targets: Any  # int32: the token after each token
    weights: Any  # float32: 0 where the target begins another document, else 1
    segment_ids: Any  # int32: 1, 2, …: which document of this window; attention stays inside one
    positions: Any  # int32: 0, 1, …: since the document's start, or the window's if that is later


@dataclass(frozen=True)
class Dataset:
    """One split as windows of `seq_len + 1` tokens at stride `seq_len`.

    Each token but the first is a target exactly once per epoch; the tokens after the last whole
    window are left out.
    """

    tokens: np.ndarray  # uint8/16/32 [n], memory-mapped
    offsets: np.ndarray  # int64 [documents + 1]
    token_bytes: np.ndarray  # int32 [vocab], see `Tokenizer.token_bytes`
    seq_len: int

    @classmethod
    def open(cls, directory: str | os.PathLike[str], split: str, seq_len: int) -> Dataset:
        """The 'train' or 'eval' split that `shards.build` made.

        Raises UserError if it holds less than one window, JaxlmError if a file is damaged.
        """
        out = Path(directory)
        manifest = shards.read_manifest(out)
        tokens = shards.open_array(out, manifest, split, "tokens")
        if len(tokens) <= seq_len:
            raise UserError(
                f"data.sources: the {split} split has {len(tokens):,} tokens, fewer than one "
                f"sequence (model.seq_len={seq_len} and a target); add text or shorten it"
            )
        offsets = np.array(shards.open_array(out, manifest, split, "offsets"))
        return cls(tokens, offsets, tokenizer.load(out / "tokenizer").token_bytes(), seq_len)

    def __len__(self) -> int:
        """Windows in an epoch."""
        return (len(self.tokens) - 1) // self.seq_len

    def windows(self, numbers: np.ndarray) -> Batch:
        """The windows of these numbers (int, any shape, each below `len`), as [*shape, t]."""
        size, t = self.tokens.itemsize, self.seq_len
        flat = np.asarray(numbers, np.int64).reshape(-1)
        # A view of all windows at once, so that one gather copies whole rows.
        every = np.lib.stride_tricks.as_strided(
            self.tokens, (len(self), t + 1), (t * size, size), writeable=False
        )
        rows = every[flat]
        row, column = self._document_starts(flat * t)
        weights = np.ones((len(flat), t), np.float32)
        weights[row, column - 1] = 0
        segment_ids, positions = _segments(row[column < t], column[column < t], len(flat), t)
        leaves = Batch(
            tokens=rows[:, :-1].astype(np.int32),
            targets=rows[:, 1:].astype(np.int32),
            weights=weights,
            segment_ids=segment_ids,
            positions=positions,
        )
        return Batch(*(leaf.reshape(*np.shape(numbers), t) for leaf in leaves))

    def _document_starts(self, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of each document that begins in columns 1 … t of the windows that begin
        at the tokens `start` [n]; in order of rows, then of columns."""
        first = np.searchsorted(self.offsets, start, side="right")
        count = np.searchsorted(self.offsets, start + self.seq_len, side="right") - first
        row = np.repeat(np.arange(len(start)), count)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        return row, self.offsets[first[row] + nth] - start[row]


def _segments(row: np.ndarray, column: np.ndarray, n: int, t: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, int32 [n, t], where documents begin at (row, column) besides
    each row's column 0."""
    begin = np.sort(np.concatenate([np.arange(n) * t, row * t + column]))
    length = np.diff(begin, append=n * t)
    first = np.searchsorted(begin, begin // t * t)  # of the same row
    segment = np.arange(1, len(begin) + 1, dtype=np.int32) - first.astype(np.int32)
    positions = np.tile(np.arange(t, dtype=np.int32), n)
    positions -= np.repeat((begin % t).astype(np.int32), length)
    return np.repeat(segment, length).reshape(n, t), positions.reshape(n, t)


def indices(windows: int, seed: int, samples: np.ndarray) -> np.ndarray:
    """Which window each sample of a run is: int64, the shape of `samples`.

    Args:
      windows: windows in an epoch; each epoch is a fresh permutation of them.
      seed: of the order.
      samples: int, any shape: sample numbers from 0 (the first sequence of the run) without end.

    Each entry of a permutation is computed alone, so seeking costs nothing and no permutation is
    ever held in memory.
    """
    samples = np.asarray(samples, np.int64)
    epochs, within = np.divmod(samples, windows)
    out = np.empty_like(samples)
    for epoch in np.unique(epochs).tolist():
        # Not seed + epoch: then epoch 1 of seed 0 would be epoch 0 of seed 1.
        keys = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(ROUNDS, np.uint64)
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


def chunk(
    dataset: Dataset,
    seed: int,
    position: int,
    steps: int,
    batch_size: int,
    rows: tuple[int, int] | None = None,
) -> Batch:
    """The next `steps` global batches of a run that has consumed `position` sequences.

    Leaves are [steps, batch_size, t]. With `rows=(lo, hi)` only these rows of each global batch
    are read ([steps, hi - lo, t]): what one host of many feeds to its devices.
    """
    lo, hi = rows or (0, batch_size)
    samples = position + np.arange(steps)[:, None] * batch_size + np.arange(lo, hi)
    return dataset.windows(indices(len(dataset), seed, samples))


def chunks(
    dataset: Dataset,
    seed: int,
    position: int,
    steps: int,
    batch_size: int,
    steps_per_chunk: int = 1,
    rows: tuple[int, int] | None = None,
) -> Iterator[Batch]:
    """`chunk` after `chunk` for the next `steps` steps, read ahead in a thread of grain's.

    The last one is shorter if `steps` is no multiple of `steps_per_chunk`.
    """
    import grain.python as grain

    source = _Chunks(dataset, seed, position, steps, batch_size, steps_per_chunk, rows)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_CHUNKS)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


@dataclass(frozen=True)
class _Chunks:
    """A grain source with one record per chunk, so that grain's cost per record vanishes."""

    dataset: Dataset
    seed: int
    position: int
    steps: int
    batch_size: int
    steps_per_chunk: int
    rows: tuple[int, int] | None

    def __len__(self) -> int:
        return -(-self.steps // self.steps_per_chunk)

    def __getitem__(self, i: int) -> Batch:
        done = i * self.steps_per_chunk
        steps = min(self.steps_per_chunk, self.steps - done)
        position = self.position + done * self.batch_size
        return chunk(self.dataset, self.seed, position, steps, self.batch_size, self.rows)


def eval_batch(dataset: Dataset, sequences: int) -> tuple[Batch, np.ndarray]:
    """Evenly spaced windows, the same for every run, and the bytes of text their targets stand for.

    Returns a Batch of [sequences, t] and int32 [sequences, t], 0 where the weight is 0. So bits
    per byte = Σ weights · loss / ln 2 / Σ bytes. A split with fewer windows gives each once and
    fills the rest with rows of weight 0: shapes depend on the config alone.
    """
    real = min(sequences, len(dataset))
    numbers = np.zeros(sequences, np.int64)
    numbers[:real] = np.arange(real) * len(dataset) // real
    batch = dataset.windows(numbers)
    batch.weights[real:] = 0
    target_bytes = dataset.token_bytes[batch.targets] * (batch.weights > 0)
    return batch, target_bytes.astype(np.int32)


def check_epochs(dataset: Dataset, sequences: int, max_epochs: float) -> float:
    """Epochs that `sequences` samples make. Raises UserError if above `data.max_epochs`."""
    epochs = sequences / len(dataset)
    if epochs > max_epochs:
        raise UserError(
            f"data.max_epochs: {sequences:,} sequences are {epochs:.2f} epochs of the "
            f"{len(dataset):,} in the train split, more than max_epochs={max_epochs:g}; "
            "train for fewer steps, add text, or allow more epochs"
        )
    return epochs
