"""This machine: the command in the foreground."""

from __future__ import annotations

import shlex

from jaxlm.launch.job import Job, Local
from jaxlm.launch.steps import Do
from jaxlm.schema import UserError


def start(job: Job, at: Local) -> list[Do]:
    command = " && ".join([*job.setup, "exec " + shlex.join(("jaxlm", *job.command))])
    return [Do(("bash", "-c", command))]


def logs(job: Job, at: Local) -> list[Do]:
    raise UserError("jaxlm launch: a local job runs in the foreground; 'start' is all there is")


status = stop = logs
