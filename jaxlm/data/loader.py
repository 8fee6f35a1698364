"""In which order the windows of a split are seen: a pure function of (seed, sample number).

So the position of a run is one integer, the number of sequences consumed, and hosts, workers,
prefetching, mesh and the way a batch is split cannot change what comes at which position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.mixture import Mixture
from jaxlm.data.mixture import mixture as make
from jaxlm.data.shuffle import indices
from jaxlm.data.windows import AnyBatch, Batch, Dataset, WordBatch
from jaxlm.schema import UserError

__all__ = ["Batch", "Dataset", "check_epochs", "chunk", "chunks", "eval_batch", "indices"]

PREFETCHED_CHUNKS = 2


class Rows(Protocol):
    """What has an order: windows of text (`Dataset`), or examples."""

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def windows_of(self) -> dict[int, range]:
        """Source → the numbers of its rows."""

    def __len__(self) -> int: ...

    def windows(self, numbers: np.ndarray) -> AnyBatch:
        """The rows of these numbers (int, any shape), as [*shape, t]."""


def chunk(
    dataset: Rows,
    seed: int,
    position: int,
    steps: int,
    batch_size: int,
    rows: np.ndarray | None = None,
    mixture: Mixture | None = None,
) -> AnyBatch:
    """The next `steps` global batches of a run that has consumed `position` sequences.

    Leaves are [steps, batch_size, t]. With `rows` (int) only these rows of each global batch are
    read ([steps, len(rows), t]): what one process of many feeds to its devices.
    """
    rows = np.arange(batch_size) if rows is None else rows
    samples = position + np.arange(steps)[:, None] * batch_size + rows
    return dataset.windows(_numbers(dataset, mixture, seed, samples))


def _numbers(dataset: Rows, mixture: Mixture | None, seed: int, samples: np.ndarray) -> np.ndarray:
    """Which window each sample is: of all windows alike, or of the sources as they are weighed."""
    if mixture is None:
        return indices(len(dataset), seed, samples)
    source, ordinal = mixture.drawn(seed, samples)
    out = np.empty_like(samples)
    for k in np.unique(source).tolist():
        mine, own = source == k, dataset.windows_of[k]
        out[mine] = own.start + indices(len(own), seed, ordinal[mine], stream=k + 1)
    return out


def chunks(
    dataset: Rows,
    seed: int,
    position: int,
    steps: int,
    batch_size: int,
    steps_per_chunk: int = 1,
    rows: np.ndarray | None = None,
    mixture: Mixture | None = None,
) -> Iterator[AnyBatch]:
    """`chunk` after `chunk` for the next `steps` steps, read ahead in a thread of grain's.

    The last one is shorter if `steps` is no multiple of `steps_per_chunk`.
    """
    import grain.python as grain

    source = _Chunks(dataset, seed, position, steps, batch_size, steps_per_chunk, rows, mixture)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_CHUNKS)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


@dataclass(frozen=True)
class _Chunks:
    """A grain source with one record per chunk, so that grain's cost per record vanishes."""

    dataset: Rows
    seed: int
    position: int
    steps: int
    batch_size: int
    steps_per_chunk: int
    rows: np.ndarray | None
    mixture: Mixture | None

    def __len__(self) -> int:
        return -(-self.steps // self.steps_per_chunk)

    def __getitem__(self, i: int) -> AnyBatch:
        done = i * self.steps_per_chunk
        steps = min(self.steps_per_chunk, self.steps - done)
        position = self.position + done * self.batch_size
        return chunk(
            self.dataset, self.seed, position, steps, self.batch_size, self.rows, self.mixture
        )


def eval_batch(
    dataset: Dataset, sequences: int, among: range | None = None
) -> tuple[Batch | WordBatch, np.ndarray]:
    """Evenly spaced windows, of all or `among` these, the same for every run, and the bytes of text
    that their targets stand for.

    Returns a Batch of [sequences, t] and int32 [sequences, t], 0 where the weight is 0. So bits
    per byte = Σ weights · loss / ln 2 / Σ bytes. A split with fewer windows gives each once and
    fills the rest with rows of weight 0: shapes depend on the config alone.
    """
    among = range(len(dataset)) if among is None else among
    real = min(sequences, len(among))
    numbers = np.zeros(sequences, np.int64)
    numbers[:real] = among.start + np.arange(real) * len(among) // real
    batch = dataset.windows(numbers)
    batch.weights[real:] = 0
    target_bytes = dataset.token_bytes[batch.targets] * (batch.weights > 0)
    return batch, target_bytes.astype(np.int32)


def mixture_of(dataset: Rows, data: DataConfig, sequences: int) -> Mixture | None:
    """How a run of `sequences` samples weighs its sources (None: by size). Raises UserError."""
    found = make(data.weights, data.curriculum, len(dataset.sources), sequences)
    for stage in found.stages if found else ():
        for k, places in enumerate(stage.places):
            if places and not len(dataset.windows_of.get(k, ())):
                raise UserError(
                    f"data.weights: {dataset.sources[k]!r} has less than one sequence to weigh"
                )
    return found


def epochs(
    dataset: Rows, seed: int, sequences: int, mixture: Mixture | None = None
) -> dict[str, float]:
    """Source → how often each of its windows was seen after `sequences` samples."""
    if mixture is None:
        seen = {k: sequences * len(own) / len(dataset) for k, own in dataset.windows_of.items()}
    else:
        seen = dict(enumerate(mixture.counts(seed, sequences).tolist()))
    return {
        dataset.sources[k]: seen[k] / len(own) for k, own in dataset.windows_of.items() if len(own)
    }


def check_epochs(
    dataset: Rows,
    sequences: int,
    max_epochs: float,
    seed: int = 0,
    mixture: Mixture | None = None,
) -> float:
    """Epochs that `sequences` samples make, of the source that is seen most often.

    Raises UserError if above `data.max_epochs`.
    """
    most = max(epochs(dataset, seed, sequences, mixture).items(), key=lambda item: item[1])
    if most[1] > max_epochs:
        of = f" of {most[0]}" if len(dataset.windows_of) > 1 else ""
        raise UserError(
            f"data.max_epochs: {sequences:,} sequences are {most[1]:.2f} epochs{of} "
            f"(of {len(dataset):,} in the train split), more than max_epochs={max_epochs:g}; "
            "train for fewer steps, add text, or allow more epochs"
        )
    return most[1]
