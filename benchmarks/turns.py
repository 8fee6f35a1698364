"""Contenders that take turns: each lives in a process of its own and answers lines with JSON."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Child:
    """`script --contender name …` in its own process, spoken to in lines."""

    def __init__(
        self, script: str, name: str, arguments: Sequence[str | Path], env: dict[str, str]
    ) -> None:
        command = [sys.executable, script, "--contender", name, *map(str, arguments)]
        self.name = name
        self.process = subprocess.Popen(
            command, env={**os.environ, **env}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.ready = self._answer()
        self.rows: list[dict[str, Any]] = []

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended before its answer: see its output above")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def serve(start: Callable[[], tuple[dict[str, Any], Callable[[str], dict[str, Any]]]]) -> None:
    """The child's side: `start` gives its first answer, and what answers each line on stdin."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints stays out of the protocol
    ready, answer = start()
    print(json.dumps(ready), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), file=out, flush=True)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of medians, and the quartiles of the ratios round by round."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(each, n=4)
    return statistics.median(ours) / statistics.median(theirs), low, high
