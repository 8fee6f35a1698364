"""A sweep on a Ray cluster of two nodes: the rows of a local one, also when a node is lost."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import QUICK

from jaxlm import launch
from jaxlm.files import read_jsonl
from jaxlm.scaling.workers import cores
from jaxlm.train import record

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'jaxlm[ray]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SHARE = 0.02  # of the quickstart's budgets

EXPERIMENT = f"""
import dataclasses
from jaxlm.experiment import load

def get_sweep():
    sweep = load({str(ROOT / "experiments" / "quickstart.py")!r})
    train = dataclasses.replace(sweep.base.train, steps_per_dispatch=10, log_every=10,
                                checkpoint_every=20)
    data = dataclasses.replace(sweep.base.data, eval_sequences=64)
    base = dataclasses.replace(sweep.base, train=train, data=data)
    rungs = tuple(dataclasses.replace(r, flops=r.flops * {SHARE}) for r in sweep.rungs)
    return dataclasses.replace(sweep, base=base, rungs=rungs, bootstrap=20,
                               holdout_flops=sweep.holdout_flops * {SHARE})
"""


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with as many processors as this machine has each; always stopped."""
    from ray.cluster_utils import Cluster

    here = Path(sys.executable).parent  # where `jaxlm` and `ray` are
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
    head = {"num_cpus": cores(), "include_dashboard": True}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.second = made.add_node(num_cpus=cores())
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


def sweep(tmp_path, folder, *more, address=""):
    path = tmp_path / "shrunk.py"
    path.write_text(EXPERIMENT)
    env = {**os.environ, **QUICK, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    argv = [sys.executable, "-m", "jaxlm", "sweep", f"--config={path}", f"--workdir={folder}"]
    return subprocess.Popen([*argv, *more], env=env, cwd=tmp_path, stderr=subprocess.PIPE,
                            text=True)  # fmt: skip


def rows(folder):
    """Records and losses of all runs, without what takes time."""
    found = {}
    for run in sorted(folder.glob("runs/*")):
        losses = [(r["step"], r["train/loss"]) for r in read_jsonl(run / "metrics.jsonl")
                  if "train/loss" in r]  # fmt: skip
        row = record.read(run)
        assert row is not None, f"{run.name} has no record"
        found[run.name] = dataclasses.replace(row, wall_time_s=0.0), losses
    return found


def test_a_cluster_gives_the_rows_of_a_local_sweep_also_when_a_node_is_lost(tmp_path, cluster):
    local = sweep(tmp_path, tmp_path / "local")
    assert local.wait() == 0, local.stderr.read()
    expected = rows(tmp_path / "local")
    assert len(expected) == 18

    whole = sweep(tmp_path, tmp_path / "whole", "--config.engine=ray", address=cluster.address)
    assert whole.wait() == 0, whole.stderr.read()
    assert rows(tmp_path / "whole") == expected

    lossy = tmp_path / "lossy"
    process = sweep(tmp_path, lossy, "--config.engine=ray", address=cluster.address)
    deadline = time.monotonic() + 300
    while len(list(lossy.glob("runs/*/record.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    before = len(list(lossy.glob("runs/*/record.json")))
    cluster.remove_node(cluster.second, allow_graceful=False)  # kill -9
    assert before < 17
    assert process.wait() == 0, process.stderr.read()
    assert rows(lossy) == expected


def test_a_told_stop_saves_and_the_same_command_goes_on_elsewhere(tmp_path, cluster):
    folder = tmp_path / "sweep"
    first = sweep(tmp_path, folder, "--config.engine=ray", address=cluster.address)
    while not list(folder.glob("runs/*/metrics.jsonl")):
        assert first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 143, first.stderr.read()
    second = sweep(tmp_path, folder)  # on this machine alone
    assert second.wait() == 0, second.stderr.read()
    assert all(row.status == "finished" for row, _ in rows(folder).values())


def test_a_launched_job_runs_on_the_cluster(tmp_path, cluster, capfd):
    (tmp_path / "sent").mkdir()
    where = launch.Ray(f"http://{cluster.head_node.webui_url}", str(tmp_path / "sent"))
    job = launch.Job("tell", ("doctor", "--json"), ("echo set up",), where)
    launch.run(launch.commands(job, "start"), lambda line: None)
    deadline = time.monotonic() + 120
    while "succeeded" not in (told := status(job, capfd)):
        assert "failed" not in told and time.monotonic() < deadline, told
        time.sleep(1)
    launch.run(launch.commands(job, "logs"), lambda line: None)
    said = capfd.readouterr().out
    assert "set up" in said and '"format": "jaxlm.doctor/1"' in said
    launch.run(launch.commands(job, "stop"), lambda line: None)


def status(job, capfd):
    capfd.readouterr()
    launch.run(launch.commands(job, "status"), lambda line: None)
    return "".join(capfd.readouterr())
