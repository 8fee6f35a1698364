"""From a file to records: text, JSON lines, tables, HTML, WARC, Wikipedia dumps, archives.

Memory stays bounded whatever a file holds: a text is cut in pieces, a longer line than
`MAX_LINE_BYTES` is unusable, and a compressed file that grows beyond `MAX_RATIO` is left.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from jaxlm.data import books, markup, suffixes
from jaxlm.data.extras import library
from jaxlm.data.places import open_bytes, shown
from jaxlm.data.record import UNSTATED, Document, Unusable
from jaxlm.files import first_line
from jaxlm.schema import UserError

PIECE_BYTES = 128 * 1024
"""A text file above this is a corpus, not a document: it is cut at the ends of lines, so that a
single large file, too, has something to hold out, and memory stays flat."""

MAX_LINE_BYTES = 32 * 1024**2
"""A longer line of JSON is unusable; nothing longer is ever held in memory."""

MAX_RATIO = 400
"""Text never packs as well as this; what grows more is a bomb (zeros in gzip: 1,030)."""

SMALL_BYTES = 16 * 1024**2  # of which a bomb's first part may consist

Records = Iterator[Document | Unusable]


class Bomb(ValueError):
    """A compressed file that holds far more than text could."""


def size_is_hidden(path: str) -> bool:
    """Whether the size of the file says nothing about the size of its text."""
    suffix, packed = suffixes.split(path.partition("!")[0])
    return bool(packed) or suffix not in (*suffixes.PROSE, *suffixes.CODE, ".jsonl", ".ndjson")


def read_file(path: str, where: str, text_field: str = "text") -> Records:
    """The records of one file, URL, or `archive!pattern`. Raises UserError if it is not whole."""
    path, _, pattern = path.partition("!")
    try:
        stream, size = open_bytes(path, where)
        with stream:
            if suffixes.split(path)[0] in suffixes.ARCHIVES:
                from jaxlm.data import archives

                yield from archives.read(stream, path, pattern, where, text_field)
            else:
                yield from read_stream(stream, size, path, text_field)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as e:
        raise UserError(f"{where}: {shown(path)} is not a whole file: {e}") from e
    except (OSError, Bomb) as e:
        why = getattr(e, "strerror", None) or e
        raise UserError(f"{where}: cannot read {shown(path)}: {why}") from e


def read_stream(stream: BinaryIO, size: int, path: str, text_field: str) -> Records:
    """The records of a file's bytes; `path` names its format and stands in each record's place."""
    suffix, packed = suffixes.split(path)
    name, line = shown(path), [0]
    f = unpacked(stream, size, packed, line) if packed else stream
    try:
        yield from _reader(suffix, text_field)(f, name)
    except Bomb as e:
        yield Unusable(f"{name}:{line[0]}", "decompression bomb", str(e))


def _reader(suffix: str, text_field: str) -> Callable[[BinaryIO, str], Records]:
    if suffix in (".jsonl", ".ndjson"):
        return lambda f, name: _jsonl(f, name, text_field)
    if suffix in (".csv", ".tsv"):
        return lambda f, name: _csv(f, name, text_field, "\t" if suffix == ".tsv" else ",")
    if suffix in (".parquet", ".arrow"):
        return lambda f, name: _columns(f, name, text_field, suffix)
    if suffix in (".html", ".htm", ".xhtml"):
        return markup.html_file
    if suffix in (".warc", ".wet"):
        return markup.warc
    if suffix == ".xml":
        return markup.wikipedia
    return lambda f, name: _text(f, name, suffixes.CODE.get(suffix, ""))


# ----------------------------------------------------------------------------------- decompression


def unpacked(stream: Any, size: int, packed: str, line: list[int]) -> BinaryIO:
    """The decompressed stream; it raises `Bomb` when it grows beyond all text.

    `line[0]` is kept at the number of the line that was reached.
    """
    if packed == ".gz":
        stream = gzip.GzipFile(fileobj=stream)
    elif packed == ".bz2":
        stream = bz2.BZ2File(stream)
    elif packed == ".xz":
        stream = lzma.LZMAFile(stream)  # noqa: SIM115
    elif packed == ".zst":
        stream = _Zstd(stream)
    limit = max(SMALL_BYTES, MAX_RATIO * size) if size else None
    return io.BufferedReader(_Limited(stream, limit, line), 1 << 20)


class _Limited(io.RawIOBase):
    """At most `limit` bytes of a stream."""

    def __init__(self, inner: Any, limit: int | None, line: list[int]) -> None:
        self.inner, self.limit, self.line, self.done = inner, limit, line, 0
        line[0] = 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.inner.read(len(buffer))
        buffer[: len(data)] = data
        self.done += len(data)
        self.line[0] += data.count(b"\n")
        if self.limit is not None and self.done > self.limit:
            raise Bomb(f"above {self.limit:,} bytes, {MAX_RATIO} times what it is packed")
        return len(data)


class _Zstd:
    """The content of Zstandard frames. Unlike the library's own stream it misses a missing end."""

    STEP = 1024  # bytes in: at most 32 MiB out, whatever they are

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.packed, self.plain = stream, b"", b""
        self.library = library("zstandard")
        self.frame: Any = None

    def read(self, size: int) -> bytes:
        while not self.plain:
            self.packed = self.packed or self.stream.read(self.STEP)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("Zstandard frame ended too early")
                return b""
            self.frame = self.frame or self.library.ZstdDecompressor().decompressobj()
            try:
                self.plain = self.frame.decompress(self.packed)
            except self.library.ZstdError as e:
                raise EOFError(str(e)) from e
            self.packed = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        data, self.plain = self.plain[:size], self.plain[size:]
        return data


# -------------------------------------------------------------------------------------------- text


def _text(f: BinaryIO, name: str, language: str) -> Records:
    """A text as one document, or cut in pieces at the ends of lines; a book without its covers."""
    mark = codecs.BOM_UTF8
    first = f.read(books.MAX_BYTES + 1).removeprefix(mark)
    if not first:
        yield Unusable(name, "empty")
        return
    whole = len(first) <= books.MAX_BYTES
    book = books.opened(first, name) if whole and not language else None
    if book:
        first = book.text.encode()
    rest = io.BufferedReader(_Joined(first, None if whole else f), PIECE_BYTES)
    yield from _pieces(rest, len(first), book or Document("", path=name, language=language))


class _Joined(io.RawIOBase):
    """Bytes in memory and then the rest of a stream."""

    def __init__(self, first: bytes, rest: BinaryIO | None) -> None:
        self.first, self.rest = io.BytesIO(first), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.first.read(len(buffer)) or (self.rest.read(len(buffer)) if self.rest else b"")
        buffer[: len(data)] = data
        return len(data)


def _pieces(f: Any, size: int, like: Document) -> Records:
    line = 1
    while raw := f.read(PIECE_BYTES):
        raw += _to_line_end(f)
        place = like.path if size <= PIECE_BYTES else f"{like.path}:{line}"
        try:
            yield replace(like, text=raw.decode(), path=place)
        except UnicodeDecodeError as e:
            bad = line + raw.count(b"\n", 0, e.start)
            yield Unusable(f"{like.path}:{bad}", "not UTF-8", f"byte 0x{raw[e.start]:02x}")
        line += raw.count(b"\n")


def _to_line_end(f: Any) -> bytes:
    """The rest of the line, but no more than a piece; then at least the rest of the character."""
    raw = f.readline(PIECE_BYTES)
    for _ in range(3):
        following = f.peek(1)[:1]
        if not following or not 0x80 <= following[0] < 0xC0:
            break
        raw += f.read(1)
    return raw


# --------------------------------------------------------------------------------- JSON and tables


def _lines(f: BinaryIO, name: str) -> Iterator[tuple[int, bytes | Unusable]]:
    """(number, line) of each; one that is too long is never held."""
    number = 0
    while raw := f.readline(MAX_LINE_BYTES):
        number += 1
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = f.readline(MAX_LINE_BYTES)
            detail = f"above {MAX_LINE_BYTES:,} bytes"
            yield number, Unusable(f"{name}:{number}", "line too long", detail)
        else:
            yield number, raw


def _jsonl(f: BinaryIO, name: str, text_field: str) -> Records:
    for number, raw in _lines(f, name):
        if isinstance(raw, Unusable):
            yield raw
        elif raw.strip():
            yield _json_record(raw, f"{name}:{number}", text_field)


def _json_record(raw: bytes, place: str, text_field: str) -> Document | Unusable:
    try:
        record = json.loads(raw.decode())
    except UnicodeDecodeError as e:
        return Unusable(place, "not UTF-8", f"byte 0x{raw[e.start]:02x}")
    except (ValueError, RecursionError) as e:
        return Unusable(place, "not JSON", str(e))
    return _from_fields(record, place, text_field)


def _from_fields(record: Any, place: str, text_field: str) -> Document | Unusable:
    """A document from named values: a JSON object or a row of a table."""
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        got = ", ".join(map(repr, record))[:80] if isinstance(record, dict) else f"{record!r:.40}"
        return Unusable(place, f"no string field {text_field!r}", f"got {got}")

    def stated(*names: str) -> str:
        return next((v for n in names if isinstance(v := record.get(n), str) and v), "")

    return Document(
        record[text_field],
        source=stated("source"),
        path=place,
        language=stated("language", "lang"),
        text_licence=stated("text_licence", "licence", "license") or UNSTATED,
        package_licence=stated("package_licence") or UNSTATED,
        date=stated("date"),
        attribution=stated("attribution"),
        url=stated("url"),
    )


FIELDS = (
    *("source", "language", "lang", "text_licence", "licence", "license", "package_licence"),
    *("date", "attribution", "url"),
)
"""What a record may say about itself besides its text."""


def _csv(f: BinaryIO, name: str, text_field: str, delimiter: str) -> Records:
    """Rows of a table with a header line."""
    csv.field_size_limit(MAX_LINE_BYTES)
    number, bad = [0], []

    def decoded() -> Iterator[str]:
        for number[0], raw in _lines(f, name):
            if isinstance(raw, Unusable):
                bad.append(raw)
                continue
            raw = raw.removeprefix(codecs.BOM_UTF8) if number[0] == 1 else raw
            yield raw.decode(errors="surrogateescape")

    rows = csv.reader(decoded(), delimiter=delimiter)
    head, first = None, 1
    while True:
        place, first = f"{name}:{first}", number[0] + 1
        try:
            row = next(rows, None)
        except csv.Error as e:
            yield Unusable(place, "not CSV", first_line(e))
            continue
        yield from bad
        bad.clear()
        first = number[0] + 1
        if row is None:
            return
        if head is None:
            head = row
            if text_field not in head:
                got = ", ".join(map(repr, head))[:80]
                yield Unusable(place, f"no string field {text_field!r}", f"got {got}")
                return
        elif row:
            yield _from_fields(dict(zip(head, row, strict=False)), place, text_field)


def _columns(f: BinaryIO, name: str, text_field: str, suffix: str) -> Records:
    """Rows of a Parquet file or of an Arrow stream (what `datasets` saves), a few at a time."""
    pa = library("pyarrow")
    try:
        if suffix == ".parquet":
            table = library("pyarrow.parquet").ParquetFile(f)
            wanted = [c for c in (text_field, *FIELDS) if c in table.schema_arrow.names]
            batches: Iterable[Any] = table.iter_batches(64, columns=wanted)
        else:
            batches = library("pyarrow.ipc").open_stream(f)
        row = 0
        for batch in batches:
            wanted = [c for c in (text_field, *FIELDS) if c in batch.schema.names]
            for i in range(batch.num_rows):
                row += 1
                record = {c: batch.column(c)[i].as_py() for c in wanted}
                yield _from_fields(record, f"{name}:{row}", text_field)
    except (pa.ArrowException, UnicodeDecodeError) as e:
        raise OSError(f"not a whole {suffix} file: {first_line(e)}") from e
