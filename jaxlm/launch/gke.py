"""GKE: a JobSet (jobset.sigs.k8s.io), which restarts all pods of all slices together.

A pod that ends with the exit code of a mistake (2) or of a failure that the same command would meet
again (1) ends the JobSet; every other end (a lost node, a signal, a crash) restarts it, and the
command goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from jaxlm.launch.job import Gke, Job, asked, hosted, words
from jaxlm.launch.steps import Do

FINAL = [1, 2]  # exit codes after which the same command would only end so again
_LABEL = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}


def start(job: Job, at: Gke) -> list[Do]:
    return [
        Do(("kubectl", "apply", "-f", "-"), stdin=json.dumps(manifest(job, at), indent=1) + "\n")
    ]


def logs(job: Job, at: Gke) -> list[Do]:
    first = f"jobset.sigs.k8s.io/jobset-name={job.name},batch.kubernetes.io/job-completion-index=0"
    return [Do((*_kubectl(at), "logs", "--follow", "--tail=100", "-l", first))]


def status(job: Job, at: Gke) -> list[Do]:
    return [Do((*_kubectl(at), "get", "jobset", job.name))]


def stop(job: Job, at: Gke) -> list[Do]:
    return [Do((*_kubectl(at), "delete", "jobset", job.name))]


def _kubectl(at: Gke) -> tuple[str, ...]:
    return "kubectl", f"--namespace={at.namespace}"


def manifest(job: Job, at: Gke) -> dict[str, Any]:
    """JobSet v1alpha2, one replicated Job per slice, one pod per host."""
    where = asked(at)
    per_slice = where.chips // where.slices
    per_host = hosted(where)
    hosts = per_slice // per_host
    command = " && ".join([*job.setup, "exec " + shlex.join(words(job))])
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 60,  # SIGTERM saves within 10 s
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": _LABEL[where.chip.name],
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, where.shape)),
        },
        "containers": [
            {
                "name": "jaxlm",
                "image": at.image,
                "command": ["bash", "-c", command],
                "resources": {"limits": {"google.com/tpu": per_host}},
            }
        ],
    }
    if at.service_account:
        pod["serviceAccountName"] = at.service_account
    rule = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "jaxlm", "operator": "In", "values": FINAL},
    }
    slice_job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [rule]},
        "template": {"spec": pod},
    }
    queue = {"labels": {"kueue.x-k8s.io/queue-name": at.queue}} if at.queue else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": at.namespace,
            **queue,
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": at.max_restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": at.slices, "template": {"spec": slice_job}}
            ],
        },
    }
