"""A worker process of a sweep: groups of member names in, rows out. See `workers`."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm import job
from jaxlm.config import Config
from jaxlm.data import tokenizer
from jaxlm.files import read_json
from jaxlm.schema import JaxlmError, UserError, from_dict
from jaxlm.tasks import watching
from jaxlm.train.loop import Stopped
from jaxlm.train.workdir import StopFlag, lock


def main(folder: Path) -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not into the protocol
    send = _sender(out)
    busy = threading.Event()
    with StopFlag() as stop:
        for group in _groups_from_stdin(busy, stop):
            if stop:
                break
            try:
                _run(folder, group, stop, send)
            except JaxlmError as e:
                if stop:
                    break
                send(kind="error", message=str(e))
            busy.clear()
            send(kind="ready")
    return stop.exit_code


def _sender(out: Any) -> Any:
    def send(**message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent is gone, and stdin says so too
            out.write(json.dumps(message) + "\n")
            out.flush()

    return send


def _groups_from_stdin(busy: threading.Event, stop: StopFlag) -> Iterator[list[str]]:
    """Groups as they come, each of which sets `busy`. The parent closes stdin when there are no
    more; if it closes amid a group, the parent stops or is gone."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            busy.set()
            lines.put(line)
        lines.put(None)
        if busy.is_set():  # no second signal: that would end this process before it has saved
            stop.signum = stop.signum or signal.SIGTERM

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get()) is not None:
        yield json.loads(line)


def _wait_for(run: Path, stop: Any) -> None:
    """Until the folder is free: the workers of a parent that was killed save before they leave."""
    deadline = time.monotonic() + 10.0
    while not stop:
        try:
            with lock(run):
                return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@dataclass
class _Until:
    """True once `stop` is, or the run has come to a step."""

    stop: Any
    step: int
    done: int = 0

    def __bool__(self) -> bool:
        return bool(self.stop) or self.done >= self.step


def _run(folder: Path, names: Sequence[str], stop: Any, send: Any) -> None:
    sweep = read_json(folder / "sweep.json", "sweep")
    rows = {m["name"]: m for m in sweep["members"]}
    tasks = [
        job.Task(
            from_dict(Config, rows[n]["config"]), folder / "runs" / n, rows[n]["role"],
            rows[n]["budget"],
        )
        for n in names
    ]  # fmt: skip

    ends = folder / "until.json"
    steps = read_json(ends, "until")["steps"] if ends.exists() else {}
    leave = _Until(stop, min((steps[n] for n in names if n in steps), default=sys.maxsize))

    def progress(run: Any, row: dict[str, Any]) -> None:
        leave.done = max(leave.done, row["step"])
        if "train/loss" in row:
            send(kind="row", name=run.config.name, flops=row["flops"], loss=row["train/loss"])

    for task in tasks:
        _wait_for(task.folder, stop)
    data_dir = Path(sweep["sweep"]["base"]["data"]["dir"] or folder / "data")
    asked = watching.read(tasks[0].config)
    watch = watching.observers(asked, tokenizer.load(data_dir / "tokenizer")) if asked else ()
    try:
        for record in job.train(tasks, data_dir, leave, progress, watch=watch):
            send(kind="finished", name=record.name)
    except Stopped:
        if stop:
            raise


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
