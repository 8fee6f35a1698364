"""Sources in, documents out: each with where it came from and under which licence.

What cannot be used (bad JSON, bad UTF-8, no text) is never repaired in silence: it is counted and
listed with file and line, and reading fails when that share is more than `MAX_UNUSABLE_SHARE`.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import gzip
import json
import os
import platform
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from jaxlm.files import first_line
from jaxlm.pyfile import is_reference, resolve
from jaxlm.schema import JaxlmError, UserError

UNSTATED = "LicenseRef-unstated"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz")

PIECE_BYTES = 128 * 1024
"""A text file above this is a corpus, not a document: it is cut at the ends of lines, so that a
single large file, too, has something to hold out, and memory stays flat."""

MAX_LINE_BYTES = 64 * 1024**2
"""A longer line of JSON is unusable; nothing longer is ever held in memory."""

MAX_UNUSABLE_SHARE = 0.001
MAX_LISTED = 10_000


@dataclass(frozen=True)
class Document:
    """One text and its provenance. Licences are SPDX ids or `LicenseRef-unstated`."""

    text: str
    source: str = ""  # the entry of `data.sources`, or what the record itself says
    path: str = ""  # file, 'file:line' inside a larger file, or module and item
    language: str = ""  # BCP 47 ('en', 'ja'), 'python' for code, '' unknown
    text_licence: str = UNSTATED
    package_licence: str = UNSTATED  # of what carried the text; often not the text's own
    date: str = ""
    attribution: str = ""


class Unusable(NamedTuple):
    place: str  # 'file:line'
    reason: str  # one of few, counted
    detail: str = ""


@dataclass
class Tally:
    """What `read` met and did not yield."""

    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    listed: list[Unusable] = field(default_factory=list)

    def add(self, record: Unusable) -> None:
        self.dropped[record.reason] += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(record)

    @property
    def unusable(self) -> int:
        """Empty records lose nothing, so they do not count against a corpus."""
        return self.dropped.total() - self.dropped["empty"]


def read(
    sources: Sequence[str], licence: str = "", tally: Tally | None = None
) -> Iterator[Document]:
    """Every usable document of every source, always in the same order.

    Args:
      sources: as `DataConfig.sources`.
      licence: SPDX id for texts that state none of their own.
      tally: receives the counts and the list of what was left out.

    Raises UserError: a missing path, an unknown suffix, an unreadable or truncated file, no text
    at all, or more than `MAX_UNUSABLE_SHARE` of the records unusable (at the end of the reading).
    """
    tally = Tally() if tally is None else tally
    yielded = 0
    for i, source in enumerate(sources):
        for record in _records(source, f"data.sources[{i}]"):
            tally.records += 1
            record = _usable(record)
            if isinstance(record, Unusable):
                tally.add(record)
                continue
            yielded += 1
            stated = record.text_licence != UNSTATED or not licence
            yield replace(
                record,
                source=record.source or source,
                text_licence=record.text_licence if stated else licence,
            )
    share = tally.unusable / max(1, tally.records)
    if share > MAX_UNUSABLE_SHARE:
        first = next((u for u in tally.listed if u.reason != "empty"), tally.listed[0])
        raise UserError(
            f"data.sources: {tally.unusable:,} of {tally.records:,} records are unusable "
            f"({share:.2%}; at most {MAX_UNUSABLE_SHARE:.1%} may be); the first: "
            f"{first.place}: {first.reason}{first.detail and f' ({first.detail})'}"
        )
    if not yielded:
        raise UserError(f"data.sources: no text in {', '.join(sources)}")


def location(source: str) -> str:
    """Where a source lies on this machine, for the record."""
    if source == "stdlib":
        return f"{sysconfig.get_path('stdlib')} ({_python()})"
    return source if _is_own(source) else os.path.abspath(os.path.expanduser(source))


def total_bytes(sources: Sequence[str]) -> int:
    """Bytes of text to expect, for an ETA; 0 if compressed or computed sources hide it."""
    if any(_is_own(s) for s in sources):
        return 0
    paths = [p for i, s in enumerate(sources) for p in _files(s, f"data.sources[{i}]")]
    return 0 if any(p.endswith(".gz") for p in paths) else sum(map(os.path.getsize, paths))


# --------------------------------------------------------------------------------- kinds of source


_NOT_STDLIB = ("test", "tests", "idle_test", "site-packages", "dist-packages")


def _is_own(source: str) -> bool:
    return is_reference(source) and not os.path.exists(source)


def _records(source: str, where: str) -> Iterator[Document | Unusable]:
    if source == "stdlib":
        return _stdlib(where)
    if _is_own(source):
        return _from_function(source, where)
    return _from_files(_files(source, where), where)


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def _stdlib(where: str) -> Iterator[Document | Unusable]:
    """The running interpreter's standard library: code without tests, and its help texts."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped, unused-ignore]

    root = sysconfig.get_path("stdlib")
    source = {
        "text_licence": "PSF-2.0",
        "package_licence": "PSF-2.0",
        "attribution": f"Python Software Foundation, standard library of {_python()}",
    }
    for record in _from_files(_files("stdlib", where), where):
        if isinstance(record, Document):
            record = replace(record, path=os.path.relpath(record.path, root), **source)
        yield record
    for name in sorted(topics):
        path = f"pydoc_data/topics.py:{name}"
        yield Document(topics[name], path=path, language="en", **source)


def _from_function(reference: str, where: str) -> Iterator[Document]:
    """A user's own source: a function without arguments that yields Document or str."""
    try:
        for i, item in enumerate(resolve(reference, where)()):
            if isinstance(item, str):
                item = Document(item)
            if not isinstance(item, Document) or not isinstance(item.text, str):
                raise UserError(
                    f"{where}: {reference} must yield Document or str, item {i} is {item!r:.80}"
                )
            yield item if item.path else replace(item, path=f"{reference}:{i}")
    except JaxlmError:
        raise
    except Exception as e:
        raise UserError(f"{where}: {reference} failed: {first_line(e)}") from e


def _from_files(paths: Iterable[str], where: str) -> Iterator[Document | Unusable]:
    for path in paths:
        try:
            if path.endswith((".jsonl", ".jsonl.gz")):
                yield from _jsonl(path)
            else:
                yield from _text(path, "python" if path.endswith(".py") else "")
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise UserError(f"{where}: {_shown(path)} is not a whole gzip file: {e}") from e
        except OSError as e:
            raise UserError(f"{where}: cannot read {_shown(path)}: {e.strerror}") from e


# ----------------------------------------------------------------------------------------- finding


def _files(source: str, where: str) -> list[str]:
    """The readable files that a path, folder or glob names, sorted."""
    if source == "stdlib":
        code = _walk(sysconfig.get_path("stdlib"), where, skip=_NOT_STDLIB)
        return [p for p in code if p.endswith(".py") and not p.endswith("pydoc_data/topics.py")]
    if "://" in source:
        raise UserError(f"{where}: expected a path on this machine, got {source}")
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        found = list(_walk(path, where))
    elif os.path.isfile(path):
        if not path.endswith(SUFFIXES):
            raise UserError(f"{where}: cannot read {source}; known are {' '.join(SUFFIXES)}")
        found = [path]
    elif matches := sorted(glob.glob(path, recursive=True)):
        each = (_walk(m, where) if os.path.isdir(m) else [m] for m in matches)
        found = sorted({p for paths in each for p in paths if p.endswith(SUFFIXES)})
    else:
        raise UserError(f"{where}: no such file or folder: {source}{_nearest(path)}")
    if not found:
        raise UserError(f"{where}: nothing to read in {source}; known are {' '.join(SUFFIXES)}")
    return found


def _walk(root: str, where: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """Files below `root` with a known suffix, in a fixed order; hidden folders are left out."""

    def fail(e: OSError) -> None:
        raise UserError(f"{where}: cannot read {_shown(str(e.filename))}: {e.strerror}") from e

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(
            f for f in folders if f not in skip and f != "__pycache__" and not f.startswith(".")
        )
        for name in sorted(names):
            if name.endswith(SUFFIXES):
                yield os.path.join(folder, name)


def _nearest(path: str) -> str:
    """A hint at what exists: the first missing part of `path` against its neighbours."""
    missing = Path(path)
    while not missing.parent.exists():
        missing = missing.parent
    names = os.listdir(missing.parent) if missing.parent.is_dir() else []
    here = missing.parent == Path(".")
    near = difflib.get_close_matches(missing.name, names + ["stdlib"] * here, n=1, cutoff=0.5)
    return f"; did you mean {str(missing.parent / near[0])!r}?" if near else ""


def _shown(path: str) -> str:
    """A path as one line of text, whatever bytes its name consists of."""
    return path if path.isprintable() else ascii(path)


# ----------------------------------------------------------------------------------------- reading


def _text(path: str, language: str) -> Iterator[Document | Unusable]:
    shown, line, mark = _shown(path), 1, codecs.BOM_UTF8
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        while raw := f.read(PIECE_BYTES):
            raw += _to_line_end(f)
            place = shown if size <= PIECE_BYTES else f"{shown}:{line}"
            try:
                text = raw.removeprefix(mark).decode()
                yield Document(text, path=place, language=language)
            except UnicodeDecodeError as e:
                bad = line + raw.count(b"\n", 0, e.start)
                yield Unusable(f"{shown}:{bad}", "not UTF-8", f"byte 0x{raw[e.start]:02x}")
            line, mark = line + raw.count(b"\n"), b""
        if not size:
            yield Unusable(shown, "empty")


def _to_line_end(f: BinaryIO) -> bytes:
    """The rest of the line, but no more than a piece; then at least the rest of the character."""
    raw = f.readline(PIECE_BYTES)
    peek = cast(Any, f).peek  # a BufferedReader
    for _ in range(3):
        following = peek(1)[:1]
        if not following or not 0x80 <= following[0] < 0xC0:
            break
        raw += f.read(1)
    return raw


def _jsonl(path: str) -> Iterator[Document | Unusable]:
    shown, number = _shown(path), 0
    with cast(BinaryIO, gzip.open(path) if path.endswith(".gz") else open(path, "rb")) as f:
        while raw := f.readline(MAX_LINE_BYTES):
            number += 1
            place = f"{shown}:{number}"
            if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = f.readline(MAX_LINE_BYTES)
                yield Unusable(place, "line too long", f"above {MAX_LINE_BYTES:,} bytes")
            elif raw.strip():
                yield _json_record(raw, place)


def _json_record(raw: bytes, place: str) -> Document | Unusable:
    try:
        record = json.loads(raw.decode())
    except UnicodeDecodeError as e:
        return Unusable(place, "not UTF-8", f"byte 0x{raw[e.start]:02x}")
    except (ValueError, RecursionError) as e:
        return Unusable(place, "not JSON", str(e))
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        got = ", ".join(map(repr, record))[:80] if isinstance(record, dict) else f"{record!r:.40}"
        return Unusable(place, "no string field 'text'", f"got {got}")

    def stated(*names: str) -> str:
        return next((v for n in names if isinstance(v := record.get(n), str) and v), "")

    return Document(
        record["text"],
        source=stated("source"),
        path=place,
        language=stated("language", "lang"),
        text_licence=stated("licence", "license") or UNSTATED,
        date=stated("date"),
        attribution=stated("attribution"),
    )


def _usable(record: Document | Unusable) -> Document | Unusable:
    if isinstance(record, Unusable):
        return record
    if not record.text.strip():
        return Unusable(record.path, "empty")
    try:
        record.text.encode()
    except UnicodeEncodeError as e:
        return Unusable(record.path, "not UTF-8", f"lone surrogate at character {e.start}")
    return record
