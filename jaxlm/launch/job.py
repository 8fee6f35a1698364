"""A job: a command of jaxlm and where it is to run, in one small Python file with `get_job()`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxlm import pyfile
from jaxlm.chips import Topology, topology
from jaxlm.schema import UserError, checked, doc, override


@dataclass(frozen=True)
class Local:
    """This machine."""

    processes: int = doc(
        0,
        "joined into one run and started again when one crashes or hangs (`jaxlm supervise`);"
        " 0: the command alone",
    )


@dataclass(frozen=True)
class TpuVm:
    """A queued Cloud TPU, every worker of which runs the command (TPU7x: GKE only)."""

    project: str = doc("", "Google Cloud project")
    zone: str = doc("", "as in 'us-east5-b'")
    topology: str = doc("v5e:4x4", "chips, as `jaxlm plan` takes them")
    slices: int = doc(1, "so many times")
    runtime_version: str = doc("", "'': the one that Google names for the chip")
    spot: bool = doc(False, "cheaper, and may be taken away")
    upload: str = doc("", "folder that is copied to ~/NAME of every worker; '': none")


@dataclass(frozen=True)
class Gke:
    """A JobSet on a GKE cluster with TPU node pools, applied by kubectl's present context."""

    image: str = doc("", "container with jaxlm in it")
    topology: str = doc("v5e:4x4", "chips of a slice, as `jaxlm plan` takes them")
    slices: int = doc(1, "so many of them")
    namespace: str = doc("default", "Kubernetes namespace")
    service_account: str = doc("", "that may read and write the workdir; '': the namespace's own")
    queue: str = doc("", "Kueue's LocalQueue; '': none")
    max_restarts: int = doc(100, "after a crash or a lost node; a mistake in the command is final")


@dataclass(frozen=True)
class Ray:
    """A Ray cluster. A sweep spreads its members over it with --config.engine=ray."""

    address: str = doc("", "of its dashboard, 'http://host:8265'; '': RAY_ADDRESS")
    working_dir: str = doc(".", "folder that is sent along")


@dataclass(frozen=True)
class Slurm:
    """A Slurm cluster: a run over nodes, or a sweep as an array, on a file system that all see."""

    nodes: int = doc(1, "of a run; each starts one process")
    array: int = doc(0, "tasks that share a sweep's members; 0: the command is one run")
    partition: str = doc("", "'': the default")
    time: str = doc("24:00:00", "limit; the same command goes on where it was")
    cpus_per_task: int = doc(1, "cores of each process")
    gpus_per_node: int = doc(0, "0: none")


Where = Local | TpuVm | Gke | Ray | Slurm


@dataclass(frozen=True)
class Job:
    """A command and its machines."""

    name: str = doc("", "small letters, digits and hyphens")
    command: tuple[str, ...] = doc((), "of jaxlm: ('train', '--config=…', '--workdir=gs://…')")
    setup: tuple[str, ...] = doc((), "shell lines before it, on every machine")
    where: Where = field(default_factory=Local)


def load(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Job:
    """The Job of a file, `(dotted field, text)` overrides applied. Raises UserError."""
    module = pyfile.load(Path(path), "--config")
    make = getattr(module, "get_job", None)
    if make is None:
        raise UserError(f"--config: {path} defines no get_job()")
    with pyfile.told_by_line(module, "--config"):
        job = make()
    if not isinstance(job, Job):
        raise UserError(f"--config: {path} returned {type(job).__name__}, not a Job")
    for dotted, text in overrides:
        job = override(job, dotted, text)
    return valid(job)


def valid(job: Job) -> Job:
    """Raises UserError, one line."""
    checked(job.where, "config.where")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", job.name):
        raise UserError(
            "config.name: expected small letters, digits and hyphens, 40 at most, beginning with a"
            f" letter, got {job.name!r}"
        )
    if not job.command:
        raise UserError(
            "config.command: expected a command of jaxlm, as in ('train', '--config=…')"
        )
    needed = {TpuVm: ("project", "zone"), Gke: ("image",)}.get(type(job.where), ())
    for name in needed:
        if not getattr(job.where, name):
            raise UserError(f"config.where.{name}: expected a value")
    if isinstance(job.where, (TpuVm, Gke)):
        asked = topology(job.where.topology, job.where.slices)
        if isinstance(job.where, TpuVm) and asked.chip.name == "tpu7x":
            raise UserError("config.where.topology: TPU7x is to be had by GKE only; use Gke")
        if not asked.chip.is_tpu:
            raise UserError(f"config.where.topology: expected TPUs, got {job.where.topology!r}")
    _check_joined(job)
    if isinstance(job.where, Local) and job.where.processes < 0:
        raise UserError(f"config.where.processes: expected 0 or more, got {job.where.processes}")
    if isinstance(job.where, Slurm) and job.where.array and job.command[0] != "sweep":
        raise UserError(f"config.where.array: expected 0 with 'jaxlm {job.command[0]}'")
    return job


def _check_joined(job: Job) -> None:
    """Raises UserError for what several processes cannot do as one run."""
    n = processes(job)
    if n > 1 and job.command[0] != "train":
        raise UserError(
            f"config.command: expected 'train' on {n} hosts, which run it together, got"
            f" {job.command[0]!r}; a sweep spreads over a Slurm array or a Ray cluster"
        )
    remote = [word for word in job.command if re.match(r"--workdir=(?!file:)\w+://", word)]
    if n > 1 and remote:
        raise UserError(
            f"config.command: {remote[0]}: {n} hosts need a folder that all of them see; mount the"
            " bucket in config.setup (gcsfuse), or use a network file system"
        )


def words(job: Job) -> tuple[str, ...]:
    """The command that each process runs."""
    together = ("--distributed",) if processes(job) > 1 else ()
    return ("jaxlm", *job.command, *together)


def asked(where: TpuVm | Gke) -> Topology:
    return topology(where.topology, where.slices)


def processes(job: Job) -> int:
    """Processes that one run of the command consists of: one per host of its chips or nodes."""
    if isinstance(job.where, Slurm):
        return 1 if job.where.array else job.where.nodes
    if not isinstance(job.where, (TpuVm, Gke)):
        return 1
    where = asked(job.where)
    return where.chips // hosted(where)


def hosted(where: Topology) -> int:
    """Chips of one host."""
    return min(where.chip.chips_per_host, where.chips // where.slices)
