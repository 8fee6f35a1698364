"""This machine: the command in the foreground, or processes that a supervisor looks after."""

from __future__ import annotations

import shlex

from jaxlm.launch.job import Job, Local
from jaxlm.launch.steps import Do
from jaxlm.schema import UserError


def start(job: Job, at: Local) -> list[Do]:
    words = ("jaxlm", *job.command)
    if at.processes:
        words = ("jaxlm", "supervise", f"--processes={at.processes}", "--", *job.command)
    command = " && ".join([*job.setup, "exec " + shlex.join(words)])
    return [Do(("bash", "-c", command))]


def status(job: Job, at: Local) -> list[Do]:
    if not at.processes:
        return logs(job, at)
    return [Do(("jaxlm", "supervise", "--status", "--", *job.command))]


def logs(job: Job, at: Local) -> list[Do]:
    raise UserError("jaxlm launch: a local job runs in the foreground; 'start' is all there is")


stop = logs
