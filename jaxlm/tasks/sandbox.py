"""Code that a model wrote, run apart: a process without network, with little time and memory, of
root's as nobody. It can still read what its user can read: let that be little.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile

from jaxlm.schema import UserError

SECONDS = 10
_LIMITS = (f"--as={1 << 30}", f"--fsize={1 << 20}", "--nproc=64", "--core=0")  # bytes, processes
NOBODY = "65534"


def passes(code: str, seconds: float = SECONDS) -> bool:
    """Whether the program ends by itself and without an error. Raises UserError where this machine
    cannot cut it off from the network."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() == 0:
            os.chmod(folder, 0o777)
        limits = [f"--cpu={math.ceil(seconds)}", *_LIMITS]
        process = subprocess.Popen(
            ["prlimit", *limits, *_alone(), sys.executable, "-I", "-c", code], cwd=folder, env={},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@functools.cache
def _alone() -> tuple[str, ...]:
    """The command that runs another without network (and, of root's, as nobody)."""
    way: tuple[str, ...] = (
        "unshare",
        "--map-root-user",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
    )
    if os.geteuid() == 0:
        drop = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
        way = ("unshare", "--net", "--pid", "--fork", "--kill-child", *drop, "--no-new-privs")
    try:
        there = shutil.which("prlimit") and shutil.which(way[0])
        found = there and subprocess.run([*way, sys.executable, "-I", "-c", ""])
    except OSError:
        found = None
    if not found or found.returncode:
        raise UserError(
            "--run-code: this machine gives no process without network (unshare, prlimit)"
        )
    return way


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that one of k samples passes, of n that were drawn (Chen et al. 2021, eq. 1).
    Raises ValueError for k above n."""
    if k > n:
        raise ValueError(f"pass@{k} needs {k} samples, not {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
