"""A workdir as a folder: locked, and brought and sent back where it is a URL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm import hosts
from jaxlm.files import Mirror
from jaxlm.schema import JaxlmError, UserError
from jaxlm.train.workdir import LOCK, lock

Say = Callable[[str], None]


def quiet(line: str) -> None:
    pass


@contextlib.contextmanager
def workdir_of(url: str | Path) -> Iterator[tuple[Path, Mirror]]:
    """The local folder of a workdir, locked by this process (of several, by the lead); a URL's is
    fetched and sent back."""
    mirror = Mirror(url)
    if mirror.remote and hosts.several():
        raise UserError(
            f"--workdir: {url}: several processes need a folder that all of them see; mount the"
            " bucket (gcsfuse) or use a network file system"
        )
    with contextlib.ExitStack() as held:

        def take() -> None:
            mirror.local.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(mirror.local))
            mirror.pull()  # after locking: another process may be at work in the copy

        hosts.by_lead(take)
        if hosts.anyone(not (mirror.local / LOCK).exists()):
            raise UserError(f"--workdir: not all processes see the same folder {mirror.local}")
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
