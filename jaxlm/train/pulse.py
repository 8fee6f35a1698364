"""Signs of life of a training process: a heartbeat for its supervisor, a watchdog over itself.

The heartbeat comes from a thread of its own, from the start of the process on: it is missing where
a process is gone, stopped or starved, and goes on while one compiles for an hour. That a living
process makes progress is the watchdog's business. It too is a thread; a call that hangs without
letting other threads run silences the heartbeat.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.hosts import Lost
from jaxlm.schema import JaxlmError, UserError

FILE = "JAXLM_HEARTBEAT"  # environment: where a supervisor looks for this process's
FORMAT = "jaxlm.heartbeat/1"
BEAT_S = 1.0

HUNG = 75  # exit code (EX_TEMPFAIL of sysexits.h): the same command goes on from its checkpoint
LEAST_S = 60.0  # the least that a chunk of steps is given
TIMES = 10.0  # and so many times the median of the latest
SAVE_S = 600.0  # a save, which waits for a disk
TICK_S = 1.0

_said: dict[str, Any] = {}  # what the loop has said of its progress
_writing = threading.Lock()


# -------------------------------------------------------------------------------------- heartbeat


def start_heartbeat() -> None:
    """Beats every second for as long as the process lives, if a supervisor asks for it.

    When the supervisor is gone, the process is told to save and leave: nobody would restart it,
    and the supervisor that comes next needs its folder.
    """
    if os.environ.get(FILE):
        threading.Thread(target=_beat, args=(os.getppid(),), daemon=True).start()


def _beat(parent: int) -> None:
    while os.getppid() == parent:
        _write()
        time.sleep(BEAT_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _write() -> None:
    """The heartbeat as it is now; a file that cannot be written is a beat that is missing."""
    if not os.environ.get(FILE):
        return
    with _writing, contextlib.suppress(OSError):
        path = Path(os.environ[FILE])
        row = {"format": FORMAT, "pid": os.getpid(), "time": time.time(), **_said}
        part = path.with_name(f".{path.name}.tmp")
        part.write_text(json.dumps(row))
        part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """The last heartbeat of a process, {} before its first.

    `pid`, `time` and, once it trains, `first` (the step it began from), `step` (the last that has
    ended) and `step_time_s` (mean seconds of a step; None before one was timed).
    """
    try:
        row = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return row if isinstance(row, dict) and row.get("format") == FORMAT else {}


# --------------------------------------------------------------------------------------- watchdog


class Pulse:
    """What a loop says of its progress, and the thread that watches that there is some.

        with Pulse(folder, ends_process=True) as pulse:
            pulse.begins(step)
            with pulse.unwatched(): ...  # compiles
            pulse.ended(step, steps, seconds)

    Once a chunk was timed, the next must end within max(60 s, 10 × the median of the latest 100),
    and a save within 600 s; what is `unwatched` (compilation, evaluation) may take any time. If
    not, and if the process is this loop's to end, the stacks of all threads are written to
    `folder/stacks-HOST-PID.txt` and the process exits with `HUNG`: a supervisor restarts it.
    """

    def __init__(self, folder: Path, ends_process: bool):
        self._folder, self._ends_process = folder, ends_process
        self._seconds: deque[float] = deque(maxlen=100)
        self._timed_steps, self._timed_s = 0, 0.0
        self._stretch = [math.inf]  # its limit in seconds; a new list whenever there is progress
        self._over = threading.Event()

    def __enter__(self) -> Pulse:
        if self._ends_process:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        _write()  # a supervisor wants to know how far it came

    def begins(self, step: int) -> None:
        _said.update(first=step, step=step, step_time_s=None)
        _write()

    def ended(self, step: int, steps: int, seconds: float | None) -> None:
        """A chunk of `steps` that took so long (None: it was compiled, too) ended with `step`."""
        if seconds is not None:
            self._seconds.append(seconds)
            self._timed_steps, self._timed_s = self._timed_steps + steps, self._timed_s + seconds
            _said["step_time_s"] = self._timed_s / self._timed_steps
        starts, _said["step"] = _said.get("step") == _said.get("first"), step
        if starts:
            _write()  # a supervisor wants to know when it goes on
        self._stretch = [self._limit_s()]

    def unwatched(self) -> contextlib.AbstractContextManager[None]:
        return self._within(math.inf)

    def saving(self) -> contextlib.AbstractContextManager[None]:
        return self._within(SAVE_S)

    @contextlib.contextmanager
    def _within(self, limit_s: float) -> Iterator[None]:
        self._stretch = [limit_s]
        try:
            yield
        finally:
            self._stretch = [self._limit_s()]

    def _limit_s(self) -> float:
        if not self._seconds:
            return math.inf
        return max(LEAST_S, TIMES * statistics.median(self._seconds))

    def _watch(self) -> None:
        # Ticks are counted, no clock is read: a process that was stopped for an hour (Ctrl-Z, a
        # laptop's lid) has not hung for an hour.
        seen, quiet_s = self._stretch, 0.0
        while not self._over.wait(TICK_S):
            now = self._stretch
            quiet_s = quiet_s + TICK_S if now is seen else 0.0
            seen = now
            if quiet_s >= now[0]:
                self._end(now[0])

    def _end(self, limit_s: float) -> None:
        path = self._folder / f"stacks-{socket.gethostname()}-{os.getpid()}.txt"
        with contextlib.suppress(OSError), open(path, "w") as f:
            faulthandler.dump_traceback(f, all_threads=True)
        line = f"jaxlm: nothing ended in {limit_s:.0f} s: the process hangs and ends now, its"
        os.write(
            2, f"{line} stacks are in {path}; the last committed checkpoint is kept\n".encode()
        )
        os._exit(HUNG)


def means(code: int) -> str:
    """A process's exit code in words; -n: ended by signal n."""
    if code < 0 or code > 128:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code if code < 0 else code - 128).name
            return f"killed by {name}" if code < 0 else f"stopped by {name}"
    known = {
        0: "finished",
        JaxlmError.exit_code: "failed",
        UserError.exit_code: "a mistake in the command",
        HUNG: "hung",
        Lost.exit_code: "lost another process",
    }
    return known.get(code, f"exit code {code}")
