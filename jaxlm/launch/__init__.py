"""Jobs on machines that are not here: from one small file to the commands that run it."""

from __future__ import annotations

from jaxlm.launch import gke, local, ray, slurm, tpu_vm
from jaxlm.launch.job import Gke, Job, Local, Ray, Slurm, TpuVm, load
from jaxlm.launch.steps import Do, run, shown

__all__ = [
    "Do",
    "Gke",
    "Job",
    "Local",
    "Ray",
    "Slurm",
    "TpuVm",
    "commands",
    "load",
    "run",
    "shown",
]

_BY = {Local: local, TpuVm: tpu_vm, Gke: gke, Ray: ray, Slurm: slurm}


def commands(job: Job, action: str) -> list[Do]:
    """What 'start', 'logs', 'status' or 'stop' of a job runs."""
    return getattr(_BY[type(job.where)], action)(job, job.where)
