"""Documents to flat token shards that can be memory-mapped, and the manifest that describes them.

    train-00000.tokens.npy     uint8/16/32 [tokens], documents in a row, each ended by eos
    train-00000.offsets.npy    int64 [documents + 1], where each starts; the last is the end
    train-00000.documents.npy  (sha256 of the text, number of its origin) [documents]
    eval-00000.tokens.npy …    the same for the held-out texts
    tokenizer/                 what `tokenizer.load` reads
    quarantine.jsonl           the records that could not be used, by file and line
    manifest.json              written last: a folder without it is unfinished

Both the split and the order within a shard follow from the sha256 of each text. So neither depends
on the order of reading, a text never changes sides when others are added, and every prefix of the
train split is a fair sample of the whole. Within a shard the texts of each source stand together
(a `Segment`), so that a run can weigh its sources.

A shard is made by one worker and is there whole or not at all: a build that was interrupted goes on
with the shards that are missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import CleanConfig, DataConfig
from jaxlm.data import documents, spool, tokenizing
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.documents import Reading, Tally
from jaxlm.data.record import Document, Unusable
from jaxlm.data.spool import Bucket, Collected, Origin, Plan, Progress
from jaxlm.data.tokenizing import KINDS, SPLITS, Piece
from jaxlm.files import cannot_write, read_json, write_json
from jaxlm.pyfile import is_reference
from jaxlm.schema import JaxlmError, UserError, from_dict, to_dict

FORMAT = "jaxlm.data/1"
MANIFEST = "manifest.json"
SHARD_BYTES = 64 << 20  # of text; a smaller corpus is one shard


@dataclass(frozen=True)
class Split:
    """Sizes of one split, and its shards."""

    documents: int
    bytes: int  # of UTF-8 text
    tokens: int  # with one eos per document
    shards: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, what it was made from, and what was left out."""

    request: dict
    locations: dict  # source → where it lay, and which version
    records: int  # read, before anything was dropped
    dropped: dict  # reason → records
    origins: tuple[Origin, ...]
    tokenizer: dict  # name, kind, vocab_size, eos_id, lossless, fingerprint
    dtype: str
    threshold: float  # hashes below it (as numbers in [0, 1)) are held out
    train: Split
    eval: Split
    inputs_sha256: str  # over the hashes of the texts
    format: str = FORMAT

    @property
    def fingerprint(self) -> str:
        """16 hex digits that two data sets share when they hold the same tokens."""
        pieces = [p for split in SPLITS for p in getattr(self, split).shards]
        hashes = [h for p in pieces for h in (p.tokens_sha256, p.offsets_sha256)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def build(
    data: DataConfig,
    vocab_size: int,
    out_dir: str | os.PathLike[str],
    progress: Progress | None = None,
    append: bool = False,
) -> Manifest:
    """Make, or reuse, the token shards that `data` asks for.

    A finished folder for the same request is returned at once, without a look at the sources (a
    run that resumes must see the data it began with: delete the folder to read them anew). If
    another process is building it, this one waits and then reuses the result. With `append`, a
    folder that was built for the first of these sources gets the rest as further shards; what is
    there is not made again.

    Raises UserError: bad sources (see `documents.read`), too small a `vocab_size`, a folder that
    was built for something else; JaxlmError: damaged shards, a disk that cannot be written.
    """
    if "://" in str(out_dir):
        raise UserError(f"data.dir: expected a folder on this machine, got {out_dir}")
    out, report = Path(out_dir), progress or (lambda done, total, step: None)
    request = _request(data, vocab_size)
    if manifest := _finished(out, request, append):
        tokenizers.check_vocab(tokenizers.load(out / "tokenizer"), data.tokenizer, vocab_size)
        return manifest
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out, report):
            before = read_manifest(out) if append and (out / MANIFEST).exists() else None
            found = _finished(out, request, append)
            return found or _build(data, vocab_size, out, request, report, before)
    except OSError as e:
        raise cannot_write(out, e) from e


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Raises UserError if `directory` holds no finished shards, JaxlmError if it is damaged."""
    path = Path(directory) / MANIFEST
    return from_dict(Manifest, read_json(path, "data"), str(path))


def verify(directory: str | os.PathLike[str]) -> Manifest:
    """Read every byte and compare it with the manifest. Raises JaxlmError naming what differs."""
    out = Path(directory)
    manifest = read_manifest(out)
    for piece in (p for split in SPLITS for p in getattr(manifest, split).shards):
        for kind in KINDS:
            values = open_array(out, manifest, piece, kind)
            if tokenizing.sha256(values) != getattr(piece, f"{kind}_sha256"):
                path = out / f"{piece.name}.{kind}.npy"
                raise JaxlmError(f"data.dir: {path} does not match its manifest")
    return manifest


def open_array(out: Path, manifest: Manifest, piece: Piece, kind: str) -> np.ndarray:
    """A memory-mapped array of a shard. Raises JaxlmError if it is not whole."""
    path = out / f"{piece.name}.{kind}.npy"
    shape, dtype = {
        "tokens": (piece.tokens, np.dtype(manifest.dtype)),
        "offsets": (piece.documents + 1, np.dtype("int64")),
        "documents": (piece.documents, tokenizing.DOCUMENT),
    }[kind]
    try:
        values = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        raise JaxlmError(f"data.dir: {path} is damaged ({e}); delete {out} to rebuild") from e
    if values.shape != (shape,) or values.dtype != dtype:
        got = f"{values.dtype}{list(values.shape)}, expected {dtype}[{shape}]"
        raise JaxlmError(f"data.dir: {path} is damaged ({got}); delete {out} to rebuild")
    return values


# --------------------------------------------------------------------------------------- requests


def _request(data: DataConfig, vocab_size: int) -> dict[str, Any]:
    """What decides the shards, as far as the config says it."""
    request: dict[str, Any] = {
        "sources": list(data.sources),
        **({"clean": to_dict(data.clean)} if data.clean != CleanConfig() else {}),
        "licence": data.licence,
        "text_field": data.text_field,
        "tokenizer": data.tokenizer,
        "eval_fraction": data.eval_fraction,
    }
    if data.tokenizer in tokenizers.TRAINED:
        request |= {"vocab_size": vocab_size, "tokenizer_bytes": data.tokenizer_bytes}
    own = [s.rpartition(":")[0] for s in data.sources if is_reference(s)]
    for path in (*own, data.tokenizer):
        if path.endswith((".py", ".json", ".model")) and os.path.isfile(path):
            request[f"sha256 of {path}"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return request


def _finished(out: Path, request: dict[str, Any], append: bool = False) -> Manifest | None:
    if not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out)
    pieces = [p for split in SPLITS for p in getattr(manifest, split).shards]
    if not all((out / f"{p.name}.{kind}.npy").exists() for p in pieces for kind in KINDS):
        return None
    if manifest.request != request:
        built = manifest.request
        if append and _is_extended(built, request):
            return None
        name = next(k for k in (*request, *built) if request.get(k) != built.get(k))
        raise UserError(
            f"data.dir: {out} was built for {name}={built.get(name)!r}, now {request.get(name)!r} "
            "is asked for; choose another data.dir or delete the folder"
        )
    for piece in pieces:
        for kind in KINDS:
            open_array(out, manifest, piece, kind)
    return manifest


def _is_extended(built: dict[str, Any], request: dict[str, Any]) -> bool:
    """Whether `request` is what was built, and more sources after these."""
    n = len(built["sources"])
    first = {**request, "sources": request["sources"][:n]}
    return len(request["sources"]) > n and all(first.get(k) == v for k, v in built.items())


@contextlib.contextmanager
def _locked(out: Path, report: Progress) -> Iterator[None]:
    """Hold the folder; the system lets go when the process ends, however it ends."""
    with open(out / ".data.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(0, 0, f"waiting for another process to build {out}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------------------- building


def _build(
    data: DataConfig,
    vocab_size: int,
    out: Path,
    request: dict[str, Any],
    report: Progress,
    before: Manifest | None,
) -> Manifest:
    folder, first = out / ".spool", len(before.request["sources"]) if before else 0
    collected = _collect(data, folder, request, first, report)
    known = _known(out, before)
    threshold = before.threshold if before else None
    plan = spool.plan(folder, data.eval_fraction, SHARD_BYTES, known, threshold)
    if before is None and not (folder / "tokenizer.done").exists():
        _tokenizer(data, vocab_size, folder, plan, report).save(out / "tokenizer")
        (folder / "tokenizer.done").touch()
    tokenizer = tokenizers.load(out / "tokenizer")
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1).name
    earlier, n_origins = (len(before.train.shards), len(before.origins)) if before else (0, 0)
    tasks = [
        tokenizing.Task(out, folder, i + earlier, buckets, plan.threshold, dtype, n_origins)
        for i, buckets in enumerate(plan.tasks)
    ]
    source_of = [o.index for o in collected.origins]
    written = tokenizing.run(tasks, source_of, known, data.workers, plan.bytes, report)
    origins = _counted(collected.origins, written, n_origins)
    facts = ("kind", "vocab_size", "eos_id", "lossless", "fingerprint")
    manifest = Manifest(
        request=request,
        locations={s: documents.location(s) for s in data.sources},
        records=collected.records,
        dropped={**collected.dropped, **({"duplicate": plan.repeated} if plan.repeated else {})},
        origins=origins,
        tokenizer={"name": data.tokenizer, **{n: getattr(tokenizer, n) for n in facts}},
        dtype=dtype,
        threshold=plan.threshold,
        train=_sum(w["train"] for w in written),
        eval=_sum(w["eval"] for w in written),
        inputs_sha256=plan.inputs_sha256,
    )
    if before is not None:
        manifest = _joined(before, manifest)
    listed = [dict(zip(Unusable._fields, row, strict=True)) for row in collected.listed]
    lines = [json.dumps(row) + "\n" for row in ({"format": "jaxlm.quarantine/1"}, *listed)]
    with open(out / "quarantine.jsonl", "a" if before else "w") as f:
        f.writelines(lines[1:] if before else lines)
    write_json(out / MANIFEST, asdict(manifest))
    for temporary in (folder, out / ".clean"):
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _collect(
    data: DataConfig, folder: Path, request: dict[str, Any], first: int, report: Progress
) -> Collected:
    """Spool the documents of the sources from number `first` on."""
    tally, sources = Tally(), data.sources[first:]
    reading = Reading(data.licence, data.text_field, data.file_urls)

    def each() -> Iterator[tuple[int, Document]]:
        found = documents.numbered(sources, reading, tally)
        if data.clean != CleanConfig():
            from jaxlm.data import clean  # which needs the extra `data`

            clean.run(replace(data, sources=sources), folder.parent, request, report)
            found = clean.kept(folder.parent, tally)
        for index, document in found:
            yield first + index, document

    total = documents.total_bytes(sources) if data.clean == CleanConfig() else 0
    return spool.collect(each(), tally, folder, request, total, report)


def _tokenizer(
    data: DataConfig, vocab_size: int, folder: Path, plan: Plan, report: Progress
) -> tokenizers.Tokenizer:
    """The tokenizer, trained where needed: any prefix of the train split is a fair sample."""
    total = min(plan.bytes - plan.eval_bytes, data.tokenizer_bytes)

    def sample() -> Iterator[str]:
        done = 0
        for number in range(spool.BUCKETS):
            bucket = Bucket(folder, number)
            train = np.flatnonzero(~spool.is_below(bucket.digests, plan.threshold))
            for texts, size in spool.groups(bucket.text(i) for i in train.tolist()):
                done += size
                report(min(done, total), total, "training the tokenizer")
                yield from texts
                if done >= total:
                    return

    return tokenizers.create(data.tokenizer, vocab_size, sample())


def _known(out: Path, before: Manifest | None) -> np.ndarray:
    """Hashes of the texts that are in the folder already: uint8 [n, 32]."""
    if before is None:
        return np.zeros((0, 32), np.uint8)
    pieces = [p for split in SPLITS for p in getattr(before, split).shards]
    arrays = [open_array(out, before, p, "documents")["sha256"] for p in pieces]
    return np.concatenate(arrays)


def _counted(
    origins: tuple[Origin, ...], written: list[dict[str, Piece]], offset: int
) -> tuple[Origin, ...]:
    """The ledger with what each line contributed. Lines without a text left keep their number."""
    counts, sizes = np.zeros(len(origins), np.int64), np.zeros(len(origins), np.int64)
    for piece in (p for w in written for p in w.values()):
        for number, n, size in piece.origins:
            counts[number - offset] += n
            sizes[number - offset] += size
    return tuple(
        replace(o, documents=int(c), bytes=int(s))
        for o, c, s in zip(origins, counts, sizes, strict=True)
    )


def _sum(pieces: Iterable[Piece]) -> Split:
    whole = tuple(p for p in pieces if p.documents)
    return Split(
        documents=sum(p.documents for p in whole),
        bytes=sum(p.bytes for p in whole),
        tokens=sum(p.tokens for p in whole),
        shards=whole,
    )


def _joined(before: Manifest, new: Manifest) -> Manifest:
    """What an appended folder holds in all."""
    dropped = Counter(before.dropped) + Counter(new.dropped)
    inputs = hashlib.sha256((before.inputs_sha256 + new.inputs_sha256).encode())
    return replace(
        new,
        records=before.records + new.records,
        dropped=dict(sorted(dropped.items())),
        origins=(*before.origins, *new.origins),
        train=_sum((*before.train.shards, *new.train.shards)),
        eval=_sum((*before.eval.shards, *new.eval.shards)),
        inputs_sha256=inputs.hexdigest(),
    )
