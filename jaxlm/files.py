"""Files that survive a kill, a full disk and a second reader: JSON, JSON lines, remote folders.

A JSON file is replaced whole or not at all, and names its kind and version in `"format"`; a line
of a `.jsonl` counts once its newline is on disk. Everything else in jaxlm sees local paths only:
a folder at a URL is worked on in a local copy, `Mirror`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from absl import logging

from jaxlm.schema import JaxlmError, UserError

MANIFEST = "MANIFEST.json"  # what makes a folder complete: always written, and pushed, last

# ------------------------------------------------------------------------------------------- JSON


def write_json(path: str | Path, obj: dict[str, Any]) -> None:
    """Replaces `path` by `obj`, whole or not at all, also through a power cut.

    `obj` holds `"format": "jaxlm.<kind>/<n>"`. Numpy and jax scalars become numbers, a path its
    text, NaN and infinities null: JSON has none of them. Raises JaxlmError (full disk, no
    permission …) and leaves the old file as it was.
    """
    if not re.fullmatch(r"jaxlm\.\w+/\d+", str(obj.get("format"))):
        raise ValueError(f"{path}: 'format' is {obj.get('format')!r}, not 'jaxlm.<kind>/<n>'")
    write_bytes(path, (json.dumps(plain(obj), indent=1, ensure_ascii=False) + "\n").encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replaces `path` by `data`, whole or not at all. Raises JaxlmError as `write_json`."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        fsync_dir(path.parent)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise cannot_write(path, e) from e


def read_json(path: str | Path, kind: str, newest: int = 1) -> dict[str, Any]:
    """The object in `path`, of format `jaxlm.<kind>/1` up to `/newest`.

    Raises UserError where it is missing, of another kind or from a newer jaxlm, and JaxlmError
    where it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        obj = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; expected one of format jaxlm.{kind}") from None
    except OSError as e:
        raise JaxlmError(f"{path}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise JaxlmError(f"{path}: damaged, not JSON: {e}") from e
    found = obj.get("format") if isinstance(obj, dict) else None
    match = re.fullmatch(rf"jaxlm\.{re.escape(kind)}/(\d+)", str(found))
    if not match:
        raise UserError(f"{path}: expected format jaxlm.{kind}/{newest}, got {found!r}")
    if int(match[1]) > newest:
        raise UserError(f"{path}: {found} is newer than this jaxlm reads (up to /{newest}); update")
    return obj


def plain(value: Any) -> Any:
    """`value` as JSON holds it and gives it back: dicts with str keys, lists, numbers, None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and jax scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ------------------------------------------------------------------------------------- JSON lines


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Adds one row, handed to the operating system before it returns (values as `write_json`).

    The torn last line of a killed writer is cut off first. Raises JaxlmError, e.g. on a full disk;
    the rows before it stay readable.
    """
    path = Path(path)
    line = (json.dumps(plain(row), ensure_ascii=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as f:
            _cut_torn_line(f)
            if f.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as e:
        raise cannot_write(path, e) from e


def _cut_torn_line(f: Any) -> None:
    size = f.seek(0, os.SEEK_END)
    if size:
        f.seek(size - 1)
        if f.read(1) != b"\n":
            f.seek(0)
            f.truncate(f.read().rfind(b"\n") + 1)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of `path`; [] when it is missing. A torn last line is left out.

    Raises JaxlmError naming the line where any other line is damaged.
    """
    return [row for row, _ in _rows(Path(path))]


def filter_jsonl(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the rows that `keep` is false for and a torn last line; others keep their bytes."""
    path = Path(path)
    if path.exists():
        kept = b"".join(line for row, line in _rows(path) if keep(row))
        if len(kept) != path.stat().st_size:
            write_bytes(path, kept)


def _rows(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """(row, its line with the newline) of all whole lines."""
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as e:
        raise JaxlmError(f"{path}: cannot be read: {e.strerror}") from e
    rows = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError as e:
            raise JaxlmError(f"{path}:{number}: damaged, not JSON: {e}") from e
        if not isinstance(row, dict):
            raise JaxlmError(f"{path}:{number}: expected an object, got {type(row).__name__}")
        rows.append((row, line))
    return rows


# ------------------------------------------------------------------------------------ durability


def fsync_dir(path: Path) -> None:
    """Puts the names in a folder on disk: a rename is durable only after this."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(path: Path) -> None:
    """Puts every file and folder below `path` on disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_dir(Path(folder))


def cannot_write(path: str | Path, error: OSError) -> JaxlmError:
    """One line for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return JaxlmError(
            f"{path}: disk full ({error.strerror}); free some space and run the same command again"
        )
    return JaxlmError(f"{path}: cannot be written: {error.strerror or error}")


# ------------------------------------------------------------------------------- remote folders


class Mirror:
    """A folder at a path or a URL (`gs://…`, `s3://…`, any fsspec URL), as the local `.local`.

    A path is its own mirror: `.local` is that path and nothing is copied. A URL is worked on in
    `~/.cache/jaxlm/mirror/<hash of the URL>`, filled by `pull` and sent back by `push`. Three
    guarantees of a disk do not hold for a URL:

    - no exclusive lock: two machines that write to one URL are not stopped (two processes on one
      machine share `.local`, and so its lock);
    - commits have the granularity of `push`: what was written since the last one is lost with the
      machine. A folder's MANIFEST.json is sent last, so that half a checkpoint never counts;
    - it costs one local copy on disk, and the time to fetch it whole at each start.

    It serves one process; a job over several hosts needs a file system that all of them see.
    """

    def __init__(self, url: str | Path):
        self.url = str(url)
        self._sent: dict[str, tuple[int, int]] = {}  # name → (size, mtime) as it is at the URL
        protocol, separator, rest = self.url.partition("://")
        self.remote = bool(separator) and protocol not in ("file", "local")
        if not self.remote:
            self.local = Path(rest if separator else self.url)
            return
        import fsspec

        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as e:
            raise UserError(f"{self.url}: {e}") from e
        self._root = root.rstrip("/")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(self.url.rstrip("/").encode()).hexdigest()[:16]
        self.local = cache / "jaxlm" / "mirror" / name
        self._record = self.local.with_name(f"{name}.sent.json")  # size, mtime of each file there

    def pull(self) -> None:
        """Makes `.local` what is at the URL (a `.lock` in it stays). Raises JaxlmError."""
        if not self.remote:
            return
        self.local.mkdir(parents=True, exist_ok=True)
        self._clear()
        try:
            found = self._fs.find(self._root)
            names = [str(p)[len(self._root) :].lstrip("/") for p in found]
            for name in names:
                if not name or ".." in PurePosixPath(name).parts:
                    raise JaxlmError(f"{self.url}: refused to fetch a file named {name!r}")
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
            self._fs.get(list(found), [str(self.local / name) for name in names])
        except Exception as e:
            raise self._failed("cannot be fetched", e) from e
        self._sent = {name: _stamp(self.local / name) for name in names}
        self._remember()

    def _clear(self) -> None:
        """Empties `.local`. What a failed push left unsent in it is set aside, not deleted."""
        try:
            sent = json.loads(self._record.read_text())
        except (OSError, ValueError):
            sent = {}
        unsent = [n for n in self._names() if list(_stamp(self.local / n)) != sent.get(n)]
        aside = self.local.with_name(f"{self.local.name}.unsent-{time.time_ns()}")
        if unsent:
            aside.mkdir()
            logging.warning(
                "%s: %d files were never sent; kept in %s", self.url, len(unsent), aside
            )
        for old in self.local.iterdir():
            if old.name == ".lock":
                continue
            if unsent:
                old.rename(aside / old.name)
            elif old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()

    def _remember(self) -> None:
        """What is at the URL, for a later process to tell what is not."""
        write_bytes(self._record, json.dumps(self._sent).encode())

    def push(self, paths: Iterable[str | Path] = (".",)) -> None:
        """Sends what changed below `paths` (in `.local`, or relative to it), manifests last.

        Then removes at the URL what this mirror had there and is gone here. Temporary, hidden and
        quarantined (`*.corrupt`) files stay here. Raises JaxlmError; nothing is then removed.
        """
        if not self.remote:
            return
        below = [PurePosixPath(os.path.relpath(self.local / p, self.local)) for p in paths]
        now = {n: _stamp(self.local / n) for n in self._names() if _is_below(n, below)}
        changed = [n for n, stamp in now.items() if self._sent.get(n) != stamp]
        gone = [n for n in self._sent if n not in now and _is_below(n, below)]
        try:
            for last in (False, True):
                group = [n for n in changed if _is_manifest(n) == last]
                if group:
                    remote = [f"{self._root}/{n}" for n in group]
                    self._fs.put([str(self.local / n) for n in group], remote)
                self._sent |= {n: now[n] for n in group}
            for n in sorted(gone, key=_is_manifest, reverse=True):
                self._fs.rm_file(f"{self._root}/{n}")
                del self._sent[n]
        except Exception as e:
            raise self._failed("cannot be sent to", e) from e
        self._remember()

    def _names(self) -> list[str]:
        names = []
        for folder, folders, files in os.walk(self.local):
            folders[:] = [f for f in folders if _is_kept(f)]
            names += [os.path.relpath(os.path.join(folder, f), self.local) for f in files]
        return sorted(Path(n).as_posix() for n in names if _is_kept(Path(n).name))

    def _failed(self, what: str, error: Exception) -> JaxlmError:
        if isinstance(error, JaxlmError):
            return error
        return JaxlmError(f"{self.url}: {what}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """`Type: message`, its first line, at most 200 characters."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_kept(name: str) -> bool:
    return not name.startswith(".") and not name.endswith((".tmp", ".corrupt"))


def _is_manifest(name: str) -> bool:
    return PurePosixPath(name).name == MANIFEST


def _is_below(name: str, folders: list[PurePosixPath]) -> bool:
    return any(PurePosixPath(name).is_relative_to(f) for f in folders)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
