"""Cloud TPU VMs by gcloud's queued resources."""

from __future__ import annotations

import shlex

from jaxlm.launch.job import Job, TpuVm, asked, words
from jaxlm.launch.steps import Do
from jaxlm.launch.supervisor import SUPERVISED

# cloud.google.com/tpu/docs/runtimes
_RUNTIME = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_TYPE = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}


def start(job: Job, at: TpuVm) -> list[Do]:
    where = asked(at)
    chip, shape = where.chip.name, "x".join(map(str, where.shape))
    nodes = (
        (f"--node-id={job.name}",)
        if at.slices == 1
        else (f"--node-count={at.slices}", f"--node-prefix={job.name}")
    )
    create = Do((
        *_QUEUED, "create", job.name, *nodes, f"--type={_TYPE[chip]}", f"--topology={shape}",
        f"--runtime-version={at.runtime_version or _RUNTIME[chip]}",
        *(("--spot",) if at.spot else ()), *_place(at),
    ))  # fmt: skip
    active = Do(
        (*_QUEUED, "describe", job.name, "--format=value(state.state)", *_place(at)),
        until="ACTIVE",
    )
    steps = [create, active]
    for node in _nodes(job, at):
        if at.upload:
            steps.append(Do((
                *_VM, "scp", "--recurse", at.upload, f"{node}:~/{job.name}", "--worker=all",
                *_place(at),
            )))  # fmt: skip
        if job.setup:
            steps.append(_ssh(node, at, "all", " && ".join(job.setup)))
    argv = words(job)
    if job.command[0] in SUPERVISED:  # no one else starts a process of a TPU VM again
        argv = (argv[0], "supervise", "--", *argv[1:])
    command = shlex.join(argv)
    here = f"cd ~/{job.name} || exit; " if at.upload else ""
    log, pid = f"~/{job.name}.log", f"~/{job.name}.pid"
    background = f"{here}nohup {command} > {log} 2>&1 < /dev/null & echo $! > {pid}"
    return [*steps, *(_ssh(node, at, "all", background) for node in _nodes(job, at))]


def logs(job: Job, at: TpuVm) -> list[Do]:
    return [_ssh(_nodes(job, at)[0], at, "0", f"tail -n 100 -F ~/{job.name}.log")]


def status(job: Job, at: TpuVm) -> list[Do]:
    return [Do((*_QUEUED, "describe", job.name, *_place(at)))]


def stop(job: Job, at: TpuVm) -> list[Do]:
    """SIGTERM first, so that the run saves and leaves; then the machines go."""
    gently = f"kill $(cat ~/{job.name}.pid) && sleep 15 || true"
    ends = [_ssh(node, at, "all", gently) for node in _nodes(job, at)]
    return [*ends, Do((*_QUEUED, "delete", job.name, "--force", "--quiet", *_place(at)))]


_QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
_VM = ("gcloud", "compute", "tpus", "tpu-vm")


def _place(at: TpuVm) -> tuple[str, ...]:
    return f"--project={at.project}", f"--zone={at.zone}"


def _nodes(job: Job, at: TpuVm) -> list[str]:
    return [job.name] if at.slices == 1 else [f"{job.name}-{i}" for i in range(at.slices)]


def _ssh(node: str, at: TpuVm, worker: str, command: str) -> Do:
    return Do((*_VM, "ssh", node, f"--worker={worker}", f"--command={command}", *_place(at)))
