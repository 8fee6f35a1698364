"""A run's folder belongs to one process, and that process leaves when it is told to."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from absl import logging

from jaxlm.schema import UserError

LOCK = ".lock"
_held: dict[Path, tuple[int, int]] = {}  # locked folder → (descriptor, thread)
_flags: list[StopFlag] = []  # those that listen


def _let_go_in_child() -> None:
    """A forked child has neither: it would keep a killed parent's lock, and its SIGTERM would be
    written to the parent's pipe."""
    for fd, _ in _held.values():
        os.close(fd)
    _held.clear()
    for flag in _flags[::-1]:
        flag.__exit__()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Holds `folder/.lock` (made if needed), which names this host, pid and start.

    Raises UserError at once where another process or thread holds it; the thread that holds it
    may take it again. The operating system frees the lock of a dead process. On a network file
    system it is as exclusive as that system's `flock`.
    """
    folder = Path(folder).resolve()
    if folder in _held and _held[folder][1] == threading.get_ident():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(fd)
        os.close(fd)
        raise UserError(f"{folder}: in use by {holder}; one process at a time") from None
    except OSError as e:
        logging.warning("%s: this file system has no locks (%s)", folder, e.strerror)
    _held[folder] = fd, threading.get_ident()
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, _this_process(), 0)
        yield
    finally:
        if _held.pop(folder, None):  # a forked child no longer has it
            os.ftruncate(fd, 0)
            os.close(fd)


def _this_process() -> bytes:
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    row = {"format": "jaxlm.lock/1", "host": socket.gethostname(), "pid": os.getpid()}
    return json.dumps(row | {"started": started}).encode()


def _holder(fd: int) -> str:
    for _ in range(25):  # it may have the lock and not yet have said who it is
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(os.pread(fd, 4096, 0))
            return f"process {row['pid']} on {row['host']} since {row['started']}"
        time.sleep(0.01)
    return "another process"


class StopFlag:
    """True once SIGTERM or SIGINT has come; the loop polls it, saves and leaves.

        with StopFlag() as stop:
            while not stop: ...
        if stop: sys.exit(stop.exit_code)

    A thread sees the signal even while the main thread is inside a long C++ call (a compilation).
    `grace_s` seconds after the first signal, or at a second one, it ends the process with
    `exit_code` if it is still inside the `with`: the last committed checkpoint is safe. With
    `grace_s=None` (a notebook, whose kernel is not ours to end) it never does, and a second signal
    raises KeyboardInterrupt. Signals that were ignored stay ignored; the previous handlers are
    back after the `with`. Outside the main thread, where Python allows no handlers, it stays False.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, grace_s: float | None = 8.0):
        self.grace_s = grace_s
        self.signum = 0

    def __bool__(self) -> bool:
        return self.signum != 0

    @property
    def ends_process(self) -> bool:
        """Whether the process is ours to end."""
        return self.grace_s is not None

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it; 0 without a signal."""
        return 128 + self.signum if self.signum else 0

    def __enter__(self) -> StopFlag:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # Python's C handler writes the signal's number here at once, whatever the main thread does.
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        for signum in self.SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, self._handle) or signal.SIG_DFL
        _flags.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self not in _flags:
            return
        _flags.remove(self)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._writer)  # its reader, the thread, ends

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.grace_s is None and self.signum:
            raise KeyboardInterrupt
        self.signum = signum

    def _watch(self, reader: int) -> None:
        deadline = None
        while True:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([reader], [], [], wait)[0]:
                self._end("is still busy")
            received = os.read(reader, 64)
            if not received:
                break
            for signum in received:
                if signum in self._previous and self.grace_s is not None:
                    if deadline is not None:
                        self._end("was told twice")
                    self.signum, deadline = signum, time.monotonic() + self.grace_s
        os.close(reader)

    def _end(self, why: str) -> None:
        name = signal.Signals(self.signum).name
        line = f"{name}: the process {why} and ends now; the last committed checkpoint is kept\n"
        os.write(2, line.encode())
        os._exit(self.exit_code)
