"""What tests of faults share: a full disk, children that are killed, and what must be the same."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.files import read_jsonl
from jaxlm.train.checkpoint import read_manifest


@contextlib.contextmanager
def small_disk(tmp_path):
    """A folder on a file system of 16 MiB of its own."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def start(code: str, *args: object, env=None, **kwargs) -> subprocess.Popen:
    """A child that runs `code` on one CPU device, its output as text."""
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONWARNINGS": "ignore", **(env or {})}
    code = "if True:\n" + code
    command = [sys.executable, "-c", code, *map(str, args)]
    cwd = Path(__file__).parent
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=env, cwd=cwd, **kwargs
    )


def words(folder: Path, files: int = 60) -> Path:
    """A folder of distinct small texts, 2 KB each, the same at each call."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    known = ("the", "a", "sky", "sea", "blue", "wide", "is", "was", "and", "of", "tree", "red")
    for i in range(files):
        text = " ".join(draw.choice(known) for _ in range(400))
        (folder / f"{i}.txt").write_text(f"{text} {i}.\n")
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    found = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in found]


def assert_same(folder: Path, whole: Path, steps: int) -> tuple[dict, dict]:
    """Rows and arrays bitwise: a manifest, of which both are given, holds a digest of every array's
    values."""
    assert rows(folder) == rows(whole) != []
    ours, theirs = (read_manifest(f / "checkpoints" / str(steps)) for f in (folder, whole))
    assert ours["arrays"] == theirs["arrays"] and len(ours["arrays"]) > 10
    return ours, theirs


# Compiles in half the time what computes the same up to rounding.
QUICK = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONWARNINGS": "ignore"}


def command(*arguments: object, environment=None, **kwargs) -> subprocess.Popen:
    """`jaxlm …` as a process of its own, on one CPU device."""
    whole = [sys.executable, "-m", "jaxlm", *map(str, arguments)]
    pipe = subprocess.PIPE
    env = {**os.environ, **QUICK, **(environment or {})}
    return subprocess.Popen(whole, stdout=pipe, stderr=pipe, text=True, env=env, **kwargs)


_SERVER = """
    import json, os, sys
    import grain.python, orbax.checkpoint, jaxlm.api, jaxlm.job
    from jaxlm.launch import supervisor
    from jaxlm.main import main

    def run(arguments):
        code = 99  # of a traceback
        try:
            main(arguments)
        except SystemExit as e:
            code = e.code
        finally:
            sys.stderr.flush()
            os._exit(code)

    class Forked:
        # What a supervisor starts here, as `subprocess.Popen` would.
        def __init__(self, arguments, environment):
            self.code, self.pid = None, os.fork()
            if self.pid == 0:
                os.setsid()
                os.environ.update(environment)
                run(arguments)

        def poll(self, options=os.WNOHANG):
            if self.code is None:
                pid, status = os.waitpid(self.pid, options)
                self.code = os.waitstatus_to_exitcode(status) if pid else None
            return self.code

        def wait(self):
            return self.poll(0)

        def send_signal(self, signum):
            os.kill(self.pid, signum)

    supervisor._start = Forked
    for line in sys.stdin:
        arguments, log = json.loads(line)
        child = os.fork()
        if child == 0:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            run(arguments)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Sittings:
    """`jaxlm …` in process after process, forked from one that has imported everything."""

    def __init__(self, log: Path):
        self.log = log
        self.server = start(_SERVER, stdin=subprocess.PIPE, env=QUICK)

    def begin(self, *arguments: object) -> int:
        """Starts a process; its pid."""
        self.server.stdin.write(json.dumps([list(map(str, arguments)), str(self.log)]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def end(self) -> int:
        """The exit code, -n after signal n; waits for it."""
        return int(self.server.stdout.readline())

    def run(self, *arguments: object) -> int:
        self.begin(*arguments)
        return self.end()

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()
