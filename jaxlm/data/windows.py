"""Shards as windows: what a model sees of a split at once, by number.

Two ways to fill a window of `seq_len` tokens and their targets:

- 'split': documents in a row, cut where a window ends (GPT-3, Brown et al. 2020, appendix B);
- 'best_fit': each document whole where it fits, the longer ones in pieces of `seq_len`, packed by
  best-fit-decreasing (Ding et al. 2024, "Fewer truncations improve language modeling", §3); what is
  left of a window has weight 0.

Either way attention and positions stay inside a document, and each token but a document's first is
a target once per epoch ('split' leaves out what is after the last whole window of a segment).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.data import shards, tokenizer
from jaxlm.data.words import word_starts
from jaxlm.schema import UserError

Packing = Literal["split", "best_fit"]


class Batch(NamedTuple):
    """Sequences for a model, numpy on the host or jax arrays on devices (a pytree either way).

    All leaves are [b, t] (a chunk of steps: [steps, b, t]).
    """

    tokens: Any  # int32
    targets: Any  # int32: the token after each token
    weights: Any  # float32: 0 where the target begins another document, else 1
    segment_ids: Any  # int32: 1, 2, …: which document of this window; attention stays inside one
    positions: Any  # int32: 0, 1, …: since the document's start, or the window's if that is later


class WordBatch(NamedTuple):
    """A Batch that also tells where words begin."""

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any
    words: Any  # int32: 1 where a token begins a word


class TaughtBatch(NamedTuple):
    """A Batch that also tells what another model makes of each token."""

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any
    beside: Any  # float32 [b, t, k]: what the objective says


class PairBatch(NamedTuple):
    """Sources, and what is said of them; `targets` and `weights` [b, t] have a length of their
    own."""

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any
    said_of: Any  # int32 [b, t]: the segment that each target belongs to


AnyBatch = Batch | WordBatch | TaughtBatch | PairBatch


@dataclass(frozen=True)
class Segment:
    """Documents of one source in a row."""

    tokens: np.ndarray  # uint8/16/32 [n], memory-mapped
    offsets: np.ndarray  # int64 [documents + 1], from 0 to n
    source: int = 0


@dataclass(frozen=True)
class Dataset:
    """One split as windows of `seq_len` tokens, numbered; those of a source stand together."""

    segments: tuple[Segment, ...]
    token_bytes: np.ndarray  # int32 [vocab], see `Tokenizer.token_bytes`
    seq_len: int
    packing: Packing = "split"
    sources: tuple[str, ...] = ("",)
    word_starts: np.ndarray | None = None  # int32 [vocab], see `words.word_starts`

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        split: str,
        seq_len: int,
        packing: Packing = "split",
        words: bool = False,
    ) -> Dataset:
        """The 'train' or 'eval' split that `shards.build` made. `words`: as WordBatches.

        Raises UserError if it holds less than one window, JaxlmError if a file is damaged.
        """
        out = Path(directory)
        manifest = shards.read_manifest(out)
        segments = _segments(out, manifest, split)
        spoken = tokenizer.load(out / "tokenizer")
        starts = word_starts(spoken) if words else None
        sources = tuple(manifest.request["sources"])
        dataset = cls(segments, spoken.token_bytes(), seq_len, packing, sources, starts)
        if not len(dataset):
            tokens = getattr(manifest, split).tokens
            raise UserError(
                f"data.sources: the {split} split has {tokens:,} tokens, fewer than one "
                f"sequence (model.seq_len={seq_len} and a target); add text or shorten it"
            )
        return dataset

    @cached_property
    def parts(self) -> tuple[_Rows | _Packs, ...]:
        kind = _Rows if self.packing == "split" else _Packs
        return tuple(kind(segment, self.seq_len) for segment in self.segments)

    @cached_property
    def first(self) -> np.ndarray:
        """int64 [segments + 1]: the number of each segment's first window."""
        return np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        """Windows in an epoch."""
        return int(self.first[-1])

    @cached_property
    def windows_of(self) -> dict[int, range]:
        """Source → the numbers of its windows."""
        found: dict[int, range] = {}
        for i, segment in enumerate(self.segments):
            begin = found[segment.source].start if segment.source in found else self.first[i]
            found[segment.source] = range(int(begin), int(self.first[i + 1]))
        return found

    def windows(self, numbers: np.ndarray) -> Batch | WordBatch:
        """The windows of these numbers (int, any shape, each below `len`), as [*shape, t]."""
        flat = np.asarray(numbers, np.int64).reshape(-1)
        where = np.searchsorted(self.first, flat, side="right") - 1
        kinds = np.unique(where).tolist() or [0]
        leaves = [self.parts[k].read(flat[where == k] - self.first[k]) for k in kinds]
        batch = leaves[0]
        if len(kinds) > 1:
            order = np.argsort(np.concatenate([np.flatnonzero(where == k) for k in kinds]))
            batch = Batch(*(np.concatenate(some)[order] for some in zip(*leaves, strict=True)))
        found = Batch(*(leaf.reshape(*np.shape(numbers), self.seq_len) for leaf in batch))
        if self.word_starts is None:
            return found
        return WordBatch(*found, self.word_starts[found.tokens])


def _segments(out: Path, manifest: shards.Manifest, split: str) -> tuple[Segment, ...]:
    """Of all shards, by source; those too short for the tokens to be a window stay."""
    found = []
    for piece in getattr(manifest, split).shards:
        tokens = shards.open_array(out, manifest, piece, "tokens")
        offsets = np.array(shards.open_array(out, manifest, piece, "offsets"))
        document = 0
        for s in piece.segments:
            mine = offsets[document : document + s.documents + 1]
            found.append(Segment(tokens[mine[0] : mine[-1]], mine - mine[0], s.source))
            document += s.documents
    return tuple(sorted(found, key=lambda s: s.source))


# ------------------------------------------------------------------------------- documents in a row


class _Rows:
    """Windows of `seq_len + 1` tokens at stride `seq_len`."""

    def __init__(self, segment: Segment, seq_len: int) -> None:
        self.tokens, self.offsets, self.seq_len = segment.tokens, segment.offsets, seq_len

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.seq_len

    def read(self, numbers: np.ndarray) -> Batch:
        size, t = self.tokens.itemsize, self.seq_len
        # A view of all windows at once, so that one gather copies whole rows.
        every = np.lib.stride_tricks.as_strided(
            self.tokens, (len(self), t + 1), (t * size, size), writeable=False
        )
        rows = every[numbers]
        row, column = self._document_starts(numbers * t)
        weights = np.ones((len(numbers), t), np.float32)
        weights[row, column - 1] = 0
        inside = column < t
        segment_ids, positions = _segment_ids(row[inside], column[inside], len(numbers), t)
        tokens, targets = rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)
        return Batch(tokens, targets, weights, segment_ids, positions)

    def _document_starts(self, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of each document that begins in columns 1 … t of the windows that begin
        at the tokens `start` [n]; in order of rows, then of columns."""
        first = np.searchsorted(self.offsets, start, side="right")
        count = np.searchsorted(self.offsets, start + self.seq_len, side="right") - first
        row = np.repeat(np.arange(len(start)), count)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        return row, self.offsets[first[row] + nth] - start[row]


def _segment_ids(
    row: np.ndarray, column: np.ndarray, n: int, t: int
) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, int32 [n, t], where documents begin at (row, column) besides
    each row's column 0."""
    begin = np.sort(np.concatenate([np.arange(n) * t, row * t + column]))
    length = np.diff(begin, append=n * t)
    first = np.searchsorted(begin, begin // t * t)  # of the same row
    segment = np.arange(1, len(begin) + 1, dtype=np.int32) - first.astype(np.int32)
    positions = np.tile(np.arange(t, dtype=np.int32), n)
    positions -= np.repeat((begin % t).astype(np.int32), length)
    return np.repeat(segment, length).reshape(n, t), positions.reshape(n, t)


# --------------------------------------------------------------------------------- whole documents


class _Packs:
    """Windows of whole documents, and of the pieces of those that are longer than a window.

    A piece of `n` tokens and the token after it fills `n` places. 12 bytes of memory per piece.
    """

    def __init__(self, segment: Segment, seq_len: int) -> None:
        self.tokens, self.seq_len = segment.tokens, seq_len
        start, places = _cut(segment.offsets, seq_len)
        window = best_fit(places, seq_len)
        order = np.argsort(window, kind="stable")
        self.start, self.places = start[order], places[order]
        windows = int(window.max()) + 1 if len(window) else 0
        self.first = np.searchsorted(window[order], np.arange(windows + 1))

    def __len__(self) -> int:
        return len(self.first) - 1

    def read(self, numbers: np.ndarray) -> Batch:
        t, n = self.seq_len, len(numbers)
        count = self.first[numbers + 1] - self.first[numbers]
        row = np.repeat(np.arange(n), count)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        piece = self.first[numbers][row] + nth
        places = self.places[piece].astype(np.int64)
        before = np.cumsum(places) - places  # of all pieces of this batch in a row
        column = before - np.repeat(before[np.cumsum(count) - count], count)
        within = np.arange(int(places.sum())) - np.repeat(before, places)
        source = np.repeat(self.start[piece], places) + within
        target_at = np.repeat(row * t + column, places) + within
        flat = [np.zeros(n * t, d) for d in (np.int32, np.int32, np.float32, np.int32, np.int32)]
        flat[0][target_at], flat[1][target_at] = self.tokens[source], self.tokens[source + 1]
        flat[2][target_at] = 1
        flat[3][:] = np.repeat(count + 1, t)  # padding is a segment of its own
        flat[3][target_at] = np.repeat(nth + 1, places)
        flat[4][target_at] = within
        return Batch(*(x.reshape(n, t) for x in flat))


def _cut(offsets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(first token, places) of the pieces of all documents: int64 and int32 [pieces]."""
    places = np.diff(offsets) - 1  # the last token is a target only
    pieces = -(-places // seq_len)
    document = np.repeat(np.arange(len(places)), pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    left = places[document] - nth * seq_len
    return offsets[document] + nth * seq_len, np.minimum(left, seq_len).astype(np.int32)


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Which bin each item goes into: int64 [items]. Best-fit-decreasing (Johnson 1973).

    Items from the largest to the smallest, each into the fullest bin that has room for it. Items of
    one size are alike, so whole groups are placed at once: `capacity`² steps at most.
    """
    order, counts = np.argsort(-sizes, kind="stable"), np.bincount(sizes, minlength=capacity + 1)
    out = np.empty(len(sizes), np.int64)
    room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # bins by what is left
    bins = done = 0
    for size in np.flatnonzero(counts[1:])[::-1].tolist():
        size, left, at = size + 1, int(counts[size + 1]), size + 1
        while left:
            if at < capacity and not room[at]:
                at += 1
                continue
            each = at // size
            need = -(-left // each)
            if at < capacity:
                found = np.concatenate(room[at])
                mine, room[at] = found[:need], [found[need:]] if len(found) > need else []
            else:  # no bin has room: open new ones
                mine = np.arange(bins, bins + need)
                bins += need
            n = min(left, len(mine) * each)
            out[order[done : done + n]] = np.repeat(mine, each)[:n]
            room[at - each * size].append(mine[:-1])
            room[at - (n - each * (len(mine) - 1)) * size].append(mine[-1:])
            done, left = done + n, left - n
    return out
