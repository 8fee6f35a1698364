"""How long a sweep will take on this machine, told by running it in miniature.

A few dispatches of some of its shapes go through the sweep's own workers, as many side by side as
the sweep will run (they slow each other), once to compile and once to be timed; what lies between
these shapes is interpolated over FLOPs per step. Their programs are then in JAX's cache, where the
sweep finds them.
"""

from __future__ import annotations

import dataclasses
import heapq
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import Config, Sweep
from jaxlm.files import read_jsonl
from jaxlm.planning.steps import flops_per_step
from jaxlm.scaling.ladder import Member, candidates
from jaxlm.scaling.sweep import plan_members
from jaxlm.scaling.workers import n_workers, run_apart
from jaxlm.train import record
from jaxlm.train.step import static

SHAPES = 4  # that are timed
SECONDS = 1.2  # of steps, for each


@dataclass(frozen=True)
class Speed:
    """Of one shape, in seconds: a step, and all else of a short run (the start of its state,
    evaluation, saving). `flops`: of a step."""

    flops: float
    step_s: float
    besides_s: float


@dataclass(frozen=True)
class Wall:
    """Seconds that a sweep will take until its laws are fitted, and what they rest on."""

    seconds: float
    ladder_s: float
    holdout_s: float
    workers: int
    start_s: float  # of the workers
    speeds: tuple[Speed, ...]


def wall(sweep: Sweep, data_dir: Path, stop: Any = False) -> Wall:
    """Raises what `run_members` does. Writes nothing but JAX's cache."""
    sweep = dataclasses.replace(sweep, engine="local")
    planned, trunks = plan_members(sweep)
    starts = {name: step for t in trunks for name, step in t.starts.items()}
    ladder = [(m.config, m.config.train.steps - starts.get(m.name, 0)) for m in planned]
    stems = [(t.config, t.config.train.steps) for t in trunks]
    n = n_workers(sweep, len(planned))
    speeds, start_s = _timed(sweep, _spread([c for c, _ in ladder]), n, data_dir, stop)
    ladder_s = sum(
        start_s + _makespan([_seconds(c, steps, speeds) for c, steps in jobs], n)
        for jobs in (stems, ladder)
        if jobs
    )
    holdout_s = 0.0
    if held := candidates(sweep):
        middle = held[len(held) // 2]
        alone, start = _timed(sweep, [middle.config], 1, data_dir, stop, "holdout")
        holdout_s = start + _seconds(middle.config, middle.config.train.steps, alone)
    return Wall(ladder_s + holdout_s, ladder_s, holdout_s, n, start_s, tuple(speeds))


def _spread(configs: Sequence[Config]) -> list[Config]:
    """Of the distinct shapes up to SHAPES, the cheapest and the dearest step among them."""
    distinct = {static(c): c for c in configs}.values()
    found = sorted(distinct, key=flops_per_step)
    places = np.linspace(0, len(found) - 1, min(SHAPES, len(found))).round().astype(int)
    return [found[i] for i in places]


def _timed(
    sweep: Sweep, configs: Sequence[Config], n: int, data_dir: Path, stop: Any, role: Any = "fit"
) -> tuple[list[Speed], float]:
    """The speed of each config with `n` workers at it, and how long the workers take to start."""
    folder = Path(tempfile.mkdtemp(prefix="jaxlm-plan-"))
    try:
        compiling = [_short(c, 2, 0, role) for c in configs]
        run_apart(sweep, folder, compiling, data_dir, stop=stop)
        members = []
        for first in compiling:
            step_s = _step_s(folder, first)
            k = first.config.train.steps_per_dispatch
            chunks = min(max(3, round(SECONDS / (k * step_s))), 40)
            members += [_short(first.config, chunks, 1 + seed, role) for seed in range(n)]
        began = time.perf_counter()
        run_apart(sweep, folder, members, data_dir, stop=stop)
        elapsed = time.perf_counter() - began
        rows = {m.name: record.read(folder / "runs" / m.name) for m in members}
        walls = {name: row.wall_time_s for name, row in rows.items() if row is not None}
        speeds = []
        for i in range(0, len(members), n):
            steps = [_step_s(folder, m) for m in members[i : i + n]]
            whole = [walls[m.name] - m.config.train.steps * s
                     for m, s in zip(members[i : i + n], steps, strict=True)]  # fmt: skip
            flops = flops_per_step(members[i].config)
            speeds.append(Speed(flops, statistics.mean(steps), max(0.0, statistics.mean(whole))))
        return speeds, max(0.0, elapsed - _makespan(list(walls.values()), n))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _short(config: Config, chunks: int, seed: int, role: Any) -> Member:
    """The config for so many dispatches, one row of metrics for each."""
    k = config.train.steps_per_dispatch
    train = dataclasses.replace(
        config.train, steps=chunks * k, log_every=k, eval_every=0, checkpoint_every=0
    )
    name = f"{config.name}-{chunks}x{k}-{seed}"
    return Member(dataclasses.replace(config, name=name, seed=seed, train=train), role, 0.0)


def _step_s(folder: Path, member: Member) -> float:
    """Mean over all dispatches but the first, which waits for the compiler."""
    rows = list(read_jsonl(folder / "runs" / member.name / "metrics.jsonl"))
    rates = [r["perf/tokens_per_s"] for r in rows if "perf/tokens_per_s" in r][1:]
    return statistics.mean(member.config.batch_tokens / r for r in rates)


def _seconds(config: Config, steps: int, speeds: Sequence[Speed]) -> float:
    """Of a run on one worker."""
    x = [s.flops for s in speeds]
    flops, t = flops_per_step(config), config.train
    step_s, besides_s = (
        float(np.interp(flops, x, [getattr(s, of) for s in speeds]))
        for of in ("step_s", "besides_s")
    )
    inside = min(max(flops, x[0]), x[-1])  # beyond them in proportion
    evaluations = max(1, steps // t.eval_every) if t.eval_every else 1
    return steps * step_s * flops / inside + besides_s * evaluations


def _makespan(seconds: Sequence[float], n: int) -> float:
    """Until `n` workers are done, each taking the longest run that waits."""
    free = [0.0] * n
    for s in sorted(seconds, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + s)
    return max(free)
