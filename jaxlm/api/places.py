"""A workdir as a folder: locked, and brought and sent back where it is a URL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.files import Mirror
from jaxlm.schema import JaxlmError
from jaxlm.train.workdir import lock

Say = Callable[[str], None]


def quiet(line: str) -> None:
    pass


@contextlib.contextmanager
def workdir_of(url: str | Path) -> Iterator[tuple[Path, Mirror]]:
    """The local folder of a workdir, locked by this process; a URL's is fetched and sent back."""
    mirror = Mirror(url)
    mirror.local.mkdir(parents=True, exist_ok=True)
    with lock(mirror.local):  # before pulling: another process may be at work in the copy
        mirror.pull()
        try:
            yield mirror.local, mirror
        except BaseException:
            with contextlib.suppress(JaxlmError):  # the first failure is the one to tell
                mirror.push()
            raise
        mirror.push()


@contextlib.contextmanager
def folder_of(url: str | Path) -> Iterator[Path]:
    """As `workdir_of`; a folder on disk as it lies, since its owner may be at work in it."""
    mirror = Mirror(url)
    if not mirror.remote:
        yield mirror.local
        return
    with workdir_of(url) as (folder, _):
        yield folder
