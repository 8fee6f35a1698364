"""Packages and archives: Debian packages, wheels, npm and source tarballs, zip files.

The package's own licence goes into `package_licence`; that of its texts is stated by a Debian
copyright file only (`Files: *`), and is not assumed elsewhere.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import io
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from email.parser import BytesParser
from typing import Any, BinaryIO

from jaxlm.data import suffixes
from jaxlm.data.formats import read_stream, unpacked
from jaxlm.data.record import UNSTATED, Document, Unusable

Records = Iterator[Document | Unusable]
Members = Iterator[tuple[str, int, Callable[[], Any]]]
"""(name, size, opened()) of each file in an archive."""
MAX_NOTE_BYTES = 4 * 1024**2  # of a copyright file or of metadata

# Names of licences in Debian copyright files that are not SPDX's own.
_DEBIAN = {
    "GPL-2+": "GPL-2.0-or-later",
    "GPL-2.0+": "GPL-2.0-or-later",
    "GPL-3.0+": "GPL-3.0-or-later",
    "GPL-2": "GPL-2.0-only",
    "GPL-3+": "GPL-3.0-or-later",
    "GPL-3": "GPL-3.0-only",
    "LGPL-2.1+": "LGPL-2.1-or-later",
    "LGPL-3+": "LGPL-3.0-or-later",
    "GFDL-1.2+": "GFDL-1.2-or-later",
    "GFDL-1.3": "GFDL-1.3-only",
    "Expat": "MIT",
    "public-domain": "LicenseRef-public-domain",
}


@dataclass(frozen=True)
class _Package:
    """What the package says about itself."""

    name: str = ""
    text_licence: str = UNSTATED
    package_licence: str = UNSTATED


def read(stream: BinaryIO, path: str, pattern: str, where: str, text_field: str) -> Records:
    """Records of the members whose names match `pattern` (all if ''), with a known suffix.

    Members come in the archive's order; a Debian package's copyright file is looked up first.
    """
    with contextlib.ExitStack() as held:
        package, wanted = _Package(), []
        for name, size, opened in _members(stream, suffixes.split(path)[0], held):
            package = _described(package, name, size, opened)
            matches = not pattern or fnmatch.fnmatch(name, pattern)
            if matches and suffixes.is_known(name) and not _is_about(name):
                wanted.append((name, size, opened))
        for name, size, opened in wanted:
            with opened() as member:
                for record in read_stream(member, size, f"{path}!{name}", text_field):
                    if isinstance(record, Document):
                        record = _with_terms(record, package)
                    yield record


def _with_terms(record: Document, package: _Package) -> Document:
    unstated = record.text_licence == UNSTATED
    return replace(
        record,
        text_licence=package.text_licence if unstated else record.text_licence,
        package_licence=package.package_licence,
        attribution=record.attribution or package.name,
    )


# ------------------------------------------------------------------------------------------ members


def _members(stream: BinaryIO, suffix: str, held: contextlib.ExitStack) -> Members:
    if suffix in (".whl", ".zip"):
        return _zip_members(stream)
    packed = {".tgz": ".gz"}.get(suffix, suffix.removeprefix(".tar"))
    packed, stream = _deb_data(stream) if suffix == ".deb" else (packed, stream)
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    # To a file first, since members are read in any order.
    plain = held.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    shutil.copyfileobj(unpacked(stream, size, packed, [0]), plain)
    plain.seek(0)
    return _tar_members(plain)


def _zip_members(stream: BinaryIO) -> Members:
    try:
        archive = zipfile.ZipFile(stream)
    except zipfile.BadZipFile as e:
        raise EOFError(str(e)) from e
    for info in archive.infolist():
        if not info.is_dir():
            yield info.filename, info.compress_size, functools.partial(_unzipped, archive, info)


def _unzipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> BinaryIO:
    return unpacked(archive.open(info), info.compress_size, "", [0])


def _tar_members(plain: Any) -> Members:
    try:
        archive = tarfile.open(fileobj=plain)  # noqa: SIM115
        for info in archive:
            if info.isfile():
                name = info.name.removeprefix("./")
                yield name, info.size, functools.partial(archive.extractfile, info)
    except tarfile.TarError as e:
        raise EOFError(str(e)) from e


def _deb_data(stream: BinaryIO) -> tuple[str, BinaryIO]:
    """(compression, tar archive) of a Debian package (deb(5): an ar archive of three members)."""
    if stream.read(8) != b"!<arch>\n":
        raise EOFError("not a Debian package")
    while head := stream.read(60):
        name, size = head[:16].decode("ascii", "replace").strip().rstrip("/"), int(head[48:58])
        if name.startswith("data.tar"):
            return name.removeprefix("data.tar"), io.BytesIO(stream.read(size))
        stream.seek(size + size % 2, io.SEEK_CUR)
    raise EOFError("a Debian package without data")


# ------------------------------------------------------------------------- what a package states


def _is_about(name: str) -> bool:
    """Whether a member tells about the package instead of being its content."""
    base = name.rpartition("/")[2].lower()
    return ".dist-info/" in name or base in ("top_level.txt", "sources.txt", "requires.txt")


def _described(package: _Package, name: str, size: int, opened: Any) -> _Package:
    """`package`, with what a member that describes it states."""
    base = name.rpartition("/")[2]
    found = {
        "copyright": _from_copyright if name.startswith("usr/share/doc/") else None,
        "METADATA": _from_metadata if ".dist-info/" in name else None,
        "PKG-INFO": _from_metadata if name.count("/") == 1 else None,
        "package.json": _from_npm if name.count("/") == 1 else None,
    }.get(base)
    if found is None or size > MAX_NOTE_BYTES:
        return package
    with opened() as f:
        return found(f.read(MAX_NOTE_BYTES), name)


def _from_copyright(raw: bytes, name: str) -> _Package:
    """The licence of `Files: *` in a machine-readable copyright file (copyright-format/1.0)."""
    licence, general = UNSTATED, False
    if raw.startswith(b"Format:"):
        for line in raw.decode("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key == "Files":
                general = value.strip() == "*"
            elif key == "License" and general:
                licence = _spdx(value.strip())
                break
    return _Package(f"Debian package {name.split('/')[3]}", licence, licence)


def _spdx(name: str) -> str:
    """A Debian licence name, or several joined by 'or' or 'and', as an SPDX expression."""
    words = {"or": "OR", "and": "AND"}
    return " ".join(words.get(w, _DEBIAN.get(w, w)) for w in name.replace(",", "").split())


def _from_metadata(raw: bytes, name: str) -> _Package:
    fields = BytesParser().parsebytes(raw, headersonly=True)
    licence = str(fields.get("License-Expression") or fields.get("License") or "").strip()
    short = licence and "\n" not in licence and len(licence) < 40
    named = f"PyPI package {fields.get('Name')} {fields.get('Version')}"
    return _Package(named, package_licence=licence if short else UNSTATED)


def _from_npm(raw: bytes, name: str) -> _Package:
    try:
        stated = json.loads(raw)
    except ValueError:
        return _Package()
    named = f"npm package {stated.get('name')} {stated.get('version')}"
    licence = stated.get("license")
    return _Package(named, package_licence=licence if isinstance(licence, str) else UNSTATED)
