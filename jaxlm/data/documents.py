"""Sources in, documents out: each with where it came from and under which licence.

What cannot be used (bad JSON, bad UTF-8, no text) is never repaired in silence: it is counted and
listed with file and line, and reading fails when that share is more than `MAX_UNUSABLE_SHARE`.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from jaxlm.data import formats, places
from jaxlm.data.record import UNSTATED, Document, Unusable
from jaxlm.files import first_line
from jaxlm.pyfile import is_reference, resolve
from jaxlm.schema import JaxlmError, UserError

__all__ = ["UNSTATED", "Document", "Reading", "Tally", "Unusable", "read", "tallied"]

MAX_UNUSABLE_SHARE = 0.001
MAX_LISTED = 10_000
_NOT_STDLIB = ("test", "tests", "idle_test", "site-packages", "dist-packages")


@dataclass(frozen=True)
class Reading:
    """How sources are read (fields of `DataConfig`)."""

    licence: str = ""
    text_field: str = "text"
    file_urls: bool = False


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time: a file, the standard library, or an own function."""

    index: int  # of the entry of `data.sources`
    source: str
    path: str  # '' unless it is a file


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

    def check(self) -> None:
        """Raises UserError if too much was unusable. Empty records lose nothing: not counted."""
        unusable = self.dropped.total() - self.dropped["empty"]
        share = unusable / max(1, self.records)
        if share > MAX_UNUSABLE_SHARE:
            first = next((u for u in self.listed if u.reason != "empty"), self.listed[0])
            raise UserError(
                f"data.sources: {unusable:,} of {self.records:,} records are unusable "
                f"({share:.2%}; at most {MAX_UNUSABLE_SHARE:.1%} may be); the first: "
                f"{first.place}: {first.reason}{first.detail and f' ({first.detail})'}"
            )


def read(
    sources: Sequence[str],
    licence: str = "",
    tally: Tally | None = None,
    reading: Reading | None = None,
) -> Iterator[Document]:
    """Every usable document of every source, always in the same order.

    Args:
      sources: as `DataConfig.sources`.
      licence: SPDX id for texts that state none of their own.
      tally: receives the counts and the list of what was left out.
      reading: all of how it is read; `licence` is then its own.

    Raises UserError: a missing path, an unknown suffix, an unreadable or truncated file, no text
    at all, or more than `MAX_UNUSABLE_SHARE` of the records unusable (at the end of the reading).
    """
    tally = Tally() if tally is None else tally
    for _, document in numbered(sources, reading or Reading(licence), tally):
        yield document


def numbered(
    sources: Sequence[str], reading: Reading, tally: Tally
) -> Iterator[tuple[int, Document]]:
    """As `read`, each document with the index of its source."""
    yielded = 0
    for unit in units(sources, reading):
        for document in tallied(unit, reading, tally):
            yielded += 1
            yield unit.index, document
    tally.check()
    if not yielded:
        raise UserError(f"data.sources: no text in {', '.join(sources)}")


def units(sources: Sequence[str], reading: Reading) -> list[Unit]:
    """All that is to be read, in order. Raises UserError for what is not there."""
    found = []
    for i, source in enumerate(sources):
        if source == "stdlib" or _is_own(source):
            found.append(Unit(i, source, ""))
        else:
            paths = places.find(source, _where(i), reading.file_urls)
            found += [Unit(i, source, path) for path in paths]
    return found


def tallied(unit: Unit, reading: Reading, tally: Tally) -> Iterator[Document]:
    """The usable documents of one unit, with source and licence filled in."""
    for record in _records(unit, reading):
        tally.records += 1
        record = _usable(record)
        if isinstance(record, Unusable):
            tally.add(record)
            continue
        stated = record.text_licence != UNSTATED or not reading.licence
        yield replace(
            record,
            source=record.source or unit.source,
            text_licence=record.text_licence if stated else reading.licence,
        )


def location(source: str) -> str:
    """Where a source lies on this machine, for the record."""
    if source == "stdlib":
        return f"{sysconfig.get_path('stdlib')} ({_python()})"
    if _is_own(source) or places.is_url(source):
        return source
    return os.path.abspath(os.path.expanduser(source))


def total_bytes(sources: Sequence[str]) -> int:
    """Bytes of text to expect, for an ETA; 0 if compressed, remote or computed sources hide it."""
    total = 0
    for i, source in enumerate(sources):
        if _is_own(source) or places.is_url(source):
            return 0
        paths = _stdlib_files(_where(i)) if source == "stdlib" else places.find(source, _where(i))
        if any(formats.size_is_hidden(p) for p in paths):
            return 0
        total += sum(map(os.path.getsize, paths))
    return total


# --------------------------------------------------------------------------------- kinds of source


def _where(index: int) -> str:
    return f"data.sources[{index}]"


def _is_own(source: str) -> bool:
    return is_reference(source) and not places.is_url(source) and not os.path.exists(source)


def _records(unit: Unit, reading: Reading) -> Iterator[Document | Unusable]:
    where = _where(unit.index)
    if unit.path:
        return formats.read_file(unit.path, where, reading.text_field)
    if unit.source == "stdlib":
        return _stdlib(where)
    return _from_function(unit.source, where)


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def _stdlib_files(where: str) -> list[str]:
    code = places.walk(sysconfig.get_path("stdlib"), where, skip=_NOT_STDLIB)
    return [p for p in code if p.endswith(".py") and not p.endswith("pydoc_data/topics.py")]


def _stdlib(where: str) -> Iterator[Document | Unusable]:
    """The running interpreter's standard library: code without tests, and its help texts."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped, unused-ignore]

    root = sysconfig.get_path("stdlib")
    source = {
        "text_licence": "PSF-2.0",
        "package_licence": "PSF-2.0",
        "attribution": f"Python Software Foundation, standard library of {_python()}",
    }
    for path in _stdlib_files(where):
        for record in formats.read_file(path, where):
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


def _usable(record: Document | Unusable) -> Document | Unusable:
    if isinstance(record, Unusable):
        return record
    if not record.text.strip():
        return Unusable(record.path, "empty")
    if "\0" in record.text:
        return Unusable(record.path, "NUL character", "not a text, or not UTF-8")
    try:
        record.text.encode()
    except UnicodeEncodeError as e:
        return Unusable(record.path, "not UTF-8", f"lone surrogate at character {e.start}")
    return record
