"""Several processes on loopback are one run: what it logs, samples and saves is one process's."""

import os
import signal
import subprocess
import sys
import time

import jax
import pytest
import small
from conftest import FAST_COMPILES
from faults import command, free_port, rows, start, words

from jaxlm import api, hosts
from jaxlm.experiment import load
from jaxlm.files import read_jsonl
from jaxlm.schema import JaxlmError, UserError
from jaxlm.train.checkpoint import Checkpoints

EXPERIMENT = """
from jaxlm.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig


def get_config():
    return Config(
        data=DataConfig(sources=({words!r},), eval_sequences=16, max_epochs=1e6),
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, seq_len=16),
        train=TrainConfig(steps={steps}, global_batch_size={rows}, log_every=1, eval_every=8,
                          checkpoint_every=8, keep_checkpoints=99, steps_per_dispatch=2,
                          sample_prompts={prompts}, sample_tokens=4,
                          deterministic_reduce={shards}),
        mesh=MeshConfig({mesh}),
    )
"""
FSDP_TENSOR, CONTEXT = "1, fsdp=2, tensor=2", "1, fsdp=2, context=2"


def experiment(folder, mesh=FSDP_TENSOR, steps=16, prompts=("the ",), shards=0):
    text = folder / "text"
    path = folder / f"{abs(hash(mesh))}.py"
    asked = {"words": str(text), "mesh": mesh, "steps": steps, "prompts": prompts}
    path.write_text(EXPERIMENT.format(**asked, shards=shards, rows=shards or 8))
    if not text.exists():
        words(text, 12)
    return path


def processes(n, path, workdir, devices=4, more=(), **env):
    """`jaxlm train` as n processes that hold the devices together."""
    port = free_port()
    compiles = os.environ.get("JAXLM_TESTS_XLA", FAST_COMPILES)
    flags = f"--xla_force_host_platform_device_count={devices // n} {compiles}"
    command = [sys.executable, "-m", "jaxlm", "train", f"--config={path}", f"--workdir={workdir}"]
    command += more
    found = []
    for i in range(n):
        joined = {hosts.COORDINATOR: f"localhost:{port}", hosts.PROCESSES: n, hosts.PROCESS: i}
        own = {**os.environ, "XLA_FLAGS": flags, **{k: str(v) for k, v in joined.items()}, **env}
        pipe = subprocess.PIPE
        found.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=own))
    return found


def ended(children, code=0):
    """Their outputs, all having left with `code`."""
    outputs = [child.communicate(timeout=500) for child in children]
    assert [child.returncode for child in children] == [code] * len(children), outputs
    return outputs


def same(a, b, exactly):
    """Bitwise, or losses to 1e-6 and what follows from them (perplexity, norms) to 1e-5."""
    assert len(a) == len(b) > 16
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            if exactly or isinstance(x[name], str):
                assert x[name] == y[name]
            else:
                rel = 1e-6 if "loss" in name else 1e-5
                assert x[name] == pytest.approx(y[name], rel=rel), name


def test_two_processes_stopped_by_one_signal_are_gone_on_with_by_one(tmp_path):
    path = experiment(tmp_path, "4, tensor=2", 60, ())
    folder = tmp_path / "run"
    both = processes(2, path, folder, 8, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    both[1].send_signal(signal.SIGTERM)  # the one that writes nothing
    with small.compiled_quickly():
        api.train(load(path), tmp_path / "whole")
    outputs = ended(both, 143)
    assert all("saved; the same command goes on" in err for _, err in outputs), outputs
    [step] = [row["step"] for row in read_jsonl(folder / "events.jsonl") if row["event"] == "stop"]
    assert 0 < step < 60 and Checkpoints(folder / "checkpoints").steps()[-1] == step
    assert outputs[1][0].splitlines() == [] or "Gloo" in outputs[1][0]
    with small.compiled_quickly():
        api.train(load(path), folder)
    same(rows(folder), rows(tmp_path / "whole"), exactly=False)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [FSDP_TENSOR, CONTEXT])
def test_one_two_and_four_processes_are_one_run(tmp_path, mesh):
    path = experiment(tmp_path, mesh)
    for n in (1, 2, 4):
        ended(processes(n, path, tmp_path / str(n)))
    same(rows(tmp_path / "2"), rows(tmp_path / "1"), exactly=True)
    same(rows(tmp_path / "4"), rows(tmp_path / "1"), exactly=False)


@pytest.mark.slow
def test_ordered_sums_have_the_same_bits_over_any_number_of_processes_and_devices(tmp_path):
    path = experiment(tmp_path, "-1", prompts=(), shards=16)
    for n, devices in ((1, 1), (2, 2), (4, 4), (2, 4), (2, 8)):
        ended(processes(n, path, tmp_path / f"{n}-{devices}", devices))
        same(rows(tmp_path / f"{n}-{devices}"), rows(tmp_path / "1-1"), exactly=True)


OFFLOADED = ("--config.optimizer.offload=True",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, shards, stages",  # processes, devices, flags
    [
        (FSDP_TENSOR, 0, [(4, 4, ()), (1, 4, ()), (2, 4, ())]),
        (FSDP_TENSOR, 0, [(2, 4, OFFLOADED), (1, 4, OFFLOADED), (4, 4, ())]),
        ("-1", 16, [(1, 1, ()), (4, 4, ()), (2, 2, OFFLOADED), (2, 8, ())]),
    ],
    ids=["processes", "offloaded", "devices"],
)
def test_a_checkpoint_moves_over_processes_and_devices(tmp_path, mesh, shards, stages):
    """Ordered sums: to the bit, whatever it moved over."""
    steps = 80 * len(stages)
    path = experiment(tmp_path, mesh, steps, ("the ",) if not shards else (), shards)
    ended(processes(1, path, tmp_path / "whole", 1 if shards else 4))
    folder = tmp_path / "moved"
    for i, (n, devices, more) in enumerate(stages, 1):
        children, last = processes(n, path, folder, devices, more), i == len(stages)
        # Until it has evaluated: a signal amid compiling would not wait for that.
        while not last and (not rows(folder) or rows(folder)[-1]["step"] <= 60 * i):
            assert children[-1].poll() is None, children[-1].communicate()
            time.sleep(0.02)
        if not last:
            children[-1].send_signal(signal.SIGTERM)
        ended(children, 0 if last else 143)
    same(rows(folder), rows(tmp_path / "whole"), exactly=bool(shards))
    told = [row["step"] for row in read_jsonl(folder / "events.jsonl") if row["event"] == "stop"]
    assert len(told) == len(stages) - 1 and told == sorted(set(told))
    assert set(told) <= set(Checkpoints(folder / "checkpoints").steps())


AGREE = """
    import sys, time
    import jax, numpy as np
    from jaxlm import hosts, mesh
    from jaxlm.schema import JaxlmError, UserError

    def fails():
        raise UserError("--workdir: in use " + "é" * 3000)

    def told(context, do=lambda: None):
        try:
            with context:
                do()
        except Exception as e:
            print(type(e).__name__, str(e)[-40:])

    def fails_on_one():
        if not hosts.is_lead():
            raise OSError(28, "No space left")

    with hosts.joined():
        print(hosts.by_lead(lambda: [jax.process_index(), "of", jax.process_count()]))
        told(hosts.together(), lambda: hosts.by_lead(fails))
        told(hosts.together(), fails_on_one)
        print(hosts.anyone(not hosts.is_lead()), hosts.anyone(False))
        told(hosts.together(), lambda: hosts.same("--config", str(hosts.is_lead())))
        # Each holds two squares of a torus, as it were: every second device.
        devices = np.array(jax.devices()).reshape(2, 2).T.reshape(1, 1, 1, 4, 1, 1)
        on = jax.sharding.Mesh(devices, mesh.AXES, axis_types=mesh._EXPLICIT)
        with jax.set_mesh(on):
            rows, whole = mesh.own_rows(on, 8), np.arange(24).reshape(1, 8, 3)
            placed = mesh.put_batch(whole[:, rows], on, 1, 8)
            print(rows.tolist(), np.array_equal(jax.jit(mesh.whole)(placed), whole), flush=True)
        time.sleep(float(sys.argv[1]) if hosts.is_lead() else 0)
        if sys.argv[1] != "0" and not hosts.is_lead():
            raise JaxlmError("alone")
"""


def agreeing(lead_s):
    """Exit codes, outputs and errors of two processes, of which the lead goes on for so long."""
    at = f"localhost:{free_port()}"
    env = {hosts.COORDINATOR: at, hosts.PROCESSES: "2"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    both = [start(AGREE, lead_s, env={**env, hosts.PROCESS: str(i)}) for i in range(2)]
    outputs = [child.communicate(timeout=300) for child in both]
    said = [[line for line in out.splitlines() if "Gloo" not in line] for out, _ in outputs]
    return [child.returncode for child in both], said, [err for _, err in outputs]


def test_what_fails_in_one_process_fails_in_all(tmp_path):
    codes, said, errors = agreeing(0)
    assert codes == [0, 0], errors
    differ = "--config: process 1 has False, process 0 has True"[-40:]
    for i, lines in enumerate(said):
        assert lines == [
            "[0, 'of', 2]",
            "UserError " + "é" * 40,
            ["JaxlmError OSError: [Errno 28] No space left", "OSError [Errno 28] No space left"][i],
            "True False",
            f"UserError {differ}",
            f"{[[0, 1, 4, 5], [2, 3, 6, 7]][i]} True",
        ]


@pytest.mark.slow
def test_a_process_that_fails_alone_leaves_with_its_own_words(tmp_path, monkeypatch):
    codes, _, errors = agreeing(25)
    assert codes[1] == 1 and errors[1].splitlines()[-1] == "jaxlm: alone", errors[1]
    assert codes[0] != 0  # it was ended, or came to an end without the other


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_who_loses_another_says_that_the_same_command_may_be_started_again(tmp_path, killed):
    folder = tmp_path / "run"
    both = processes(2, experiment(tmp_path, steps=100_000, prompts=()), folder)
    while not rows(folder) or rows(folder)[-1]["step"] <= 8:
        time.sleep(0.02)
    both[killed].kill()
    _, err = both[1 - killed].communicate(timeout=120)
    # jax aborts it, or it fails in a collective before.
    assert both[1 - killed].returncode in (-signal.SIGABRT, hosts.Lost.exit_code), err
    both[killed].communicate()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"JAXLM_PROCESSES": "2"}, "JAXLM_COORDINATOR: expected a value"),
        ({"JAXLM_PROCESS": "2"}, "JAXLM_PROCESS: expected 0 … 1 (JAXLM_PROCESSES=2), got 2"),
        ({"JAXLM_PROCESSES": "two"}, "JAXLM_PROCESSES: expected a number, got 'two'"),
        ({"JAXLM_COORDINATOR": "here"}, "JAXLM_COORDINATOR: expected host:port, got 'here'"),
    ],
)
def test_numbers_that_do_not_fit_are_told(environ, expected):
    whole = {"JAXLM_COORDINATOR": "here:1", "JAXLM_PROCESSES": "2", "JAXLM_PROCESS": "1"}
    given = environ if len(environ) == 1 and "expected a value" in expected else whole | environ
    with pytest.raises(UserError, match="^" + expected.replace("(", r"\(").replace(")", r"\)")):
        hosts.join(environ=given)
    hosts.join(environ={})  # alone
    assert jax.process_count() == 1 and not hosts.several()


def test_a_lead_that_cannot_be_reached_is_told(monkeypatch):
    monkeypatch.setattr(hosts, "JOIN_S", 1)
    at = f"localhost:{free_port()}"
    given = {"JAXLM_COORDINATOR": at, "JAXLM_PROCESSES": "2", "JAXLM_PROCESS": "1"}
    with pytest.raises(JaxlmError, match=f"^JAXLM_COORDINATOR: {at} could not be reached in 1 s"):
        hosts.join(environ=given)


def test_a_lead_that_waits_in_vain_says_so():
    code = "    from jaxlm import hosts; hosts.JOIN_S = 1; hosts.join()"
    at = f"localhost:{free_port()}"
    child = start(code, env={hosts.COORDINATOR: at, hosts.PROCESSES: "2", hosts.PROCESS: "0"})
    _, err = child.communicate(timeout=200)
    assert child.returncode == 1, err
    assert err == "jaxlm: not all processes of the run came within 1 s\n"


def test_processes_that_cannot_be_found_are_told(tmp_path):
    path = experiment(tmp_path)
    child = command("train", f"--config={path}", f"--workdir={tmp_path / 'run'}", "--distributed")
    _, err = child.communicate(timeout=200)
    assert child.returncode == 2 and err.count("\n") == 1, err
    assert "--distributed" in err and "JAXLM_COORDINATOR" in err
