"""A supervised run whose processes are killed, stopped and hung ends as the undisturbed one."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import Sittings, assert_same, command, free_port, rows, start, words

from jaxlm import launch
from jaxlm.files import append_jsonl, read_jsonl
from jaxlm.launch import supervisor
from jaxlm.launch.job import Job, Local, valid
from jaxlm.schema import JaxlmError, UserError
from jaxlm.train import pulse
from jaxlm.train.checkpoint import read_manifest

STEPS = 120
PROCESSES = 2
EXPERIMENT = """
from jaxlm.config import *

def get_config():
    return Config(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, seq_len=16),
        data=DataConfig(sources=({text!r},), eval_sequences=8, eval_fraction=0.2),
        train=TrainConfig(steps={steps}, global_batch_size=8, steps_per_dispatch=4, log_every=4,
                          checkpoint_every=12),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supervised")
    text = str(words(folder / "text"))
    (folder / "tiny.py").write_text(EXPERIMENT.format(text=text, steps=STEPS))
    return folder


@pytest.fixture(scope="module")
def sittings(place):
    found = Sittings(place / "log")
    yield found
    found.close()


def supervised(place, folder, *flags, experiment="tiny.py"):
    train = "train", f"--config={place / experiment}", f"--workdir={folder}"
    return "supervise", f"--processes={PROCESSES}", *flags, "--", *train


@pytest.fixture(scope="module")
def whole(place, sittings):
    """The run that nothing disturbed."""
    assert sittings.run(*supervised(place, place / "whole")) == 0, sittings.log.read_text()
    return place / "whole"


def log(folder, event=None):
    found = read_jsonl(folder / "supervisor.jsonl")
    return [row for row in found if event in (None, row["event"])]


def wait_for(what, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return found


EVENTS = {  # what is sent to which process, and what the supervisor then says of it
    "kill": (signal.SIGKILL, None, "killed by SIGKILL"),
    "coordinator": (signal.SIGKILL, 0, "killed by SIGKILL"),
    "stop": (signal.SIGSTOP, None, "is silent for"),
    "term": (signal.SIGTERM, None, "stopped by SIGTERM"),
}


def disturb(folder, event, victim, step, delay):
    """Sends a signal to a process, `delay` seconds after a row of `step` (of this sitting, or of a
    later step), and waits until the supervisor has noticed; its word on it."""
    signum, always, said = EVENTS[event]
    faults = len(log(folder, "fault"))
    pids = wait_for(lambda: len(log(folder, "start")) > faults and log(folder, "start"))[-1]["pids"]
    last = lambda: (rows(folder) or [{"step": 0}])[-1]["step"]  # noqa: E731
    starts = lambda: [r for r in read_jsonl(folder / "events.jsonl") if r["event"] != "stop"]  # noqa: E731
    wait_for(lambda: len(starts()) > faults and last() >= step)  # rows of one before say nothing
    time.sleep(delay)
    os.kill(pids[victim if always is None else always], signum)
    return said, wait_for(lambda: log(folder, "fault")[faults:])[0]


def disturb_often(place, sittings, whole, folder, seed, events, heartbeat_s):
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(8, STEPS - 60, 4), len(events)))
    sittings.begin(*supervised(place, folder, f"--heartbeat={heartbeat_s}"))
    for event, step in zip(events, steps, strict=True):
        victim, delay = draw.randrange(PROCESSES), draw.uniform(0, 0.03)
        said, row = disturb(folder, event, victim, step, delay)
        assert said in row["why"], row
    assert sittings.end() == 0, sittings.log.read_text()
    assert_same(folder, whole, STEPS)
    assert len(log(folder, "fault")) == len(events)
    return [row["after_s"] for row in log(folder, "recovered")]


def test_two_faults_leave_the_undisturbed_run(place, sittings, whole, tmp_path):
    events = ["kill", "term"]
    disturb_often(place, sittings, whole, tmp_path / "run", 0, events, 4.0)
    found = supervisor.goodput(log(tmp_path / "run"))
    assert 0 < found.useful_s < found.wall_s and found.starts == 3
    assert sittings.run(*supervised(place, tmp_path / "run", "--status")) == 0
    assert f"finished; goodput {found.share:.1%} (" in sittings.log.read_text()
    assert "started again 2 times" in sittings.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_twenty_random_faults_leave_the_undisturbed_run(place, sittings, whole, tmp_path, part):
    draw = random.Random(f"events {part}")
    events = [draw.choice(list(EVENTS)) for _ in range(5)]
    took = disturb_often(place, sittings, whole, tmp_path / "run", part + 1, events, 10.0)
    print(f"part {part}: {events}, recovered after", *(f"{s:.1f}" for s in took))
    assert took and max(took) < 60  # one row for faults that came before it was got over


@pytest.mark.slow
def test_each_host_may_have_a_supervisor_of_its_own(place, whole, tmp_path):
    run, train = tmp_path / "run", supervised(place, tmp_path / "run")[3:]
    shutil.copytree(whole / "data", run / "data")
    both, at = [], f"127.0.0.1:{free_port()}"
    for i in range(2):
        env = {"JAXLM_COORDINATOR": at, "JAXLM_PROCESSES": "2", "JAXLM_PROCESS": str(i)}
        logged = f"--log={tmp_path / str(i)}/supervisor.jsonl"
        both.append(command("supervise", logged, "--", *train, "--distributed", environment=env))
    victim = random.Random(0).randrange(2)
    wait_for(lambda: (rows(run) or [{"step": 0}])[-1]["step"] >= 40)
    os.kill(log(tmp_path / str(victim), "start")[-1]["pids"][0], signal.SIGKILL)
    said = [parent.communicate(timeout=400) for parent in both]
    assert [parent.returncode for parent in both] == [0, 0], said
    assert_same(run, whole, STEPS)
    for i in range(2):
        print([row["why"] for row in log(tmp_path / str(i), "fault")])
        assert log(tmp_path / str(i), "fault")  # the other one's process could not go on
        assert all(row["after_s"] < 60 for row in log(tmp_path / str(i), "recovered"))


HANGS = """
import time
import jax
from jaxlm.config import *
from jaxlm.train import pulse

pulse.LEAST_S, pulse.TICK_S = 2.0, 0.2  # not a minute, in a test

def hang(done):
    if done > 0.7:
        time.sleep(600)

def schedule(done, hyper):
    jax.debug.callback(hang, done)
    return 1.0 - done

def get_config():
    return Config(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, seq_len=16),
        data=DataConfig(sources=({text!r},), eval_sequences=8, eval_fraction=0.2),
        optimizer=OptimizerConfig(schedule="hangs.py:schedule"),
        train=TrainConfig(steps=40, global_batch_size=8, steps_per_dispatch=4, checkpoint_every=20),
    )
"""


def test_a_run_that_hangs_writes_its_stacks_and_ends(place, sittings, tmp_path):
    (place / "hangs.py").write_text(HANGS.format(text=str(place / "text")))
    run = tmp_path / "run"
    code = sittings.run("train", f"--config={place / 'hangs.py'}", f"--workdir={run}")
    assert code == pulse.HUNG, sittings.log.read_text()
    [stacks] = run.glob("stacks-*.txt")
    assert '/hangs.py", line' in stacks.read_text() and "loop.py" in stacks.read_text()
    last = sittings.log.read_text().splitlines()[-1]
    assert last.startswith("jaxlm: nothing ended in 2 s") and f"its stacks are in {stacks};" in last
    assert read_manifest(run / "checkpoints" / "20")["step"] == 20


def test_only_a_loop_that_may_hang_is_watched_and_only_while_it_runs(tmp_path):
    child = start(
        """
        import sys, time
        from pathlib import Path
        from jaxlm.train import pulse

        pulse.LEAST_S, pulse.TICK_S = 0.5, 0.05
        def hang():
            time.sleep(60)

        with pulse.Pulse(Path(sys.argv[1]), ends_process=False) as never:
            never.ended(4, 4, 0.01)
            time.sleep(1)
        with pulse.Pulse(Path(sys.argv[1]), ends_process=True) as watched:
            watched.begins(0)
            time.sleep(1)  # nothing was timed yet
            watched.ended(4, 4, 0.2)  # the next may take 2 s
            time.sleep(1)
            for step in range(8, 80, 4):
                watched.ended(step, 4, 0.01)
            with watched.unwatched():
                time.sleep(1)
            print("stop me", flush=True)
            time.sleep(0.2)
            watched.ended(84, 4, 0.01)
            print("hangs", flush=True)
            hang()
        """,
        tmp_path,
    )
    assert child.stdout.readline() == "stop me\n"
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(1.0)  # a process that was stopped has not hung
    os.kill(child.pid, signal.SIGCONT)
    assert child.stdout.readline() == "hangs\n"
    said = child.communicate(timeout=30)[1]
    assert child.returncode == pulse.HUNG, said
    [stacks] = tmp_path.glob("stacks-*.txt")
    assert "in hang" in stacks.read_text() and str(stacks) in said


# ---------------------------------------------------------------- the supervisor's own decisions


class Child(subprocess.Popen):
    """What stands in for `jaxlm train`: `code` with a heartbeat and a folder."""

    def __init__(self, code, environment):
        whole = "import os, signal, sys, time\nfrom jaxlm.train import pulse\n"
        whole += "pulse.start_heartbeat()\nwatch = pulse.Pulse(None, False)\n" + code
        super().__init__(
            [sys.executable, "-c", whole], env=environment, start_new_session=True,
            cwd=Path(__file__).parent, stderr=subprocess.PIPE,
        )  # fmt: skip


@pytest.fixture
def supervise(tmp_path, monkeypatch):
    """The exit code and the lines of a supervisor whose processes run `code`."""
    monkeypatch.setattr(supervisor, "LONGEST_WAIT_S", 0.0)

    def run(code, processes=1, **limits):
        monkeypatch.setattr(supervisor, "_start", lambda command, env: Child(code, env))
        lines = []
        path = tmp_path / "supervisor.jsonl"
        found = supervisor.supervise(("train",), path, processes, say=lines.append, **limits)
        return found, lines, log(tmp_path)

    return run


def test_a_run_that_comes_no_further_is_given_up(supervise):
    code, lines, found = supervise("watch.begins(20)\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert code == 128 + signal.SIGSEGV and lines[-1].startswith(
        "process 0: killed by SIGSEGV; 5 starts brought no newer checkpoint; goodput 0.0%"
    )
    assert [row["event"] for row in found] == ["begin", *["start", "fault", "end"] * 5, "leave"]
    assert found[0]["format"] == "jaxlm.supervisor/1"
    assert {row["first"] for row in found if row["event"] == "end"} == {20}


@pytest.mark.slow
def test_one_that_comes_further_at_each_start_is_not(supervise, tmp_path):
    body = f"""
starts = open({str(tmp_path / "starts")!r}, "a+")
starts.write("x"); starts.flush(); starts.seek(0); n = len(starts.read())
watch.begins(10 * n)
watch.ended(10 * n + 8, 8, 0.8)
watch.__exit__()
sys.exit(0 if n == 9 else 1)
"""
    code, _, found = supervise(body)
    assert code == 0 and sum(row["event"] == "start" for row in found) == 9
    kept = supervisor.goodput(found)  # of 9 sittings of 8 steps, each kept whole
    assert kept.useful_s == pytest.approx(9 * 0.8) and kept.starts == 9


def test_a_mistake_is_final_and_ends_all_processes(supervise, tmp_path):
    body = "sys.exit(2) if os.environ['JAXLM_PROCESS'] == '1' else time.sleep(60)"
    began = time.monotonic()
    code, lines, found = supervise(body, processes=3)
    assert code == 2 and "process 1: a mistake in the command" in lines[-1]
    assert found[-2]["codes"] == [-signal.SIGKILL, 2, -signal.SIGKILL]
    assert time.monotonic() - began < 30


def test_processes_are_told_who_they_are_and_a_port_of_their_own_at_each_start(supervise, tmp_path):
    body = f"""
names = ("COORDINATOR", "PROCESSES", "PROCESS")
row = " ".join(os.environ["JAXLM_" + name] for name in names)
print(row, file=open(f"{tmp_path}/" + row.replace(" ", "-"), "w"))
os.kill(os.getpid(), signal.SIGTERM)
"""
    supervise(body, processes=2)
    told = [p.read_text().split() for p in tmp_path.glob("127*")]
    assert {(n, i) for _, n, i in told} == {("2", "0"), ("2", "1")}
    assert len({where for where, _, _ in told}) == 5


def test_a_silent_process_is_killed(supervise):
    body = "watch.begins(0)\nos.kill(os.getpid(), signal.SIGSTOP)"
    code, lines, found = supervise(body, heartbeat_s=0.5)
    assert code == pulse.HUNG and "process 0 is silent for" in lines[0]
    assert {tuple(row["codes"]) for row in found if row["event"] == "end"} == {(-signal.SIGKILL,)}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_to_all_and_their_code_handed_back(tmp_path, signum):
    code = f"""
        import sys
        from pathlib import Path
        from jaxlm.launch import supervisor
        from test_supervisor import Child

        body = "signal.signal({int(signum)}, lambda *a: sys.exit(128 + a[0]))\\nwatch.begins(4)\\n"
        body += "print('here', flush=True)\\ntime.sleep(60)"
        supervisor._start = lambda command, env: Child(body, env)
        sys.exit(supervisor.supervise(("train",), Path(sys.argv[1]) / "supervisor.jsonl", 2))
        """
    parent = start(code, tmp_path)
    # Both write to one pipe, and may do so between a word and the end of its line.
    assert sorted(parent.stdout.read(10)) == sorted("here\n" * 2)
    parent.send_signal(signum)
    said = parent.communicate(timeout=30)
    assert parent.returncode == 128 + signum, said
    assert log(tmp_path, "end")[0]["codes"] == [128 + signum] * 2
    why = log(tmp_path)[-1]["why"]  # of the one that was seen to end first
    assert re.fullmatch(r"told to stop: process [01]: stopped by SIG(TERM|INT)", why)


def test_a_process_whose_supervisor_is_gone_leaves(tmp_path):
    body = "print(os.getpid(), flush=True)\ntime.sleep(60)"
    code = f"""
        import os, sys
        from test_supervisor import Child

        child = Child({body!r}, {{**os.environ, "JAXLM_HEARTBEAT": sys.argv[1] + "/beat"}})
        child.wait()
        """
    parent = start(code, tmp_path)
    pid = int(parent.stdout.readline())
    wait_for(lambda: (tmp_path / "beat").exists())
    parent.kill()
    parent.communicate()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 30)


# ------------------------------------------------------------------------------- log and command


def test_goodput_counts_steps_that_were_kept_over_the_time_of_supervision(tmp_path):
    path = tmp_path / "supervisor.jsonl"

    def row(time, event, **values):
        append_jsonl(path, {"time": time, "event": event, **values})

    def end(time, sitting, first, step, step_time_s):
        row(time, "end", sitting=sitting, first=first, step=step, step_time_s=step_time_s, why="")

    row(100.0, "begin", format=supervisor.FORMAT)
    row(100.0, "start", sitting=0)
    row(140.0, "well", sitting=0, first=0, step=20, step_time_s=1.0)
    end(160.0, 0, 0, 50, 1.0)  # 30 of its 50 steps are kept
    row(161.0, "start", sitting=1)
    end(165.0, 1, None, None, None)  # died before it trained
    row(167.0, "start", sitting=2)
    end(170.0, 2, 30, 34, None)  # too short for a step to be timed: as the others, 1.5 s
    row(170.0, "leave", code=143, why="")
    row(1000.0, "begin", format=supervisor.FORMAT)  # nobody was at work in between
    row(1000.0, "start", sitting=0)
    row(1030.0, "well", sitting=0, first=34, step=44, step_time_s=2.0)
    found = supervisor.goodput(read_jsonl(path))
    assert (found.useful_s, found.wall_s, found.starts) == (30 * 1.0 + 4 * 1.5 + 10 * 2.0, 100.0, 4)
    assert supervisor.status(("train",), path).endswith(
        "goodput 56.0% (56.0 s of 100.0 s in useful steps), started again 2 times"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "got nothing"),
        (("--", "sweep", "--config=a"), "expected -- train … or -- finetune …, got 'sweep'"),
        (("--processes=0", "--", "train"), "processes"),
        (("--status", "--", "train", "--workdir=nowhere"), "nowhere/supervisor.jsonl: no such log"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    from jaxlm import main

    with pytest.raises(UserError, match=message):
        main.run(["supervise", *arguments])


def test_a_local_job_of_processes_is_supervised():
    job = Job("here", ("train", "--workdir=a b"), (), Local(2))
    [start], [status] = (launch.commands(valid(job), a) for a in ("start", "status"))
    words = "exec jaxlm supervise --processes=2 -- train '--workdir=a b'"
    assert start.argv == ("bash", "-c", words)
    assert status.argv == ("jaxlm", "supervise", "--status", "--", "train", "--workdir=a b")
    with pytest.raises(UserError, match=r"config\.where\.processes"):
        valid(Job("here", ("train",), (), Local(-1)))
    assert supervisor.log_of(("train", "--workdir", "a/b")) == Path("a/b/supervisor.jsonl")
    assert supervisor.log_of(("train", "--workdir=gs://a/b")) == Path("supervisor.jsonl")
    shared = supervisor.log_of(("train", "--workdir=a", "--distributed"))
    assert shared == Path(f"a/supervisor-{socket.gethostname()}.jsonl")


def test_another_log_is_told(tmp_path):
    (tmp_path / "supervisor.jsonl").write_text(json.dumps({"format": "jaxlm.other/1"}) + "\n")
    with pytest.raises(JaxlmError, match="supervisor/1"):
        supervisor.status(("train",), tmp_path / "supervisor.jsonl")
