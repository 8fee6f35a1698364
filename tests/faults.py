"""What tests of faults share: a disk that fills up, and children that are killed."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest


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


def start(code: str, *args: object, **kwargs) -> subprocess.Popen:
    """A child that runs `code` on one CPU device, its output as text."""
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONWARNINGS": "ignore"}
    code = "if True:\n" + code
    command = [sys.executable, "-c", code, *map(str, args)]
    cwd = Path(__file__).parent
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=env, cwd=cwd, **kwargs
    )
