"""Members on a Ray cluster, every node of which sees the sweep's folder under the same path.

A group of members is one Ray task, which starts the same worker process that a local sweep uses, so
that rows come out alike. Ray starts the tasks of a lost node again elsewhere; the worker there goes
on from the last checkpoint. What goes on is read from the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Sweep
from jaxlm.data.extras import library
from jaxlm.files import read_jsonl
from jaxlm.scaling.ladder import Member
from jaxlm.scaling.workers import STOP_S, Board, Progress, stopped, worker_environment
from jaxlm.schema import JaxlmError, UserError
from jaxlm.train import record

CARRIED = ("JAX_", "XLA_", "NPROC")  # what decides results goes along; a node has its own paths
TRIES = 5  # of a task whose node or process was lost


class RayPool:
    """Groups of members as tasks; `run` returns when all are done."""

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        groups: list[list[Member]],
        board: Board,
        progress: Progress,
    ) -> None:
        self.ray = library("ray", "ray")
        _connect(self.ray)
        self.folder, self.board, self.progress = folder, board, progress
        self.groups = [[m.name for m in g] for g in groups]
        asked = dict(sweep.resources)
        alone = all(m.role == "holdout" for g in groups for m in g)
        cpu = set(asked) <= {"CPU"}
        if alone and cpu:  # it has a node to itself, as the whole machine in a local sweep
            asked["CPU"] = max(n["Resources"].get("CPU", 1) for n in self.ray.nodes() if n["Alive"])
        configs = [m.config for g in groups for m in g]
        environment = worker_environment(int(asked.get("CPU", 1)) if alone else 1, configs, cpu)
        carried = {k: v for k, v in environment.items() if k.startswith(CARRIED)}
        others = {k: v for k, v in asked.items() if k not in ("CPU", "GPU")}
        task = self.ray.remote(
            num_cpus=asked.get("CPU", 0), num_gpus=asked.get("GPU", 0), resources=others,
            max_retries=TRIES,
        )(train_group)  # fmt: skip
        where = str(folder.resolve())
        self.tasks = {task.remote(where, names, carried): names for names in self.groups}

    def run(self, stop: Any) -> None:
        failed: dict[str, str] = {}
        try:
            while self.tasks:
                self._look()
                self.progress(self.board)
                if stop:
                    raise stopped(stop)
                done, _ = self.ray.wait(list(self.tasks), timeout=0.5)
                for ref in done:
                    names = self.tasks.pop(ref)
                    with contextlib.suppress(KeyError):
                        if why := self._result(ref):
                            failed |= dict.fromkeys(names, why)
        finally:
            for ref in self.tasks:
                self.ray.cancel(ref)
            self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=STOP_S)
        self._look()
        self.progress(self.board)
        if failed:
            name, why = next(iter(failed.items()))
            raise JaxlmError(f"{len(failed)} of the members failed; {name}: {why}")

    def _result(self, ref: Any) -> str:
        """What went wrong with a task that ended; '' where nothing did."""
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayError as e:
            return f"its Ray task was lost: {str(e).splitlines()[0]}"

    def _look(self) -> None:
        """The board from the runs' folders."""
        board = self.board
        board.running = []
        for name in (n for group in self.groups for n in group if n not in board.finished):
            run = self.folder / "runs" / name
            rows = [r for r in read_jsonl(run / "metrics.jsonl") if "train/loss" in r]
            if rows:
                board.done_flops[name], board.losses[name] = (
                    rows[-1]["flops"],
                    rows[-1]["train/loss"],
                )
            if record.read(run) is not None:
                board.finished.append(name)
            elif rows:
                board.running.append(name)


def _connect(ray: Any) -> None:
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "auto")
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address=address, log_to_driver=False)
    except ConnectionError:
        raise UserError(
            f"config.engine: no Ray cluster at {address!r}; start one (ray start --head) or set"
            " RAY_ADDRESS"
        ) from None
    if threading.current_thread() is threading.main_thread():
        for s, handler in handlers.items():
            signal.signal(s, handler)  # Ray's core has put one in its place that aborts


def train_group(folder: str, names: Sequence[str], environment: dict[str, str]) -> str:
    """On a node: a worker process for one group. What went wrong, or ''. Raises RuntimeError if the
    worker died."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    with open(Path(folder) / "workers.log", "a") as log:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxlm.scaling.worker", folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env,
        )  # fmt: skip
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(list(names)) + "\n")
        worker.stdin.flush()
        failure = ""
        for line in worker.stdout:
            message = json.loads(line)
            if message["kind"] == "error":
                failure = message["message"]
            elif message["kind"] == "ready":
                return failure
        raise RuntimeError(f"its worker died (exit {worker.wait()}); see workers.log")
    finally:
        worker.stdin.close()  # amid a group: it saves and leaves
        try:
            worker.wait(STOP_S)
        except subprocess.TimeoutExpired:
            worker.kill()
