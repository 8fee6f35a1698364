"""Jobs on other machines: what is shown is what is run, and what is run is what is written here."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import launch, main
from jaxlm.launch import gke
from jaxlm.launch.job import Gke, Job, Local, Ray, Slurm, TpuVm, processes, valid
from jaxlm.schema import JaxlmError, UserError

GOLDEN = Path(__file__).parent / "golden" / "launch"
TRAIN = ("train", "--config=experiments/gpt3_175b.py", "--workdir=/mnt/it's here")
SWEEP = ("sweep", "--config=experiments/quickstart.py", "--workdir=/shared/quickstart")
JOBS = {
    "tpu_vm": Job("gpt3", TRAIN, ("pip install 'jaxlm[tpu]'", "df -h"),
                  TpuVm("p", "us-east5-b", "v5p:8x8x16", spot=True, upload=".")),
    "tpu_vm_slices": Job("small", TRAIN, (), TpuVm("p", "us-west4-a", "v5e:16x16", slices=2)),
    "gke": Job("gpt3", TRAIN, ("ulimit -n 65536",),
               Gke("registry/jaxlm:1", "v6e:16x16", 4, service_account="writer", queue="tpus")),
    "gke_one_host": Job("small", TRAIN, (), Gke("registry/jaxlm:1", "v5e:2x2")),
    "ray": Job("quick", (*SWEEP, "--config.engine=ray"), (), Ray("http://head:8265")),
    "slurm": Job("gpt3", TRAIN, ("module load cuda",), Slurm(nodes=4, gpus_per_node=8)),
    "slurm_array": Job("quick", SWEEP, (), Slurm(array=8, partition="cpu", time="2:00:00")),
    "local": Job("quick", SWEEP, ("export A=1",), Local()),
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_commands_are_those_on_file(name):
    actions = ("start",) if name == "local" else ("start", "logs", "status", "stop")
    parts = [f"# {a}\n{launch.shown(launch.commands(valid(JOBS[name]), a))}\n" for a in actions]
    text, path = "\n".join(parts), GOLDEN / f"{name}.sh"
    if os.environ.get("JAXLM_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


FAKE = """#!{python}
import json, os, sys
log = os.environ["FAKE_LOG"]
program = os.path.basename(sys.argv[0])
read = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
with open(log, "a") as f:
    f.write(json.dumps([program, *sys.argv[1:], read]) + "\\n")
if "describe" in sys.argv:
    print("ACTIVE" if sum("describe" in line for line in open(log)) > 2 else "PROVISIONING")
if program == "sbatch":
    print(100 + sum(1 for _ in open(log)))
if "delete" in sys.argv and os.environ.get("FAKE_FAILS"):
    sys.exit(7)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Programs that write down how they were called; what was, so far."""
    for name in ("gcloud", "kubectl", "sbatch", "ray", "squeue", "scancel", "jaxlm", "sleep"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(FAKE.format(python=sys.executable))
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))

    def calls():
        rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        (tmp_path / "log").unlink()
        return [r for r in rows if r[0] != "sleep"]

    return calls


@pytest.mark.parametrize("name", ["tpu_vm", "gke", "slurm_array", "ray"])
def test_what_is_shown_is_what_is_run(name, fakes):
    steps = launch.commands(valid(JOBS[name]), "start")
    launch.run(steps, lambda line: None, poll_s=0.0)
    carried_out = fakes()
    subprocess.run(["bash", "-eu", "-c", launch.shown(steps)], check=True, stdin=subprocess.DEVNULL)
    assert fakes() == carried_out
    if name == "tpu_vm":  # it waited for its machines, and all workers run the command
        assert sum("describe" in row for row in carried_out) == 3
        assert carried_out[-1][4:7] == ["ssh", "gpt3", "--worker=all"]
    if name == "slurm_array":
        assert [row[-2] for row in carried_out[1:]][1] == "--dependency=afterok:102"


def test_a_jobset_restarts_unless_the_command_would_only_fail_again():
    body = gke.manifest(valid(JOBS["gke"]), JOBS["gke"].where)
    [slices] = body["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 4 and job["parallelism"] == job["completions"] == 64  # of 4 chips
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [JaxlmError.exit_code, UserError.exit_code]
    assert body["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_a_local_job_runs_and_a_failing_command_is_told(tmp_path, monkeypatch, capfd, fakes):
    file = tmp_path / "job.py"
    file.write_text(
        "from jaxlm.launch import *\n"
        "def get_job():\n    return Job('here', ('train', '--workdir=a b'), ('echo first',))\n"
    )
    assert main.run(["launch", "start", f"--config={file}"]) == 0
    assert fakes() == [["jaxlm", "train", "--workdir=a b", ""]]
    assert "first" in capfd.readouterr().out
    assert main.run(["launch", "start", f"--config={file}", "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert shown == "set -e\nbash -c 'echo first && exec jaxlm train '\"'\"'--workdir=a b'\"'\"''\n"
    monkeypatch.setenv("FAKE_FAILS", "1")
    with pytest.raises(JaxlmError, match="exit code 7") as e:
        launch.run(launch.commands(JOBS["gke"], "stop"), lambda line: None)
    assert e.value.exit_code == 7


@pytest.mark.parametrize(
    "where, hosts",
    [
        (Gke("i", "v5e:2x2"), 1),
        (TpuVm("p", "z", "v5e:2x2"), 1),
        (TpuVm("p", "z", "v5e:4x4", 2), 8),
        (Gke("i", "v5p:2x2x2"), 2),
        (Slurm(nodes=3), 3),
        (Ray(), 1),
    ],
)
def test_processes_on_several_hosts_are_told_to_find_each_other(where, hosts):
    job = valid(Job("far", TRAIN, (), where))
    assert processes(job) == hosts
    assert ("--distributed" in launch.shown(launch.commands(job, "start"))) == (hosts > 1)


@pytest.mark.parametrize(
    "job, message",
    [
        (Job("Bad", TRAIN), "config.name"),
        (Job("a"), "config.command"),
        (Job("a", TRAIN, (), TpuVm("p")), "config.where.zone"),
        (Job("a", TRAIN, (), TpuVm("p", "z", "v5e:4")), "2 axes"),
        (Job("a", TRAIN, (), TpuVm("p", "z", "tpu7x:4x4x4")), "GKE only"),
        (Job("a", TRAIN, (), Gke("i", "h100:8")), "expected TPUs"),
        (Job("a", TRAIN, (), Slurm(array=2)), "config.where.array"),
        (Job("a", SWEEP, (), Slurm(nodes=2)), "config.command: expected 'train' on 2 hosts"),
        (
            Job("a", ("train", "--workdir=gs://b/a"), (), TpuVm("p", "z", "v5e:4x4")),
            "--workdir=gs://b/a: 4 hosts need a folder that all of them see",
        ),
    ],
)
def test_mistakes_are_one_line(job, message):
    with pytest.raises(UserError, match=message):
        valid(job)


def test_a_missing_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="gcloud: no such program on PATH"):
        launch.run(launch.commands(JOBS["tpu_vm"], "stop"), lambda line: None)
