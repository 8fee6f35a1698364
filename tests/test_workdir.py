"""One process per folder; a process that is told to leave does so, whatever it is doing."""

import os
import signal
import threading
import time

import pytest
from faults import start

from jaxlm.schema import JaxlmError, UserError
from jaxlm.train.workdir import StopFlag, lock

# ------------------------------------------------------------------------------------------- lock

HOLD = """
    import sys, time
    from jaxlm.train.workdir import lock
    with lock(sys.argv[1]):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
"""


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    folder = tmp_path / "run"
    with start(HOLD, folder, 60) as child:
        assert child.stdout.readline() == "held\n"
        began = time.monotonic()
        with pytest.raises(UserError) as error, lock(folder):
            pass
        assert time.monotonic() - began < 2
        text = str(error.value)
        assert f"process {child.pid} on {os.uname().nodename}" in text
        assert str(folder) in text and "\n" not in text
        child.kill()
    with lock(folder):  # the holder died without a word
        pass


def test_one_of_two_writers_wins(tmp_path):
    for _ in range(3):
        children = [start(HOLD, tmp_path, 600) for _ in range(2)]
        while all(child.poll() is None for child in children):
            time.sleep(0.01)
        loser, winner = sorted(children, key=lambda child: child.poll() is None)
        _, told = loser.communicate()
        assert loser.returncode == 1 and winner.poll() is None, told
        assert f"in use by process {winner.pid} " in told
        winner.kill()
        assert winner.communicate()[0] == "held\n"


def test_only_the_thread_that_holds_a_folder_may_take_it_again(tmp_path):
    refused = []

    def other():
        try:
            with lock(tmp_path):
                pass
        except JaxlmError as e:
            refused.append(str(e))

    def ask():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return len(refused)

    with lock(tmp_path):
        with lock(tmp_path / "." / "x" / ".."):
            assert ask() == 1
        assert ask() == 2 and f"process {os.getpid()} " in refused[1]
    assert ask() == 2
    with pytest.raises(ZeroDivisionError), lock(tmp_path):
        raise ZeroDivisionError
    assert ask() == 2


def test_a_forked_child_that_outlives_a_killed_holder_does_not_hold_on(tmp_path):
    code = """
        import os, sys, time
        from jaxlm.train.workdir import lock
        with lock(sys.argv[1]):
            child = os.fork()
            if child == 0:
                os.write(1, b"free\\n")  # the child runs: what it does on being forked is done
                time.sleep(60)
            os.write(1, b"%d\\n" % child)
            time.sleep(60)
    """
    holder = start(code, tmp_path)
    lines = {holder.stdout.readline().strip() for _ in range(2)}  # in either order
    orphan = int((lines - {"free"}).pop())
    try:
        holder.kill()
        holder.wait()
        with lock(tmp_path):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)
        holder.communicate()


# ---------------------------------------------------------------------------------------- signals

LOOP = """
    import os, sys, time
    from jaxlm.train.workdir import StopFlag
    with StopFlag(grace_s=float(sys.argv[1])) as stop:
        print("ready", flush=True)
        while not stop:
            time.sleep(0.01)
        time.sleep(float(sys.argv[2]))  # saving
        print("saved", flush=True)
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_loop_sees_the_signal_and_leaves_by_itself(signum):
    with start(LOOP, 8, 0.1) as child:
        child.stdout.readline()
        child.send_signal(signum)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (128 + signum, "saved\n", "")


def test_after_the_grace_the_process_is_ended():
    with start(LOOP, 0.3, 60) as child:
        child.stdout.readline()
        began = time.monotonic()
        child.terminate()
        out, err = child.communicate(timeout=30)
    assert 0.25 < time.monotonic() - began < 10
    assert (child.returncode, out) == (143, "") and err.count("\n") == 1 and "SIGTERM" in err


def test_a_second_signal_ends_the_process_at_once():
    with start(LOOP, 60, 60) as child:
        child.stdout.readline()
        child.send_signal(signal.SIGINT)
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (130, "") and "SIGINT" in err


def test_a_long_call_into_xla_does_not_keep_the_process():
    """The main thread is inside one C++ call, where no Python handler can run."""
    code = """
        import sys, jax, jax.numpy as jnp
        from jaxlm.train.workdir import StopFlag
        turn = lambda i, x: jnp.sin(x @ x)
        run = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, turn, x))
        x = jnp.ones((64, 64))
        run(x, 1).block_until_ready()
        with StopFlag(grace_s=0.5) as stop:
            print("busy", flush=True)
            run(x, 2_000_000_000).block_until_ready()
    """
    with start(code) as child:
        assert child.stdout.readline() == "busy\n", child.communicate()
        time.sleep(0.2)
        began = time.monotonic()
        child.terminate()
        _, err = child.communicate(timeout=30)
    assert 0.4 < time.monotonic() - began < 10
    assert child.returncode == 143 and "still busy" in err


def test_a_signal_to_a_forked_child_is_not_the_parents():
    code = """
        import os, signal, sys, time
        from jaxlm.train.workdir import StopFlag
        with StopFlag(grace_s=0.2) as stop:
            ready, say = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(say, b"1")
                time.sleep(60)
            os.read(ready, 1)
            os.kill(child, signal.SIGTERM)
            print(os.waitpid(child, 0)[1], flush=True)
            time.sleep(0.5)
            print(bool(stop))
    """
    with start(code) as child:
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (0, "15\nFalse\n", "")


def test_previous_handlers_come_back():
    before = [signal.getsignal(s) for s in StopFlag.SIGNALS]
    with StopFlag() as outer:
        with StopFlag() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert wait_for(inner) and inner.exit_code == 143
        assert not outer and outer.exit_code == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert wait_for(outer) and outer.exit_code == 130
    assert [signal.getsignal(s) for s in StopFlag.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert not stop
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_notebook_is_interrupted_but_not_ended():
    with pytest.raises(KeyboardInterrupt), StopFlag(grace_s=None) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert wait_for(stop)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert stop.exit_code == 130


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def work():
        with StopFlag() as stop:
            seen.append(bool(stop))

    before = [signal.getsignal(s) for s in StopFlag.SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert [signal.getsignal(s) for s in StopFlag.SIGNALS] == before


def wait_for(stop) -> bool:
    end = time.monotonic() + 2
    while not stop and time.monotonic() < end:
        time.sleep(0.001)
    return bool(stop)
