"""A training run that ends: its processes are started again until it is finished.

One supervisor looks after the processes of a run on this machine: all of them (`processes`, joined
over loopback), or, on each host of a pod, the one of that host. A process that crashes, is killed,
hangs (its own watchdog ends it) or falls silent (no heartbeat) takes the others with it, since a
collective cannot go on without it; then all are started again and go on from the last good
checkpoint. What happened is kept in an append-only log, from which goodput is computed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlm.files import append_jsonl, read_jsonl
from jaxlm.schema import JaxlmError, UserError
from jaxlm.train import pulse
from jaxlm.train.workdir import StopFlag

FORMAT = "jaxlm.supervisor/1"
SUPERVISED = ("train", "finetune")  # commands that go on from a checkpoint of one run
TRIES = 5  # starts from one checkpoint before it gives up
LONGEST_WAIT_S = 60.0
_START_S = 60.0  # until the first heartbeat
_POLL_S = 0.1
_ACCOUNT_S = 60.0  # between rows on a run that is well
# Exit code → how long the other processes are given to leave by themselves: those that were told
# to stop save together, those that hang write down where. All others end at once.
_LEAVE_S = {pulse.HUNG: 5.0, 128 + signal.SIGTERM: 30.0, 128 + signal.SIGINT: 30.0}
_STOP_S = 30.0  # after a signal that is passed on


def supervise(
    command: Sequence[str],
    log: Path,
    processes: int = 1,
    heartbeat_s: float = 10.0,
    say: Callable[[str], None] = print,
) -> int:
    """Runs `jaxlm COMMAND` (train or finetune) until it is finished; the exit code.

    0: finished. 2: a mistake in the command, which is never started again. Otherwise that of the
    process that ended the last sitting (128 + n after signal n): the last of `TRIES` starts that
    brought no newer checkpoint, or one that SIGTERM or SIGINT ended, which are passed on. Rows are
    appended to `log`. Raises UserError.
    """
    if not command or command[0] not in SUPERVISED:
        got = f"got {command[0]!r}" if command else "got nothing"
        raise UserError(f"jaxlm supervise: expected -- train … or -- finetune …, {got}")
    with tempfile.TemporaryDirectory(prefix="jaxlm-") as folder, StopFlag(grace_s=None) as stop:
        found = _Supervisor(tuple(command), log, processes, heartbeat_s, say, Path(folder), stop)
        return found.run()


@dataclass
class _Sitting:
    """The processes from one start to their end."""

    number: int
    processes: list[Any] = field(default_factory=list)
    why: str = ""  # it ended
    code: int = 0  # of the process that ended it, as a shell says it
    deadline: float | None = None  # when the rest are killed
    noticed: float | None = None


@dataclass
class _Supervisor:
    command: tuple[str, ...]
    log: Path
    n: int
    heartbeat_s: float
    say: Callable[[str], None]
    folder: Path
    stop: StopFlag
    fault: float | None = None  # when it was noticed, until training goes on
    beats: list[tuple[dict[str, Any], float]] = field(default_factory=list)  # and its age

    def run(self) -> int:
        self._row("begin", format=FORMAT, command=self.command, processes=self.n,
                  host=socket.gethostname(), pid=os.getpid())  # fmt: skip
        newest, tries, number = -1, 0, 0
        while True:
            sitting = self._sit(number)
            first = self._account().get("first")
            newest, tries = (
                (first, 1) if first is not None and first > newest else (newest, tries + 1)
            )
            last_words = self._final(sitting, tries)
            if last_words:
                return self._leave(sitting, last_words)
            # A fault before the one before it was got over: the time goes on from the first.
            self.fault, number = self.fault or sitting.noticed, number + 1
            wait_s = min(LONGEST_WAIT_S, 2.0 ** (tries - 1))
            self.say(f"{sitting.why}; all start again in {wait_s:g} s")
            until = time.monotonic() + wait_s
            while time.monotonic() < until and not self.stop:
                time.sleep(_POLL_S)
            if self.stop:
                sitting.code = self.stop.exit_code
                return self._leave(sitting, "stopped between two starts")

    def _final(self, sitting: _Sitting, tries: int) -> str:
        """Why there is no further start; '' if there is one."""
        if sitting.code == 0:
            return "finished"
        if self.stop:
            return f"told to stop: {sitting.why}"
        if sitting.code == UserError.exit_code:
            return sitting.why
        if tries >= TRIES:
            return f"{sitting.why}; {tries} starts brought no newer checkpoint"
        return ""

    def _leave(self, sitting: _Sitting, why: str) -> int:
        self._row("leave", code=sitting.code, why=why)
        self.say(f"{why}; {told(read_jsonl(self.log))}")
        return sitting.code

    # --------------------------------------------------------------------------------- a sitting

    def _sit(self, number: int) -> _Sitting:
        for old in self.folder.iterdir():
            old.unlink()
        joined = {"JAXLM_COORDINATOR": f"127.0.0.1:{_free_port()}", "JAXLM_PROCESSES": str(self.n)}
        sitting = _Sitting(number)
        self.beats = [({}, 0.0)] * self.n
        try:
            for i in range(self.n):
                own = joined | {"JAXLM_PROCESS": str(i)} if self.n > 1 else {}
                own[pulse.FILE] = str(self.folder / f"process-{i}")
                sitting.processes.append(_start(self.command, os.environ | own))
            self._row("start", sitting=number, pids=[p.pid for p in sitting.processes])
            self._watch(sitting)
        finally:
            for process in sitting.processes:
                _kill(process)
        self._row("end", sitting=number, why=sitting.why, code=sitting.code,
                  codes=[p.poll() for p in sitting.processes], **self._account())  # fmt: skip
        return sitting

    def _watch(self, sitting: _Sitting) -> None:
        """Until all processes have ended, or the rest have to be killed."""
        passed_on, looked, accounted = False, time.monotonic(), time.monotonic()
        while any(p.poll() is None for p in sitting.processes):
            time.sleep(_POLL_S)
            now = time.monotonic()
            # No more than a few polls: a supervisor that was itself stopped knows nothing.
            self._listen(sitting, min(now - looked, 5 * _POLL_S))
            looked = now
            if self.stop and not passed_on:
                passed_on, sitting.deadline = True, now + _STOP_S
                for process in sitting.processes:
                    if process.poll() is None:
                        process.send_signal(self.stop.signum)
            self._see_exits(sitting)
            if sitting.deadline is not None and now >= sitting.deadline:
                break
            if now - accounted >= _ACCOUNT_S:
                accounted = now
                self._row("well", sitting=sitting.number, **self._account())
        self._listen(sitting, 0.0)
        self._see_exits(sitting)
        if not sitting.why and any(p.poll() is None for p in sitting.processes):
            self._noticed(sitting, "did not leave when told", 128 + signal.SIGKILL, 0.0)
        sitting.why = sitting.why or "finished"

    def _listen(self, sitting: _Sitting, passed_s: float) -> None:
        """Ages what each process last said, and ends the sitting of one that is silent."""
        for i, process in enumerate(sitting.processes):
            beat, age_s = self.beats[i]
            latest = pulse.read(self.folder / f"process-{i}")
            age_s = age_s + passed_s if latest == beat else 0.0
            self.beats[i] = latest, age_s
            limit_s = self.heartbeat_s if latest else max(_START_S, self.heartbeat_s)
            if process.poll() is None and age_s >= limit_s and not sitting.why:
                self._noticed(sitting, f"process {i} is silent for {age_s:.0f} s", pulse.HUNG, 0.0)
        here = self.beats[0][0]
        if self.fault is not None and here.get("step", 0) > here.get("first", 0):
            took = time.time() - self.fault
            self._row("recovered", sitting=sitting.number, after_s=took)
            self.say(f"step {here['step']} {took:.1f} s after the fault was noticed")
            self.fault = None

    def _see_exits(self, sitting: _Sitting) -> None:
        failed = [(p.poll(), i) for i, p in enumerate(sitting.processes) if p.poll()]
        if failed and not sitting.why:
            code, i = min(failed, key=lambda row: _tells_less(row[0]))
            why = f"process {i}: {pulse.means(code)}"
            self._noticed(sitting, why, code if code > 0 else 128 - code, _LEAVE_S.get(code, 0.0))

    def _noticed(self, sitting: _Sitting, why: str, code: int, leave_s: float) -> None:
        sitting.why, sitting.code, sitting.noticed = why, code, time.time()
        if not self.stop:
            self._row("fault", sitting=sitting.number, why=why, code=code)
        deadline = time.monotonic() + leave_s
        sitting.deadline = max(deadline, sitting.deadline or deadline)

    def _account(self) -> dict[str, Any]:
        """How far the processes came and what a step took, as the first of them says."""
        said = self.beats[0][0]
        return {name: said.get(name) for name in ("first", "step", "step_time_s")}

    def _row(self, event: str, **values: Any) -> None:
        append_jsonl(self.log, {"time": time.time(), "event": event, **values})


def _tells_less(code: int) -> int:
    """Of processes that ended at once: the one that was killed is the cause, and those that failed
    or aborted (SIGABRT: jax lost another) its effects."""
    if code == UserError.exit_code:
        return 0
    return 1 if code < 0 and code != -signal.SIGABRT else 2


def _start(command: Sequence[str], environment: dict[str, str]) -> Any:
    """`jaxlm COMMAND` in a session of its own: Ctrl-C reaches it through the supervisor only."""
    return subprocess.Popen(
        [sys.executable, "-m", "jaxlm", *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _kill(process: Any) -> None:
    """It and what it started, also if it is stopped."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ------------------------------------------------------------------------------------- the log


def log_of(command: Sequence[str]) -> Path:
    """`supervisor.jsonl` in the command's `--workdir`; here, if that is a URL or missing.

    On several hosts, each of which has a supervisor and all of which may see one folder, the name
    holds the host's.
    """
    several = any(a.split("=")[0] == "--distributed" for a in command)
    name = f"supervisor-{socket.gethostname()}.jsonl" if several else "supervisor.jsonl"
    for i, argument in enumerate(command):
        flag, equals, value = argument.partition("=")
        if flag == "--workdir":
            value = value if equals else "".join(command[i + 1 : i + 2])
            return Path(name) if "://" in value else Path(value) / name
    return Path(name)


@dataclass(frozen=True)
class Goodput:
    """`share` = useful_s / wall_s. Useful: the steps that were not lost, times what a step took."""

    useful_s: float
    wall_s: float
    starts: int

    @property
    def share(self) -> float:
        return self.useful_s / self.wall_s if self.wall_s > 0 else 0.0


def goodput(rows: Sequence[dict[str, Any]]) -> Goodput:
    """Of all that a log tells. Time is counted while a supervisor was at work.

    Steps after the checkpoint from which the next sitting went on are lost. Everything else that
    takes time (starting, compiling, evaluating, saving, waiting) is not useful, either.
    """
    sittings: dict[tuple[int, int], dict[str, Any]] = {}
    wall_s, begin = 0.0, 0
    for i, row in enumerate(rows):
        if row["event"] == "begin":
            begin = i
        else:
            wall_s += row["time"] - rows[i - 1]["time"]
        if row["event"] in ("well", "end") and row["first"] is not None:
            sittings[begin, row["sitting"]] = row  # the latest of each
    ends = list(sittings.values())
    times = [row["step_time_s"] for row in ends if row["step_time_s"]]
    usual = sum(times) / len(times) if times else 0.0  # for a sitting too short to time a step
    useful_s = 0.0
    for row, after in zip(ends, [*ends[1:], None], strict=False):
        kept = min(row["step"], after["first"]) if after else row["step"]
        useful_s += max(0, kept - row["first"]) * (row["step_time_s"] or usual)
    return Goodput(useful_s, wall_s, sum(row["event"] == "start" for row in rows))


def told(rows: Sequence[dict[str, Any]]) -> str:
    """How it went so far, in a line."""
    found = goodput(rows)
    again = max(0, found.starts - sum(row["event"] == "begin" for row in rows))
    return (
        f"goodput {found.share:.1%} ({found.useful_s:.1f} s of {found.wall_s:.1f} s in useful"
        f" steps), started again {again} time{'' if again == 1 else 's'}"
    )


def status(command: Sequence[str], log: Path) -> str:
    """What the log of a job says of it. Raises UserError where there is none."""
    rows = read_jsonl(log)
    if not rows:
        raise UserError(
            f"{log}: no such log; expected one of 'jaxlm supervise -- {shlex.join(command)}'"
        )
    if rows[0].get("format") != FORMAT:
        raise JaxlmError(f"{log}: expected format {FORMAT}, got {rows[0].get('format')!r}")
    return f"{rows[-1]['event']}: {rows[-1].get('why', 'under way')}; {told(rows)}"
