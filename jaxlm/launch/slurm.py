"""Slurm: a run over nodes, or a sweep as three jobs: data, an array of members, the rest."""

from __future__ import annotations

import shlex

from jaxlm.launch.job import Job, Slurm, processes, words
from jaxlm.launch.steps import Do


def start(job: Job, at: Slurm) -> list[Do]:
    command = shlex.join(words(job))
    if not at.array:
        run = f"srun --kill-on-bad-exit=1 {command}"
        if processes(job) > 1 and at.gpus_per_node:  # jax would take one for each process
            run = f"export JAX_LOCAL_DEVICE_IDS={_numbers(at.gpus_per_node)}\n{run}"
        return [_sbatch(job, at, run, f"--nodes={at.nodes}", "--ntasks-per-node=1", "--requeue")]
    share = f"{command} --index=$SLURM_ARRAY_TASK_ID/{at.array}"
    after = "--dependency=afterok:{%s}"
    return [
        _sbatch(job, at, f"{command} --dry-run", keep="data"),
        _sbatch(job, at, share, f"--array=0-{at.array - 1}", after % "data", "--requeue",
                keep="members"),
        _sbatch(job, at, command, after % "members"),
    ]  # fmt: skip


def logs(job: Job, at: Slurm) -> list[Do]:
    return [Do(("sh", "-c", f"tail -n 100 -F {job.name}-*.log"))]


def status(job: Job, at: Slurm) -> list[Do]:
    return [Do(("squeue", f"--name={job.name}"))]


def stop(job: Job, at: Slurm) -> list[Do]:
    """Slurm sends SIGTERM, and SIGKILL half a minute later."""
    return [Do(("scancel", f"--name={job.name}"))]


def _numbers(n: int) -> str:
    return ",".join(map(str, range(n)))


def _sbatch(job: Job, at: Slurm, command: str, *more: str, keep: str = "") -> Do:
    options = [f"--job-name={job.name}", f"--time={at.time}", f"--cpus-per-task={at.cpus_per_task}",
               f"--output={job.name}-%j.log"]  # fmt: skip
    options += [f"--partition={at.partition}"] if at.partition else []
    options += [f"--gpus-per-node={at.gpus_per_node}"] if at.gpus_per_node else []
    script = "\n".join(["#!/bin/bash -e", *job.setup, command])
    return Do(("sbatch", "--parsable", *options, *more), stdin=script + "\n", keep=keep)
