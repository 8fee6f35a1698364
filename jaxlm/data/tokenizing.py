"""One shard from some buckets of the spool, and all shards by several processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxlm.data import spool
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.spool import Bucket, Progress, groups, is_below
from jaxlm.files import read_json, write_json
from jaxlm.schema import JaxlmError, from_dict

SPLITS = ("train", "eval")
KINDS = ("tokens", "offsets", "documents")
DOCUMENT = np.dtype([("sha256", "u1", (32,)), ("origin", "<i4")])
TRIES = 3  # for a worker that was killed


@dataclass(frozen=True)
class Segment:
    """The texts of one source within a shard; they stand together."""

    source: int  # index of the entry of `data.sources`
    documents: int
    tokens: int


@dataclass(frozen=True)
class Piece:
    """One shard of a split, and sha256 (hex) of its arrays' data."""

    name: str
    documents: int
    bytes: int
    tokens: int
    tokens_sha256: str
    offsets_sha256: str
    documents_sha256: str
    segments: tuple[Segment, ...]
    origins: tuple[tuple[int, int, int], ...]  # (number of the origin, documents, bytes)


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    out: Path
    spool: Path
    number: int
    buckets: range
    threshold: float
    dtype: str
    first_origin: int

    @property
    def marker(self) -> Path:
        """Written when the shard is whole."""
        return self.spool / f"shard-{self.number:05d}.json"


def run(
    tasks: list[Task],
    source_of: list[int],
    known: np.ndarray,
    workers: int,
    total: int,
    report: Progress,
) -> list[dict[str, Piece]]:
    """Make the shards that are not there yet; returns the pieces of all of them, in order.

    Args:
      source_of: the source of each origin.
      known: uint8 [n, 32], hashes of texts to leave out.
      workers: processes; 0 is one per core. Raises JaxlmError where they were killed again and
        again.
    """
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report(done, total, "tokenising")

    for _ in range(TRIES):
        todo = [t for t in tasks if not t.marker.exists()]
        if workers == 1 or len(todo) == 1:
            for task in todo:
                write(task, source_of, known, advance)
        elif todo:
            _in_processes(todo, source_of, known, workers, advance)
        if all(t.marker.exists() for t in tasks):
            return [_read(t) for t in tasks]
    raise JaxlmError("data: workers were killed again and again; is there enough memory?")


def _in_processes(
    todo: list[Task],
    source_of: list[int],
    known: np.ndarray,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, context, _limit_threads, (threads,)) as pool:
        futures = [pool.submit(write, task, source_of, known) for task in todo]
        try:
            for future in as_completed(futures):
                advance(future.result())
        except BrokenProcessPool:
            pass  # what is missing is tried again
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _limit_threads(threads: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)


def _read(task: Task) -> dict[str, Piece]:
    stored = read_json(task.marker, "shard")
    return {split: from_dict(Piece, stored[split], str(task.marker)) for split in SPLITS}


# ------------------------------------------------------------------------------------- one shard


def write(
    task: Task,
    source_of: list[int],
    known: np.ndarray,
    advance: Callable[[int], None] = lambda size: None,
) -> int:
    """Tokenise the buckets of `task` into the arrays of both splits; returns the bytes of text."""
    tokenizer = tokenizers.load(task.out / "tokenizer")
    buckets = [Bucket(task.spool, n, known) for n in task.buckets]
    pieces = {}
    for split in SPLITS:
        chosen = _chosen(buckets, np.array(source_of, np.int64), task.threshold, split)
        name = f"{split}-{task.number:05d}"
        pieces[split] = _write_split(task, name, buckets, chosen, tokenizer, advance)
    stored = {split: asdict(piece) for split, piece in pieces.items()}
    write_json(task.marker, {"format": "jaxlm.shard/1", **stored})
    return sum(piece.bytes for piece in pieces.values())


def _chosen(
    buckets: list[Bucket], source_of: np.ndarray, threshold: float, split: str
) -> np.ndarray:
    """(source, bucket, row, origin) of the split's documents, in their order: int64 [n, 4]."""
    rows = []
    for b, bucket in enumerate(buckets):
        i = np.flatnonzero(is_below(bucket.digests, threshold) == (split == "eval"))
        origin = bucket.origins[i]
        rows.append(np.stack([source_of[origin], np.full_like(i, b), i, origin], 1))
    table = np.concatenate(rows)
    return table[np.argsort(table[:, 0], kind="stable")]


def _write_split(
    task: Task,
    name: str,
    buckets: list[Bucket],
    chosen: np.ndarray,
    tokenizer: Any,
    advance: Callable[[int], None],
) -> Piece:
    hashed, offsets = hashlib.sha256(), array("q", [0])
    texts = (buckets[b].text(i) for _, b, i, _ in chosen.tolist())
    with open(task.out / f"{name}.tokens.npy", "wb") as f:
        start = _write_header(f, task.dtype, 0)
        for ids, lengths, size in _encoded(texts, tokenizer):
            for length in lengths:
                offsets.append(offsets[-1] + length)
            raw = ids.astype(task.dtype).tobytes()
            hashed.update(raw)
            f.write(raw)
            advance(size)
        f.seek(0)
        if _write_header(f, task.dtype, offsets[-1]) != start:
            raise JaxlmError(f"data: the header of {name} has changed its length")
        _sync(f)
    about = np.zeros(len(chosen), DOCUMENT)
    sizes = np.zeros(len(chosen), np.int64)
    for b, bucket in enumerate(buckets):
        mine = chosen[:, 1] == b
        rows = chosen[mine, 2]
        about["sha256"][mine] = bucket.digests[rows].view("u1").reshape(-1, 32)
        sizes[mine] = bucket.sizes[rows]
    about["origin"] = chosen[:, 3] + task.first_origin
    arrays = {"offsets": np.array(offsets, np.int64), "documents": about}
    for kind, values in arrays.items():
        with open(task.out / f"{name}.{kind}.npy", "wb") as f:
            np.save(f, values)
            _sync(f)
    counts = np.bincount(chosen[:, 3]) if len(chosen) else np.zeros(0, np.int64)
    origin_bytes = np.bincount(chosen[:, 3], sizes) if len(chosen) else counts
    return Piece(
        name=name,
        documents=len(chosen),
        bytes=int(sizes.sum()),
        tokens=offsets[-1],
        tokens_sha256=hashed.hexdigest(),
        offsets_sha256=sha256(arrays["offsets"]),
        documents_sha256=sha256(about),
        segments=_segments(chosen[:, 0], arrays["offsets"]),
        origins=tuple(
            (int(i) + task.first_origin, int(counts[i]), int(origin_bytes[i]))
            for i in np.flatnonzero(counts)
        ),
    )


def _encoded(texts: Iterator[bytes], tokenizer: Any) -> Iterator[tuple[np.ndarray, list[int], int]]:
    """(ids with an end after each text, tokens of each text and its end, bytes) of groups."""
    end = np.array([tokenizer.eos_id], np.int32)
    for group, size in groups(texts):
        rows = tokenizer.encode_batch(group)
        ids = np.concatenate([x for row in rows for x in (row, end)])
        if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
            raise JaxlmError(f"data.tokenizer: id {ids.max()} is not below its vocabulary size")
        yield ids, [len(row) + 1 for row in rows], size


def _segments(sources: np.ndarray, offsets: np.ndarray) -> tuple[Segment, ...]:
    found = []
    for source in np.unique(sources).tolist():
        first, last = np.searchsorted(sources, [source, source + 1])
        tokens = int(offsets[last] - offsets[first])
        found.append(Segment(source, int(last - first), tokens))
    return tuple(found)


def _write_header(f: IO[bytes], dtype: str, tokens: int) -> int:
    """The .npy header for a flat array, and where it ends; numpy pads it to a fixed length, so
    that the final one fits over the first."""
    shape = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(f, shape)
    return f.tell()


def _sync(f: IO[bytes]) -> None:
    f.flush()
    os.fsync(f.fileno())


def sha256(values: np.ndarray) -> str:
    hashed = hashlib.sha256()
    for i in range(0, len(values), spool.GROUP_BYTES):
        hashed.update(np.ascontiguousarray(values[i : i + spool.GROUP_BYTES]).tobytes())
    return hashed.hexdigest()
