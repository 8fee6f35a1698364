"""Running members in worker processes: as many as cores, single-threaded, longest member first.

The parent never touches a device. A worker (`python -m jaxlm.scaling.worker FOLDER`) reads groups
of member names on stdin, one JSON list a line, and answers on stdout, one JSON object a line. It
ends when stdin closes, so it cannot outlive its parent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlm import mesh
from jaxlm.config import Config, Sweep
from jaxlm.experiment import fingerprint
from jaxlm.files import write_json
from jaxlm.model.scale import size
from jaxlm.scaling.ladder import Member
from jaxlm.schema import JaxlmError, UserError, to_dict
from jaxlm.train import record

Progress = Callable[["Board"], None]
STOP_S = 7.0  # a worker saves and leaves within this after SIGTERM


@dataclass
class Board:
    """What is going on, for whoever shows it."""

    total_flops: float
    done_flops: dict[str, float] = field(default_factory=dict)  # member → FLOPs done
    losses: dict[str, float] = field(default_factory=dict)  # member → newest training loss
    finished: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)

    @property
    def flops(self) -> float:
        return sum(self.done_flops.values())


@dataclass
class _Worker:
    process: subprocess.Popen[str]
    group: list[str] = field(default_factory=list)


def run_members(
    sweep: Sweep,
    folder: Path,
    planned: Sequence[Member],
    stop: Any = False,
    progress: Progress = lambda board: None,
    until: Mapping[str, int] | None = None,
) -> None:
    """Trains every member that has no record yet, each into runs/NAME. `until`: the step at which
    each is left, saved, instead of at its end.

    Raises JaxlmError naming the members that failed (twice), and Stopped-like JaxlmError when
    `stop` became true: workers have then saved and left.
    """

    def is_done(m: Member) -> bool:
        there = max(_saved(folder, m), default=0) if until else 0
        return _is_done(folder, m) or (until is not None and there >= until[m.name])

    left = [m for m in planned if not is_done(m)]
    board = Board(sum(flops(m) for m in planned))
    for member in planned:
        if member not in left:
            board.done_flops[member.name] = flops(member)
            board.finished.append(member.name)
    progress(board)
    if not left:
        return
    if until is not None:
        write_json(folder / "until.json", {"format": "jaxlm.until/1", "steps": dict(until)})
    else:
        (folder / "until.json").unlink(missing_ok=True)
    groups = sorted(_groups(sweep, left), key=lambda g: -sum(flops(m) for m in g))
    _pool(sweep)(sweep, folder, groups, board, progress).run(stop)
    lost = [m.name for m in left if not is_done(m)]
    if lost:
        raise JaxlmError(f"{folder}: {len(lost)} members have no record, first {lost[0]}")


def run_apart(
    sweep: Sweep, folder: Path, planned: Sequence[Member], data_dir: Path, **how: Any
) -> None:
    """`run_members` in a folder of their own, reading the shards in `data_dir`."""
    data = dataclasses.replace(sweep.base.data, dir=str(data_dir.resolve()))
    inner = dataclasses.replace(sweep, base=dataclasses.replace(sweep.base, data=data))
    rows = [{"name": m.name, "role": m.role, "budget": m.budget, "config": to_dict(m.config)}
            for m in planned]  # fmt: skip
    body = {"format": "jaxlm.sweep/1", "sweep": to_dict(inner), "members": rows}
    write_json(folder / "sweep.json", body)
    run_members(inner, folder, planned, **how)


def flops(member: Member) -> float:
    return float(size(member.config.model).flops_per_token * member.config.tokens)


def _pool(sweep: Sweep) -> Any:
    if sweep.engine == "local":
        return _Pool
    from jaxlm.scaling.ray_pool import RayPool

    return RayPool


def _is_done(folder: Path, member: Member) -> bool:
    row = record.read(folder / "runs" / member.name)
    return row is not None and row.fingerprint == fingerprint(member.config)


def _saved(folder: Path, member: Member) -> list[int]:
    """Steps of which the member has checkpoints."""
    places = (folder / "runs" / member.name / "checkpoints").glob("[0-9]*")
    return [int(p.name) for p in places if p.name.isdigit()]


def n_workers(sweep: Sweep, groups: int) -> int:
    """One process per core on a CPU; one elsewhere, since a process takes all its accelerators."""
    return min(sweep.workers or (cores() if on_cpu() else 1), groups)


def cores() -> int:
    """Cores that this process may use."""
    available = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if available else os.cpu_count() or 1


def on_cpu() -> bool:
    """Whether workers will find a CPU only, told without taking an accelerator."""
    import importlib.util

    if os.environ.get("JAX_PLATFORMS"):
        return os.environ["JAX_PLATFORMS"].startswith("cpu")
    has_cuda = any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))
    has_tpu = importlib.util.find_spec("libtpu") is not None and Path("/dev/accel0").exists()
    return not (has_cuda or has_tpu or Path("/dev/vfio/0").exists())


def _groups(sweep: Sweep, left: Sequence[Member]) -> list[list[Member]]:
    """Members of one shape and horizon together where a population is wanted, else one by one."""
    cpu = on_cpu() if sweep.engine == "local" else set(dict(sweep.resources)) <= {"CPU"}
    alone = sweep.base.optimizer.offload  # slices of what lies in a host's memory would be compiled
    if alone or sweep.population == "off" or (sweep.population == "auto" and cpu):
        return [[m] for m in left]
    from jaxlm.train.step import static

    shapes: dict[Any, list[Member]] = {}
    for member in left:
        c = member.config
        reads = dataclasses.replace(c.data, seed=None)
        shapes.setdefault((static(c), c.train.steps, reads), []).append(member)
    return list(shapes.values())


class _Pool:
    """Workers and the groups that wait for them."""

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        groups: list[list[Member]],
        board: Board,
        progress: Progress,
    ) -> None:
        self.folder, self.board, self.progress = folder, board, progress
        self.waiting = [[m.name for m in g] for g in groups]
        self.tries: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self.inbox: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        n = n_workers(sweep, len(groups))
        # The held-out run is alone by design; a last member of the ladder by chance, and must not
        # come out in other last bits for it.
        alone = all(m.role == "holdout" for g in groups for m in g)
        configs = [m.config for group in groups for m in group]
        self.environment = worker_environment(cores() if alone else 1, configs, on_cpu())
        self.workers = [self._spawn() for _ in range(n)]

    def run(self, stop: Any) -> None:
        try:
            for worker in list(self.workers):
                self._give(worker)
            while self.workers:
                self.progress(self.board)
                if stop:
                    raise stopped(stop)
                try:
                    worker, message = self.inbox.get(timeout=0.2)
                except queue.Empty:
                    continue
                if message is None:
                    self._died(worker)
                else:
                    self._heard(worker, message)
        finally:
            self._end()
        self.progress(self.board)
        if self.failed:
            name, why = next(iter(self.failed.items()))
            raise JaxlmError(f"{len(self.failed)} of the members failed; {name}: {why}")

    def _spawn(self) -> _Worker:
        log = open(self.folder / "workers.log", "a")  # noqa: SIM115 (the child keeps it)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxlm.scaling.worker", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=self.environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which tells the workers
        )
        log.close()
        worker = _Worker(process)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self.inbox.put((worker, json.loads(line)))
        self.inbox.put((worker, None))

    def _give(self, worker: _Worker) -> None:
        """The next group, or the end of its work."""
        assert worker.process.stdin is not None
        try:
            if self.waiting:
                worker.group = self.waiting.pop(0)
                self.board.running += worker.group
                worker.process.stdin.write(json.dumps(worker.group) + "\n")
                worker.process.stdin.flush()
            else:
                worker.process.stdin.close()
        except BrokenPipeError:
            pass  # it died: the listener will say so

    def _heard(self, worker: _Worker, message: dict[str, Any]) -> None:
        kind, name = message["kind"], message.get("name", "")
        if kind == "row":
            self.board.done_flops[name] = message["flops"]
            self.board.losses[name] = message["loss"]
        elif kind == "finished":
            self.board.finished.append(name)
        elif kind == "error":
            for member in worker.group:
                self.failed[member] = message["message"]
        elif kind == "ready":
            self._release(worker)
            self._give(worker)

    def _release(self, worker: _Worker) -> None:
        for name in worker.group:
            self.board.running.remove(name)
        worker.group = []

    def _died(self, worker: _Worker) -> None:
        """A worker ended: at its time, or with a group that another one tries once more."""
        code = worker.process.wait()
        self.workers.remove(worker)
        group = worker.group
        self._release(worker)
        if not group:
            return
        tried = self.tries[group[0]] = self.tries.get(group[0], 0) + 1
        if tried < 2:
            self.waiting.insert(0, group)
            replacement = self._spawn()
            self.workers.append(replacement)
            self._give(replacement)
        else:
            for name in group:
                self.failed[name] = f"its worker died (exit {code}); see workers.log"

    def _end(self) -> None:
        for worker in self.workers:
            worker.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(BrokenPipeError):
                assert worker.process.stdin is not None
                worker.process.stdin.close()  # one that waits for work ends at once
        deadline = time.monotonic() + STOP_S
        for worker in self.workers:
            try:
                worker.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()


def stopped(stop: Any) -> JaxlmError:
    error = JaxlmError("stopped, saved; the same command goes on from there")
    error.exit_code = getattr(stop, "exit_code", 1)
    return error


def worker_environment(devices: int, configs: Sequence[Config], cpu: bool) -> dict[str, str]:
    """The parent's environment and import path, a worker on a CPU kept to one thread per device.

    XLA's thread pool stalls tiny models; two single-threaded processes carry twice one process
    with two threads. A worker that is alone has one such device per core (`devices`, if the mesh
    allows) and splits its batch.
    """
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    if cpu:
        env["JAX_PLATFORMS"] = "cpu"
        if devices == 1:
            env["NPROC"] = "1"  # XLA's pool: else each worker also runs operations on others' cores
        env["XLA_FLAGS"] = " ".join(
            [
                env.get("XLA_FLAGS", ""),
                "--xla_cpu_multi_thread_eigen=false",
                "--xla_backend_optimization_level=1",  # the same speed, a third less to compile
                f"--xla_force_host_platform_device_count={_devices(configs, devices)}",
            ]
        ).strip()
    return env


def _devices(configs: Sequence[Config], most: int) -> int:
    """Devices of a CPU worker: as many, up to `most`, as the mesh of every config can be made of;
    more only where the configs ask for more."""

    def fits(n: int) -> bool:
        with contextlib.suppress(UserError):
            for config in configs:
                shape = dict(zip(mesh.AXES, mesh.sizes(config.mesh, n), strict=True))
                mesh.check_divides(config, shape)
            return True
        return False

    return next((n for n in [*range(most, 0, -1), *range(most + 1, 65)] if fits(n)), 1)
