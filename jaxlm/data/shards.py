"""Documents to flat token shards that can be memory-mapped, and the manifest that describes them.

    train.tokens.npy   uint8/16/32 [tokens], documents one after another, each ended by eos
    train.offsets.npy  int64 [documents + 1], where each document starts; the last is the end
    eval.tokens.npy, eval.offsets.npy
    tokenizer/         what `tokenizer.load` reads
    quarantine.jsonl   the records that could not be used, by file and line
    manifest.json      written last: a folder without it is unfinished and is built anew

Both the split and the order within it follow from the sha256 of each text. So neither depends on
the order of reading, a text never changes sides when others are added, and every prefix of the
train split is a fair sample of the whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data import documents
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.documents import Tally
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.files import cannot_write, read_json, write_bytes, write_json
from jaxlm.pyfile import is_reference
from jaxlm.schema import JaxlmError, UserError, from_dict

FORMAT = "jaxlm.data/1"
MANIFEST = "manifest.json"
_ARRAYS = [(split, kind) for split in ("train", "eval") for kind in ("tokens", "offsets")]
GROUP_BYTES = 1 << 20  # text tokenised at once
BPE_SAMPLE_BYTES = 64 << 20  # text that a BPE is trained on

Progress = Callable[[int, int, str], None]
"""Called as `progress(done_bytes, total_bytes, step)`; a total of 0 is unknown."""


@dataclass(frozen=True)
class Split:
    """Sizes of one split, and sha256 (hex) of its two arrays' data."""

    documents: int
    bytes: int  # of UTF-8 text
    tokens: int  # with one eos per document
    tokens_sha256: str
    offsets_sha256: str


@dataclass(frozen=True)
class Origin:
    """What one source contributed under one set of terms: a line of the licence ledger."""

    source: str
    language: str
    text_licence: str
    package_licence: str
    attribution: str
    documents: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, what it was made from, and what was left out."""

    request: dict
    locations: dict  # source → where it lay, and which version
    records: int  # read, before anything was dropped
    dropped: dict  # reason → records
    origins: tuple[Origin, ...]
    tokenizer: dict  # name, kind, vocab_size, eos_id, fingerprint
    dtype: str
    train: Split
    eval: Split
    inputs_sha256: str  # over the set of texts
    format: str = FORMAT

    @property
    def fingerprint(self) -> str:
        """16 hex digits that two data sets share when they hold the same tokens."""
        hashes = [getattr(getattr(self, split), f"{kind}_sha256") for split, kind in _ARRAYS]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def build(
    data: DataConfig,
    vocab_size: int,
    out_dir: str | os.PathLike[str],
    progress: Progress | None = None,
) -> Manifest:
    """Make, or reuse, the token shards that `data` asks for.

    A finished folder for the same request is returned at once, without a look at the sources (a
    run that resumes must see the data it began with: delete the folder to read them anew). If
    another process is building it, this one waits and then reuses the result.

    Raises UserError: bad sources (see `documents.read`), too small a `vocab_size`, a folder that
    was built for something else; JaxlmError: damaged shards, a disk that cannot be written.
    """
    if "://" in str(out_dir):
        raise UserError(f"data.dir: expected a folder on this machine, got {out_dir}")
    out, report = Path(out_dir), progress or (lambda done, total, step: None)
    request = _request(data, vocab_size)
    if manifest := _finished(out, request):
        tokenizers.check_vocab(tokenizers.load(out / "tokenizer"), data.tokenizer, vocab_size)
        return manifest
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out, report):
            return _finished(out, request) or _build(data, vocab_size, out, request, report)
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
    for split, kind in _ARRAYS:
        values = open_array(out, manifest, split, kind)
        if _sha256(values) != getattr(getattr(manifest, split), f"{kind}_sha256"):
            raise JaxlmError(f"data.dir: {out}/{split}.{kind}.npy does not match its manifest")
    return manifest


def open_array(out: Path, manifest: Manifest, split: str, kind: str) -> np.ndarray:
    """The memory-mapped 'tokens' or 'offsets' of a split. Raises JaxlmError if it is not whole."""
    path, sizes = out / f"{split}.{kind}.npy", getattr(manifest, split)
    want = (sizes.tokens, manifest.dtype) if kind == "tokens" else (sizes.documents + 1, "int64")
    try:
        values = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        raise JaxlmError(f"data.dir: {path} is damaged ({e}); delete {out} to rebuild") from e
    if values.shape != want[:1] or values.dtype != np.dtype(want[1]):
        got = f"{values.dtype}{list(values.shape)}, expected {want[1]}[{want[0]}]"
        raise JaxlmError(f"data.dir: {path} is damaged ({got}); delete {out} to rebuild")
    return values


# --------------------------------------------------------------------------------------- requests


def _request(data: DataConfig, vocab_size: int) -> dict[str, Any]:
    """What decides the shards, as far as the config says it."""
    request: dict[str, Any] = {
        "sources": list(data.sources),
        "licence": data.licence,
        "text_field": data.text_field,
        "tokenizer": data.tokenizer,
        "eval_fraction": data.eval_fraction,
    }
    if data.tokenizer == "bpe":
        request["vocab_size"] = vocab_size
    own = [s.rpartition(":")[0] for s in data.sources if is_reference(s)]
    for path in (*own, data.tokenizer):
        if path.endswith((".py", ".json")) and os.path.isfile(path):
            request[f"sha256 of {path}"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return request


def _finished(out: Path, request: dict[str, Any]) -> Manifest | None:
    files = (MANIFEST, *(f"{split}.{kind}.npy" for split, kind in _ARRAYS))
    if not all((out / name).exists() for name in files):
        return None
    manifest = read_manifest(out)
    if manifest.request != request:
        built = manifest.request
        name = next(k for k in (*request, *built) if request.get(k) != built.get(k))
        raise UserError(
            f"data.dir: {out} was built for {name}={built.get(name)!r}, now {request.get(name)!r} "
            "is asked for; choose another data.dir or delete the folder"
        )
    for split, kind in _ARRAYS:
        open_array(out, manifest, split, kind)
    return manifest


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


@dataclass(frozen=True)
class _Corpus:
    """All distinct texts, in a temporary file, in the order of their hashes."""

    text: mmap.mmap
    starts: np.ndarray  # int64 [documents]
    stops: np.ndarray  # int64 [documents]
    digests: np.ndarray  # big-endian uint64 [documents, 4]: sha256, ascending

    def part(self, keep: slice) -> _Corpus:
        return _Corpus(self.text, self.starts[keep], self.stops[keep], self.digests[keep])

    @property
    def bytes(self) -> int:
        return int((self.stops - self.starts).sum())

    def groups(self) -> Iterator[tuple[list[str], int]]:
        """Texts in groups of about GROUP_BYTES, with their size in bytes."""
        group, size = [], 0
        for start, stop in zip(self.starts.tolist(), self.stops.tolist(), strict=True):
            group.append(self.text[start:stop].decode())
            size += stop - start
            if size >= GROUP_BYTES:
                yield group, size
                group, size = [], 0
        if group:
            yield group, size


def _build(
    data: DataConfig, vocab_size: int, out: Path, request: dict[str, Any], report: Progress
) -> Manifest:
    tally = Tally()
    with tempfile.TemporaryFile(dir=out) as spool:  # has no name, so no crash leaves it behind
        corpus, origins = _collect(data, spool, tally, report)
        train, held_out = _split(corpus, data.eval_fraction)
        sample = _sample(train, report)
        tokenizer = tokenizers.create(data.tokenizer, vocab_size, sample)
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1).name
        sizes = [
            _write(out, name, part, tokenizer, dtype, report)
            for name, part in (("train", train), ("eval", held_out))
        ]
    tokenizer.save(out / "tokenizer")
    _write_quarantine(out / "quarantine.jsonl", tally)
    facts = ("kind", "vocab_size", "eos_id", "fingerprint")
    manifest = Manifest(
        request=request,
        locations={s: documents.location(s) for s in data.sources},
        records=tally.records,
        dropped=dict(sorted(tally.dropped.items())),
        origins=origins,
        tokenizer={"name": data.tokenizer, **{n: getattr(tokenizer, n) for n in facts}},
        dtype=dtype,
        train=sizes[0],
        eval=sizes[1],
        inputs_sha256=hashlib.sha256(corpus.digests.tobytes()).hexdigest(),
    )
    write_json(out / MANIFEST, asdict(manifest))
    return manifest


def _collect(
    data: DataConfig, spool: IO[bytes], tally: Tally, report: Progress
) -> tuple[_Corpus, tuple[Origin, ...]]:
    """Spool every text, then sort by hash and drop exact repetitions (the first read stays).

    40 bytes of memory per document; the texts themselves stay on disk.
    """
    total, done = documents.total_bytes(data.sources), 0
    reading = documents.Reading(data.licence, data.text_field, data.file_urls)
    digests, stops, origin_of = bytearray(), array("q", [0]), array("i")
    origins: dict[tuple[str, str, str, str, str], int] = {}
    for d in documents.read(data.sources, tally=tally, reading=reading):
        raw = d.text.encode()
        spool.write(raw)
        digests += hashlib.sha256(raw).digest()
        stops.append(stops[-1] + len(raw))
        terms = (d.source, d.language, d.text_licence, d.package_licence, d.attribution)
        origin_of.append(origins.setdefault(terms, len(origins)))
        if stops[-1] - done >= GROUP_BYTES:
            done = stops[-1]
            report(done, total and max(total, done), "collecting")
    report(stops[-1], stops[-1], "collecting")
    spool.flush()

    digest = np.frombuffer(digests, ">u8").reshape(-1, 4)
    order = np.lexsort(digest.T[::-1])  # stable
    repeated = np.zeros(len(order), bool)
    repeated[1:] = (digest[order][1:] == digest[order][:-1]).all(axis=1)
    if repeated.any():
        tally.dropped["duplicate"] = int(repeated.sum())
    kept = order[~repeated]
    ends = np.array(stops, np.int64)
    corpus = _Corpus(
        text=mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ),
        starts=ends[:-1][kept],
        stops=ends[1:][kept],
        digests=digest[kept],
    )
    of = np.array(origin_of)[kept]
    counts = np.bincount(of, minlength=len(origins))
    sizes = np.bincount(of, corpus.stops - corpus.starts, minlength=len(origins))
    ledger = [Origin(*o, int(counts[i]), int(sizes[i])) for o, i in origins.items()]
    return corpus, tuple(o for o in ledger if o.documents)


def _split(corpus: _Corpus, eval_fraction: float) -> tuple[_Corpus, _Corpus]:
    """Train and eval: the texts whose hash, read as a number in [0, 1), is below `eval_fraction`
    are held out; at least one text, and not all of them."""
    n = len(corpus.digests)
    if n < 2:
        raise UserError(
            "data.sources: one distinct document only, so none can be held out for evaluation"
        )
    below = np.searchsorted(corpus.digests[:, 0].astype(np.float64) / 2.0**64, eval_fraction)
    cut = int(np.clip(below, 1, n - 1))
    return corpus.part(slice(cut, None)), corpus.part(slice(cut))


def _sample(train: _Corpus, report: Progress) -> Iterator[str]:
    """Train texts to learn a vocabulary from; any prefix of the split is a fair sample."""
    total, done = min(train.bytes, BPE_SAMPLE_BYTES), 0
    for texts, size in train.groups():
        if done >= total:
            break
        done += size
        report(min(done, total), total, "training the tokenizer")
        yield from texts


def _write(
    out: Path, name: str, part: _Corpus, tokenizer: Tokenizer, dtype: str, report: Progress
) -> Split:
    """Tokenise one split into its two arrays."""
    sha256, offsets, done = hashlib.sha256(), array("q", [0]), 0
    with open(out / f"{name}.tokens.npy", "wb") as f:
        start = _write_header(f, dtype, 0)
        for texts, size in part.groups():
            rows = tokenizer.encode_batch(texts)
            ids = np.concatenate([x for row in rows for x in (row, [tokenizer.eos_id])])
            if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
                raise JaxlmError(f"data.tokenizer: id {ids.max()} is not below its vocabulary size")
            for row in rows:
                offsets.append(offsets[-1] + len(row) + 1)
            values = ids.astype(dtype).tobytes()
            sha256.update(values)
            f.write(values)
            done += size
            report(done, part.bytes, f"tokenising ({name})")
        f.seek(0)
        assert _write_header(f, dtype, offsets[-1]) == start
        _sync(f)
    with open(out / f"{name}.offsets.npy", "wb") as f:
        np.save(f, np.array(offsets, np.int64))
        _sync(f)
    return Split(
        documents=len(part.digests),
        bytes=part.bytes,
        tokens=offsets[-1],
        tokens_sha256=sha256.hexdigest(),
        offsets_sha256=hashlib.sha256(offsets.tobytes()).hexdigest(),
    )


# ------------------------------------------------------------------------------------------ files


def _write_header(f: IO[bytes], dtype: str, tokens: int) -> int:
    """The .npy header for a flat array, and where it ends; numpy pads it to a fixed length, so
    that the final one fits over the first."""
    shape = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(f, shape)
    return f.tell()


def _write_quarantine(path: Path, tally: Tally) -> None:
    lines = [{"format": "jaxlm.quarantine/1"}, *(u._asdict() for u in tally.listed)]
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _sync(f: IO[bytes]) -> None:
    f.flush()
    os.fsync(f.fileno())


def _sha256(values: np.ndarray) -> str:
    sha256 = hashlib.sha256()
    for i in range(0, len(values), GROUP_BYTES):
        sha256.update(values[i : i + GROUP_BYTES].tobytes())
    return sha256.hexdigest()
