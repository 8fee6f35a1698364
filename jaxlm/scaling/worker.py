"""A worker process of a sweep: groups of member names in, rows out. See `workers`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm import job
from jaxlm.config import Config
from jaxlm.files import read_json
from jaxlm.schema import JaxlmError, from_dict
from jaxlm.train.loop import Diverged
from jaxlm.train.workdir import StopFlag


def main(folder: Path) -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not into the protocol
    send = _sender(out)
    groups = _groups_from_stdin()
    with StopFlag() as stop:
        for group in groups:
            if stop:
                break
            try:
                _run(folder, group, stop, send)
            except Diverged:  # its record says so; the fit leaves it out and shows it
                send(kind="finished", name=group[0])
            except JaxlmError as e:
                if stop:
                    break
                send(kind="error", message=str(e))
            send(kind="ready")
    return stop.exit_code


def _sender(out: Any) -> Any:
    def send(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return send


def _groups_from_stdin() -> Any:
    """Lines as they come. If the parent is gone, stop as if it had said so."""
    import queue

    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        if os.getppid() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get()) is not None:
        yield json.loads(line)


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

    def progress(run: Any, row: dict[str, Any]) -> None:
        if "train/loss" in row:
            send(kind="row", name=run.config.name, flops=row["flops"], loss=row["train/loss"])

    data_dir = sweep["sweep"]["base"]["data"]["dir"] or folder / "data"
    for record in job.train(tasks, Path(data_dir), stop, progress):
        send(kind="finished", name=record.name)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
