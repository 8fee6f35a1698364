"""Every text that was read, on disk, in buckets by its hash: what shards are made from.

    .spool/00 … ff         the texts whose sha256 begins with this byte, as they were read
    .spool/collected.json  written last: what was read, and what was not

A bucket is small enough to be sorted in memory, so memory stays flat however much is read: at 1 TB
of text of 3 KB each a bucket's index takes 70 MB.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.documents import Tally
from jaxlm.data.record import Document
from jaxlm.files import read_json, write_json
from jaxlm.schema import JaxlmError, UserError, from_dict

FORMAT = "jaxlm.spool/1"
BUCKETS = 256
MAX_ORIGINS = 10_000
GROUP_BYTES = 1 << 20
_HEAD = struct.Struct("<32sqi")  # sha256, bytes of text, origin

Progress = Callable[[int, int, str], None]
"""Called as `progress(done_bytes, total_bytes, step)`; a total of 0 is unknown."""


@dataclass(frozen=True)
class Origin:
    """What one source contributed under one set of terms: a line of the licence ledger."""

    index: int  # of the entry of `data.sources`
    source: str
    language: str
    text_licence: str
    package_licence: str
    attribution: str
    first_date: str = ""  # of the documents, where they have one
    last_date: str = ""
    documents: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Collected:
    """What a finished spool holds, and what was left out."""

    request: dict
    records: int
    dropped: dict
    listed: tuple[tuple[str, str, str], ...]
    origins: tuple[Origin, ...]  # without their counts, which are known once repetitions are gone
    bytes: int
    format: str = FORMAT


def collect(
    each: Iterable[tuple[int, Document]],
    tally: Tally,
    folder: Path,
    request: dict[str, Any],
    total_bytes: int,
    report: Progress,
) -> Collected:
    """Spool `each` (index of its source, document), or reuse what a finished call left.

    `tally` is filled by whoever yields the documents, and read when they are at an end.
    """
    with contextlib.suppress(UserError):
        found = from_dict(Collected, read_json(folder / "collected.json", "spool"), "spool")
        if found.request == request:
            return found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ledger = _Ledger()
    done = reported = 0
    with contextlib.ExitStack() as held:
        buckets = [
            held.enter_context(open(folder / f"{i:02x}", "wb", 1 << 16)) for i in range(BUCKETS)
        ]
        for index, document in each:
            raw = document.text.encode()
            digest = hashlib.sha256(raw).digest()
            bucket = buckets[digest[0]]
            bucket.write(_HEAD.pack(digest, len(raw), ledger.number(index, document)))
            bucket.write(raw)
            done += len(raw)
            if done - reported >= GROUP_BYTES:
                reported = done
                report(done, total_bytes and max(total_bytes, done), "collecting")
        report(done, done, "collecting")
    collected = Collected(
        request=request,
        records=tally.records,
        dropped=dict(sorted(tally.dropped.items())),
        listed=tuple(tuple(u) for u in tally.listed),  # type: ignore[misc]
        origins=ledger.origins(),
        bytes=done,
    )
    write_json(folder / "collected.json", asdict(collected))
    return collected


class _Ledger:
    """Terms → number; the span of the dates under each."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, str, str, str, str, str], int] = {}
        self.dates: list[tuple[str, str]] = []

    def number(self, index: int, d: Document) -> int:
        terms = (index, d.source, d.language, d.text_licence, d.package_licence, d.attribution)
        if terms not in self.numbers and len(self.numbers) >= MAX_ORIGINS:
            terms = (index, "…", d.language, d.text_licence, d.package_licence, "various")
        i = self.numbers.setdefault(terms, len(self.numbers))
        if i == len(self.dates):
            self.dates.append((d.date, d.date))
        elif d.date:
            first, last = self.dates[i]
            self.dates[i] = (min(first or d.date, d.date), max(last, d.date))
        return i

    def origins(self) -> tuple[Origin, ...]:
        pairs = zip(self.numbers, self.dates, strict=True)
        return tuple(Origin(*terms, *dates) for terms, dates in pairs)


# ------------------------------------------------------------------------------------------ reading


class Bucket:
    """The distinct texts of one bucket, in the order of their hashes; the first read stays.

    digests: big-endian uint64 [n, 4], ascending; origins: int32 [n]; sizes: int64 [n].
    """

    def __init__(self, folder: Path, number: int, known: np.ndarray | None = None) -> None:
        """`known`: uint8 [k, 32], hashes of texts that are left out."""
        path = folder / f"{number:02x}"
        size = path.stat().st_size
        with open(path, "rb") as f:
            self.map: Any = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        digests, rows, at = bytearray(), [], 0
        while at < size:
            digest, length, origin = _HEAD.unpack_from(self.map, at)
            at += _HEAD.size
            digests += digest
            rows.append((at, length, origin))
            at += length
        table = np.array(rows, np.int64).reshape(-1, 3)
        digest = np.frombuffer(bytes(digests), ">u8").reshape(-1, 4)
        order = np.lexsort(digest.T[::-1])  # stable
        repeated = np.zeros(len(order), bool)
        repeated[1:] = (digest[order][1:] == digest[order][:-1]).all(axis=1)
        if known is not None and len(known) and len(order):
            mine = np.ascontiguousarray(known[known[:, 0] == number])
            flat = np.frombuffer(bytes(digests), "V32")[order]
            repeated |= np.isin(flat, mine.view("V32").reshape(-1))
        self.repeated = int(repeated.sum())
        kept = order[~repeated]
        self.digests, self.starts, self.sizes = digest[kept], table[kept, 0], table[kept, 1]
        self.origins = table[kept, 2].astype(np.int32)

    def text(self, i: int) -> bytes:
        """Raises JaxlmError if the disk gives back another text than was written."""
        raw = self.map[self.starts[i] : self.starts[i] + self.sizes[i]]
        if hashlib.sha256(raw).digest() != self.digests[i].tobytes():
            raise JaxlmError("data: what an interrupted build left (.spool) is damaged; delete it")
        return raw


def is_below(digests: np.ndarray, threshold: float) -> np.ndarray:
    """Which hashes (uint64 [n, 4]), read as numbers in [0, 1), are below: bool [n]."""
    return digests[:, 0].astype(np.float64) / 2.0**64 < threshold


def groups(texts: Iterator[bytes]) -> Iterator[tuple[list[str], int]]:
    """Texts in groups of about `GROUP_BYTES`, with their size in bytes."""
    group, size = [], 0
    for raw in texts:
        group.append(raw.decode())
        size += len(raw)
        if size >= GROUP_BYTES:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


# ----------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class Plan:
    """Which buckets make which shard, and where the split lies."""

    tasks: list[range]
    threshold: float
    bytes: int
    eval_bytes: int
    repeated: int  # documents
    inputs_sha256: str


def plan(
    folder: Path,
    eval_fraction: float,
    shard_bytes: int,
    known: np.ndarray,
    threshold: float | None = None,
) -> Plan:
    """Shards of about `shard_bytes`, and the split, unless its `threshold` is given.

    Train and eval: the texts whose hash, read as a number in [0, 1), is below `eval_fraction` are
    held out; at least one text, and not all of them. Raises UserError for less than two texts.
    """
    tasks, begin, here = [], 0, 0
    total = eval_bytes = n = n_eval = repeated = 0
    lowest, highest, inputs = 1.0, 0.0, hashlib.sha256()
    for number in range(BUCKETS):
        bucket = Bucket(folder, number, known)
        repeated += bucket.repeated
        inputs.update(bucket.digests.tobytes())
        size = int(bucket.sizes.sum())
        total, here, n = total + size, here + size, n + len(bucket.sizes)
        below = is_below(bucket.digests, eval_fraction if threshold is None else threshold)
        n_eval, eval_bytes = n_eval + int(below.sum()), eval_bytes + int(bucket.sizes[below].sum())
        if len(below):
            values = bucket.digests[:, 0].astype(np.float64) / 2.0**64
            lowest, highest = min(lowest, values[0]), max(highest, values[-1])
        if here >= shard_bytes or number == BUCKETS - 1:
            tasks.append(range(begin, number + 1))
            begin, here = number + 1, 0
    if threshold is None:
        if n < 2:
            raise UserError(
                "data.sources: one distinct document only, so none can be held out for evaluation"
            )
        threshold = eval_fraction if n_eval else float(np.nextafter(lowest, 2.0))
        threshold = float(highest) if n_eval == n else threshold
    return Plan(tasks, threshold, total, eval_bytes, repeated, inputs.hexdigest())
