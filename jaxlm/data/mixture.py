"""Sources in stated proportions, which may change as training proceeds.

Samples come in blocks of `BLOCK`. Within a block each source has its exact share of places, in an
order of the block's own; so which source a sample is of, and which of that source's samples it is,
are computed from the sample's number alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jaxlm.data.shuffle import indices
from jaxlm.schema import UserError

BLOCK = 1000


@dataclass(frozen=True)
class Stage:
    """From sample `start` on, source `k` has `places[k]` of each block."""

    start: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Mixture:
    """The stages of a run, the first from sample 0 on."""

    stages: tuple[Stage, ...]

    def counts(self, seed: int, sequences: int) -> np.ndarray:
        """How many of the first `sequences` samples each source has: int64 [sources]."""
        total = np.zeros(len(self.stages[0].places), np.int64)
        ends = [*(s.start for s in self.stages[1:]), sequences]
        for i, (stage, end) in enumerate(zip(self.stages, ends, strict=True)):
            blocks, left = divmod(max(0, min(end, sequences) - stage.start), BLOCK)
            order, _ = _block(seed, i, blocks, stage.places)
            total += np.array(stage.places) * blocks
            total += np.bincount(order[:left], minlength=len(total))
        return total

    def drawn(self, seed: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, which sample of that source) of each sample: int64, the shape of `samples`."""
        samples = np.asarray(samples, np.int64)
        source, ordinal = np.empty_like(samples), np.empty_like(samples)
        starts = np.array([s.start for s in self.stages])
        of = np.searchsorted(starts, samples, side="right") - 1
        for i in np.unique(of).tolist():
            before = self.counts(seed, int(starts[i]))
            block, place = np.divmod(samples - starts[i], BLOCK)
            for b in np.unique(block[of == i]).tolist():
                mine = (of == i) & (block == b)
                order, rank = _block(seed, i, b, self.stages[i].places)
                here = order[place[mine]]
                source[mine] = here
                ordinal[mine] = (
                    before[here] + b * np.array(self.stages[i].places)[here] + rank[place[mine]]
                )
        return source, ordinal


@functools.lru_cache(maxsize=256)
def _block(
    seed: int, stage: int, block: int, places: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The source at each place of a block, and which of its places it is: int64 [BLOCK]."""
    sources = np.repeat(np.arange(len(places)), places)
    numbers = indices(BLOCK, seed, np.arange(BLOCK) + block * BLOCK, stream=2**32 + stage)
    order = sources[numbers]
    rank = np.empty(BLOCK, np.int64)
    for k in range(len(places)):
        rank[order == k] = np.arange(places[k])
    return order, rank


def mixture(
    weights: tuple[float, ...],
    curriculum: Iterable[tuple[float, tuple[float, ...]]],
    sources: int,
    sequences: int,
) -> Mixture | None:
    """What `data.weights` and `data.curriculum` say, for a run of `sequences` samples.

    None where neither says anything: then each window counts alike. Raises UserError.
    """
    curriculum = tuple(curriculum)
    if not weights and not curriculum:
        return None
    if not weights:
        raise UserError("data.weights: expected the weights that hold before data.curriculum")
    stages = [Stage(0, _places(weights, sources, "data.weights"))]
    for i, (share, changed) in enumerate(curriculum):
        where, start = f"data.curriculum[{i}]", round(share * sequences)
        if not 0 < share < 1 or start <= stages[-1].start:
            raise UserError(
                f"{where}: expected shares of the steps that rise from 0 to 1, got {share}"
            )
        stages.append(Stage(start, _places(changed, sources, where)))
    return Mixture(tuple(stages))


def _places(weights: tuple[float, ...], sources: int, where: str) -> tuple[int, ...]:
    """Places in a block, by largest remainders. Raises UserError."""
    if len(weights) != sources or min(weights) < 0 or not sum(weights) > 0:
        raise UserError(f"{where}: expected {sources} weights, one for each source, got {weights}")
    exact = np.array(weights) / sum(weights) * BLOCK
    places = np.floor(exact).astype(int)
    places[np.argsort(-(exact - places), kind="stable")[: BLOCK - places.sum()]] += 1
    return tuple(places.tolist())
