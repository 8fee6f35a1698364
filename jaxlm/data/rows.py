"""Records of evaluation sets and labelled examples: JSON, JSON lines, tables, members of a zip."""

from __future__ import annotations

import bz2
import csv
import fnmatch
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.data import places
from jaxlm.data.extras import library
from jaxlm.files import first_line
from jaxlm.schema import UserError

Row = dict[str, Any]
_PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}


def rows(source: str, where: str = "--task") -> Iterator[Row]:
    """The records of a file or URL, in order; of a zip or wheel those of its members, or of
    'file.zip!pattern' those that match.

    A JSON file is one record or a list of them, a text file is {"text", "path"}. They are held in
    memory: such sets are small. Raises UserError for what is not there or not whole.
    """
    path, _, pattern = source.partition("!")
    path = path if places.is_url(path) else str(Path(path).expanduser())
    try:
        stream, _ = places.open_bytes(path, where)
        with stream:
            data = stream.read()
        if path.endswith((".zip", ".whl")):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                names = [n for n in archive.namelist() if not n.endswith("/")]
                for name in sorted(fnmatch.filter(names, pattern or "*")):
                    yield from _parsed(name, archive.read(name))
        else:
            yield from _parsed(path, data)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file: {path}") from None
    except (OSError, ValueError, EOFError, lzma.LZMAError, zipfile.BadZipFile, csv.Error) as e:
        raise UserError(f"{where}: cannot read {source}: {first_line(e)}") from e


def _parsed(name: str, data: bytes) -> Iterator[Row]:
    packed = next((suffix for suffix in _PACKED if name.endswith(suffix)), "")
    if packed:
        name, data = name.removesuffix(packed), _PACKED[packed](data)
    if name.endswith(".parquet"):
        yield from library("pyarrow.parquet").read_table(io.BytesIO(data)).to_pylist()
        return
    text = data.decode("utf-8-sig" if data[:3] == b"\xef\xbb\xbf" else "utf-8")
    if name.endswith((".jsonl", ".ndjson")):
        for line in filter(str.strip, text.split("\n")):
            yield _object(json.loads(line))
    elif name.endswith(".json"):
        whole = json.loads(text)
        for record in whole if isinstance(whole, list) else [whole]:
            yield _object(record)
    elif name.endswith((".csv", ".tsv")):
        csv.field_size_limit(1 << 25)
        yield from csv.DictReader(
            io.StringIO(text, newline=""), delimiter="\t" if name.endswith(".tsv") else ","
        )
    else:
        yield {"text": text, "path": name}


def _object(record: Any) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {record!r:.40}")
    return record


def field(row: Row, name: str, i: int, where: str) -> Any:
    """A field of record `i`. Raises UserError where it is not there."""
    if name not in row:
        got = ", ".join(map(repr, row))[:80]
        raise UserError(f"{where}: record {i} has no field {name!r} (it has {got})")
    return row[name]
