"""Ray: the command as a job of the cluster."""

from __future__ import annotations

import shlex

from jaxlm.launch.job import Job, Ray
from jaxlm.launch.steps import Do


def start(job: Job, at: Ray) -> list[Do]:
    command = " && ".join([*job.setup, shlex.join(("jaxlm", *job.command))])
    argv = ("submit", f"--submission-id={job.name}", f"--working-dir={at.working_dir}", "--no-wait")
    return [Do((*_job(argv[0], at), *argv[1:], "--", "bash", "-c", command))]


def logs(job: Job, at: Ray) -> list[Do]:
    return [Do((*_job("logs", at), "--follow", job.name))]


def status(job: Job, at: Ray) -> list[Do]:
    return [Do((*_job("status", at), job.name))]


def stop(job: Job, at: Ray) -> list[Do]:
    return [Do((*_job("stop", at), job.name))]


def _job(action: str, at: Ray) -> tuple[str, ...]:
    return ("ray", "job", action, *((f"--address={at.address}",) if at.address else ()))
