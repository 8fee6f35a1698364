"""Where sources lie: paths, folders, globs and URLs to files, and files to streams of bytes.

A URL is read through fsspec. It may name a bucket or a public host and nothing else: a data set
must not make this machine fetch from its own network (or, unless allowed, from its own disk).
"""

from __future__ import annotations

import difflib
import glob
import io
import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from jaxlm.data.suffixes import is_known, known
from jaxlm.files import first_line
from jaxlm.schema import UserError, hint

PROTOCOLS = ("https", "http", "gs", "s3", "hf", "memory")


def is_url(source: str) -> bool:
    return "://" in source


def find(source: str, where: str, file_urls: bool = False) -> list[str]:
    """The readable files that a path, folder, glob or URL names, sorted.

    `archive!pattern` names an archive and, in it, the members that match. Raises UserError.
    """
    if is_url(source):
        return _find_remote(source, where, file_urls)
    path = os.path.expanduser(source)
    archive, inside, pattern = path.partition("!")
    if os.path.isdir(path):
        found = list(walk(path, where))
    elif os.path.isfile(path) or (inside and os.path.isfile(archive)):
        if not is_known(archive, alone=True):
            raise UserError(f"{where}: cannot read {source}; known are {known()}")
        found = [path]
    elif matches := sorted(glob.glob(archive, recursive=True)):
        each = (walk(m, where) if os.path.isdir(m) else [m] for m in matches)
        wanted = {p for paths in each for p in paths if is_known(p, alone=True)}
        found = sorted(p + inside + pattern for p in wanted)
    else:
        raise UserError(f"{where}: no such file or folder: {source}{_nearest(path)}")
    if not found:
        raise UserError(f"{where}: nothing to read in {source}; known are {known()}")
    return found


def walk(root: str, where: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """Files below `root` with a known suffix, in a fixed order; hidden folders are left out."""

    def fail(e: OSError) -> None:
        raise UserError(f"{where}: cannot read {shown(str(e.filename))}: {e.strerror}") from e

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(
            f for f in folders if f not in skip and f != "__pycache__" and not f.startswith(".")
        )
        for name in sorted(names):
            if is_known(name):
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


def shown(path: str) -> str:
    """A path as one line of text, whatever bytes its name consists of."""
    return path if path.isprintable() else ascii(path)


# ----------------------------------------------------------------------------------------- opening


def open_bytes(path: str, where: str) -> tuple[BinaryIO, int]:
    """A buffered stream of the bytes of a file or URL, and their number (0: not known)."""
    if not is_url(path):
        f = open(path, "rb")  # noqa: SIM115
        return f, os.fstat(f.fileno()).st_size
    try:
        f = _filesystem(path).open(path, "rb")
    except Exception as e:
        raise UserError(f"{where}: cannot read {path}: {first_line(e)}") from e
    return cast(BinaryIO, io.BufferedReader(cast(Any, f))), getattr(f, "size", None) or 0


# ------------------------------------------------------------------------------------------ remote


def _find_remote(url: str, where: str, file_urls: bool) -> list[str]:
    protocol = url.partition("://")[0]
    if "::" in url or protocol not in (*PROTOCOLS, "file"):
        raise UserError(f"{where}: cannot read {url}; {hint(protocol, PROTOCOLS)}")
    if protocol == "file" and not file_urls:
        raise UserError(f"{where}: {url} is on this machine: give a path, or set data.file_urls")
    if protocol in ("http", "https"):  # no listing there: it is one file
        if not is_known(url, alone=True):
            raise UserError(f"{where}: cannot read {url}; known are {known()}")
        return [url]
    try:
        fs = _filesystem(url)
        if any(c in url for c in "*?["):
            found = fs.glob(url)
        else:
            found = fs.find(url) if fs.isdir(url) else [url] if fs.exists(url) else []
    except Exception as e:
        raise UserError(f"{where}: cannot read {url}: {first_line(e)}") from e
    if not found:
        raise UserError(f"{where}: no such file or folder: {url}")
    names = sorted(fs.unstrip_protocol(str(p)) for p in found)
    names = [n for n in names if is_known(n, alone=n == url)]
    if not names:
        raise UserError(f"{where}: nothing to read in {url}; known are {known()}")
    return names


def _filesystem(url: str) -> Any:
    import fsspec

    options = {"get_client": _public_client} if url.startswith(("http:", "https:")) else {}
    return fsspec.core.url_to_fs(url, **options)[0]


async def _public_client(**options: Any) -> Any:
    """An HTTP client that connects to public addresses only.

    The rule is kept at the socket, so that neither a name that resolves to a private address nor a
    redirect nor a name that changes its address in between gets around it.
    """
    import aiohttp

    def public_socket(address: Any) -> socket.socket:
        family, kind, protocol, _, (host, *_) = address
        if not is_public(host):
            raise OSError(f"{host} is a private address")
        return socket.socket(family, kind, protocol)

    connector = aiohttp.TCPConnector(socket_factory=public_socket)
    return aiohttp.ClientSession(connector=connector, **options)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64: an IPv4 address in the last bits
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast
